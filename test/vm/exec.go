package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm/internal/wire"
)

// Command is a command to be run in a guest.
type Command struct {
	Argv []string
	Env  []string // KEY=value, added to the guest's environment
	Dir  string   // working directory, "" is /root
	// Stdin is read until its end or the command's; nil is /dev/null.
	Stdin io.Reader
	// Stdout and Stderr get what the command writes; nil discards it. A
	// slow writer slows down this command only.
	Stdout, Stderr io.Writer
}

// Status says how a command ended.
type Status struct {
	Code   int            // exit status, if Signal is 0
	Signal syscall.Signal // the signal that ended it, or 0
}

// ExitCode returns the status as a shell would: 128 plus the signal's number
// for a command that a signal ended.
func (s Status) ExitCode() int {
	if s.Signal != 0 {
		return 128 + int(s.Signal)
	}
	return s.Code
}

// String says it in words.
func (s Status) String() string {
	if s.Signal != 0 {
		return fmt.Sprintf("signal %d (%v)", int(s.Signal), s.Signal)
	}
	return fmt.Sprintf("exit status %d", s.Code)
}

// StartError is the error of a command that could not be started in the
// guest, such as one that does not exist there.
type StartError struct{ Reason string }

func (e *StartError) Error() string { return e.Reason }

// Result is what a command left behind.
type Result struct {
	Status
	Stdout, Stderr []byte
}

// Run runs a command in the guest and waits for its end; if ctx ends first,
// the command is killed. The error is about the guest: that a command fails
// is in the result. The end is when the process has ended and no process in
// the guest has its outputs open any more.
func (g *Guest) Run(ctx context.Context, argv ...string) (Result, error) {
	var stdout, stderr bytes.Buffer
	p, err := g.Exec(Command{Argv: argv, Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		return Result{}, err
	}
	st, err := p.Wait(ctx)
	select {
	case <-p.done:
		return Result{st, stdout.Bytes(), stderr.Bytes()}, err
	default: // the buffers are still being written
		return Result{Status: st}, err
	}
}

// Exec starts a command in the guest. Any number of commands can run at the
// same time. Wait must be called.
func (g *Guest) Exec(c Command) (*Process, error) {
	g.mu.Lock()
	s := g.session
	g.mu.Unlock()
	if s == nil {
		return nil, fmt.Errorf("%s: %w", g.name, ErrReset)
	}
	p := &Process{
		guest: g, session: s, command: c,
		frames: make(chan wire.Frame, 4), // one per output, Ack, Exit: receive never blocks
		stdin:  make(chan struct{}, 1), done: make(chan struct{}),
	}
	if err := s.add(p); err != nil {
		return nil, g.explain(err)
	}
	go p.serve()
	err := s.conn.SendJSON(wire.Start, p.id, wire.Command{Argv: c.Argv, Env: c.Env, Dir: c.Dir, Stdin: c.Stdin != nil})
	if err != nil {
		return nil, g.explain(gone(err))
	}
	if c.Stdin != nil {
		go p.feed()
	}
	return p, nil
}

// Process is a command that was started in a guest.
type Process struct {
	guest   *Guest
	session *session
	command Command
	id      uint32
	frames  chan wire.Frame
	stdin   chan struct{} // the last piece of input was taken
	done    chan struct{}
	status  Status // valid after done
	err     error  // valid after done
}

// Signal sends a signal to the command and the processes it has started.
func (p *Process) Signal(s syscall.Signal) error {
	return p.session.conn.Send(wire.Signal, p.id, []byte{byte(s)})
}

// Done is closed when the command has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// killGrace is how long Wait waits for the end of a command it has killed: a
// process that has left the command's session may still hold its outputs.
const killGrace = 10 * time.Second

// Wait waits for the end of the command; if ctx ends first, it kills the
// command.
func (p *Process) Wait(ctx context.Context) (Status, error) {
	select {
	case <-p.done:
		return p.status, p.err
	case <-ctx.Done():
	}
	_ = p.Signal(syscall.SIGKILL) // an error means that the session is ending
	select {
	case <-p.done:
	case <-time.After(killGrace):
	}
	return Status{Signal: syscall.SIGKILL}, fmt.Errorf("%s: %q: %w", p.guest.name, p.command.Argv, context.Cause(ctx))
}

// serve hands out what arrives for this process. The channel is closed when
// nothing more can come.
func (p *Process) serve() {
	defer close(p.done)
	write := func(w io.Writer, f wire.Frame) {
		if w != nil && p.err == nil {
			_, p.err = w.Write(f.Payload)
		}
		_ = p.session.conn.Send(wire.Ack, p.id, []byte{byte(f.Type)})
	}
	for f := range p.frames {
		switch f.Type {
		case wire.Stdout:
			write(p.command.Stdout, f)
		case wire.Stderr:
			write(p.command.Stderr, f)
		case wire.Ack:
			p.stdin <- struct{}{}
		case wire.Exit:
			var st wire.Status
			err := json.Unmarshal(f.Payload, &st)
			if st.Error != "" {
				err = &StartError{st.Error}
			}
			p.status = Status{Code: st.Code, Signal: syscall.Signal(st.Signal)}
			if p.err == nil && err != nil {
				p.err = fmt.Errorf("%s: %q: %w", p.guest.name, p.command.Argv, err)
			}
			return
		}
	}
	p.err = p.guest.explain(fmt.Errorf("%q: %w", p.command.Argv, p.session.failure()))
}

// feed sends the command's input, one piece at a time.
func (p *Process) feed() {
	b := make([]byte, 64<<10)
	for {
		n, err := p.command.Stdin.Read(b)
		if n > 0 {
			if p.session.conn.Send(wire.Stdin, p.id, b[:n]) != nil {
				return
			}
			select {
			case <-p.stdin:
			case <-p.done:
				return
			}
		}
		if err != nil {
			_ = p.session.conn.Send(wire.Stdin, p.id, nil)
			return
		}
	}
}

// session is the life of the guest's agent between two boots.
type session struct {
	conn *wire.Conn

	mu        sync.Mutex
	err       error // why it ended
	last      uint32
	processes map[uint32]*Process
}

func (s *session) add(p *Process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	s.last++
	p.id = s.last
	s.processes[p.id] = p
	return nil
}

// receive hands arriving frames to the processes until the connection ends.
func (s *session) receive() error {
	for {
		f, err := s.conn.Receive()
		if err != nil {
			return gone(err)
		}
		s.mu.Lock()
		p := s.processes[f.ID]
		if f.Type == wire.Exit {
			delete(s.processes, f.ID)
		}
		s.mu.Unlock()
		if p == nil {
			return fmt.Errorf("message of type %d for unknown command %d", f.Type, f.ID)
		}
		select {
		case p.frames <- f:
		default:
			return errors.New("the guest sends more than it may")
		}
	}
}

// fail ends the session and all its processes.
func (s *session) fail(err error) {
	s.conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
	for _, p := range s.processes {
		close(p.frames)
	}
	s.processes = nil
}

func (s *session) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
