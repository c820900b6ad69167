package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
)

// Monitor is a connection to QEMU's monitor (QMP).
type Monitor struct {
	conn net.Conn

	call    sync.Mutex // one command at a time
	replies chan reply
	closed  chan struct{}

	mu     sync.Mutex
	events []Event
	more   chan struct{} // closed and replaced when an event arrives
}

// Event is an asynchronous message of QEMU.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// MonitorError is an error reply of QEMU.
type MonitorError struct {
	Class       string `json:"class"`
	Description string `json:"desc"`
}

func (e *MonitorError) Error() string { return "QEMU: " + e.Description }

type reply struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *MonitorError   `json:"error"`
	Event
}

func newMonitor(conn net.Conn) *Monitor {
	m := &Monitor{conn: conn, replies: make(chan reply, 1), closed: make(chan struct{}), more: make(chan struct{})}
	go m.receive()
	return m
}

func (m *Monitor) receive() {
	defer close(m.closed)
	d := json.NewDecoder(m.conn)
	for {
		var r reply
		if d.Decode(&r) != nil {
			return
		}
		if r.Name != "" {
			m.mu.Lock()
			m.events = append(m.events, r.Event)
			close(m.more)
			m.more = make(chan struct{})
			m.mu.Unlock()
			continue
		}
		select {
		case m.replies <- r:
		default: // of a command that nobody waits for any more
		}
	}
}

func (m *Monitor) next(ctx context.Context) (reply, error) {
	select {
	case r := <-m.replies:
		return r, nil
	case <-m.closed:
		return reply{}, fmt.Errorf("%w: QEMU has ended", ErrGone)
	case <-ctx.Done():
		return reply{}, context.Cause(ctx)
	}
}

func (m *Monitor) negotiate(ctx context.Context) error {
	r, err := m.next(ctx)
	if err != nil {
		return err
	}
	if r.Greeting == nil {
		return errors.New("QEMU's monitor sends no greeting")
	}
	return m.Execute(ctx, "qmp_capabilities", nil, nil)
}

// Execute runs a monitor command; arguments and result are marshalled as
// JSON, and nil is none. A refusal by QEMU is a *MonitorError. After an error
// of ctx the monitor cannot be used any more.
func (m *Monitor) Execute(ctx context.Context, command string, arguments, result any) error {
	m.call.Lock()
	defer m.call.Unlock()
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(m.conn).Encode(request); err != nil {
		return fmt.Errorf("%s: %w", command, gone(err))
	}
	r, err := m.next(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if r.Error != nil {
		return fmt.Errorf("%s: %w", command, r.Error)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(r.Return, result)
}

// WaitEvent waits for the first event with one of the given names that no
// call has returned yet, and returns it.
func (m *Monitor) WaitEvent(ctx context.Context, name string) (Event, error) {
	for {
		m.mu.Lock()
		for i, e := range m.events {
			if e.Name == name {
				m.events = append(m.events[:i:i], m.events[i+1:]...)
				m.mu.Unlock()
				return e, nil
			}
		}
		more := m.more
		m.mu.Unlock()
		select {
		case <-more:
		case <-m.closed:
			return Event{}, fmt.Errorf("wait for event %s: %w", name, ErrGone)
		case <-ctx.Done():
			return Event{}, fmt.Errorf("wait for event %s: %w", name, context.Cause(ctx))
		}
	}
}
