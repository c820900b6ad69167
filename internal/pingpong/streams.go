package pingpong

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/stream"
)

// Ports of a run.
const (
	controlPort = 1
	idlePort    = 2
	dataPort    = 3
)

// messages is a connection's messages as a Channel.
type messages struct{ *stream.Conn }

func (m messages) Receive(p []byte) error {
	n, err := m.Conn.Receive(p)
	if err == nil && n != len(p) {
		err = &MessageError{Field: "length", Expected: uint64(len(p)), Found: uint64(n)}
	}
	return err
}

// octets is a connection's stream of bytes as a Channel.
type octets struct{ conn *stream.Conn }

func (o octets) Send(p []byte) error {
	_, err := o.conn.Write(p)
	return err
}

func (o octets) Receive(p []byte) error {
	_, err := io.ReadFull(o.conn, p)
	return err
}

func streamLink(ep *stream.Endpoint, control *Control, data *stream.Conn, t Task) Link {
	l := Link{
		Data:      octets{data},
		Control:   control,
		Doorbells: func() uint64 { return ep.Stats().Doorbells },
		Idle: func(d time.Duration) {
			data.SetReadDeadline(time.Now().Add(d))
			data.Read(make([]byte, 1))
		},
	}
	if t.Over == Messages || t.Measure == Rate {
		l.Data = messages{data}
	}
	return l
}

// Lead measures over streams with a peer that follows. After the last task it
// waits until the peer's endpoint is closed, so that nobody takes it for the
// next one.
func Lead(ctx context.Context, dev *ivshmem.Device, ep *stream.Endpoint, peer uint32, t Task) (*Outcome, error) {
	if err := t.Check(); err != nil {
		return nil, err
	}
	c, err := dial(ctx, ep, peer, controlPort)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	was, err := dev.State(peer)
	if err != nil {
		return nil, err
	}
	control := NewControl(c)
	if err := control.enc.Encode(t); err != nil {
		return nil, err
	}
	for range t.Conns {
		idle, err := dial(ctx, ep, peer, idlePort)
		if err != nil {
			return nil, err
		}
		defer idle.Close()
		if t.Read {
			go idle.Read(make([]byte, 1))
		}
	}
	data, err := dial(ctx, ep, peer, dataPort)
	if err != nil {
		return nil, err
	}
	defer data.Close()
	stop := context.AfterFunc(ctx, func() { data.Close(); c.Close() })
	defer stop()
	res, err := LeadTask(streamLink(ep, control, data, t), t)
	if err != nil {
		return res, errors.Join(context.Cause(ctx), err)
	}
	if t.More {
		return res, nil
	}
	data.Close()
	c.Close() // it waits for that
	return res, await(ctx, dev, peer, func(s uint32) (bool, error) { return s != was, nil })
}

// dial dials until the peer listens.
func dial(ctx context.Context, ep *stream.Endpoint, peer, port uint32) (*stream.Conn, error) {
	for {
		c, err := ep.Dial(ctx, peer, port)
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EHOSTUNREACH) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Follow does what the leading peer asks for, until that was the last task.
func Follow(ctx context.Context, dev *ivshmem.Device, ep *stream.Endpoint, peer uint32) error {
	control, err := ep.Listen(controlPort)
	if err != nil {
		return err
	}
	defer control.Close()
	idle, err := ep.Listen(idlePort)
	if err != nil {
		return err
	}
	defer idle.Close()
	data, err := ep.Listen(dataPort)
	if err != nil {
		return err
	}
	defer data.Close()
	stop := context.AfterFunc(ctx, func() { control.Close(); idle.Close(); data.Close() })
	defer stop()
	for more := true; more; {
		c, err := acceptFrom(ctx, dev, peer, control, absence)
		if err == nil {
			more, err = follow(ctx, ep, c, idle, data)
			c.Close()
		}
		if err != nil {
			return errors.Join(context.Cause(ctx), err)
		}
	}
	return nil
}

// absence is for how long a leading peer that was there may be away: it is, for
// a moment, between what it measures over one layer and the next.
const absence = 5 * time.Second

// acceptFrom accepts a connection, unless the peer leaves for longer than
// absence.
func acceptFrom(ctx context.Context, dev *ivshmem.Device, peer uint32, l *stream.Listener, absence time.Duration) (*stream.Conn, error) {
	waiting, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(waiting, func() { l.Close() })()
	go func() {
		tick := time.NewTicker(absence / 50)
		defer tick.Stop()
		var there time.Time // when it was seen last
		for {
			s, err := dev.State(peer)
			switch {
			case err != nil: // accepting ends as well
				return
			case s != 0:
				there = time.Now()
			case !there.IsZero() && time.Since(there) > absence:
				stop(fmt.Errorf("%w: peer %d left, and has been away for %v", ivshmem.ErrGone, peer, absence))
				return
			}
			select {
			case <-waiting.Done():
				return
			case <-tick.C:
			}
		}
	}()
	c, err := l.AcceptStream()
	if cause := context.Cause(waiting); err != nil && cause != nil {
		err = cause
	}
	return c, err
}

func follow(ctx context.Context, ep *stream.Endpoint, c *stream.Conn, idle, data *stream.Listener) (more bool, err error) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	control := NewControl(c)
	var t Task
	if err := control.dec.Decode(&t); err != nil {
		return false, err
	}
	if err := t.Check(); err != nil {
		return false, err
	}
	for range t.Conns {
		i, err := idle.AcceptStream()
		if err != nil {
			return false, err
		}
		defer i.Close()
		if t.Read {
			go i.Read(make([]byte, 1))
		}
	}
	conn, err := data.AcceptStream()
	if err != nil {
		return false, err
	}
	defer conn.Close()
	stopData := context.AfterFunc(ctx, func() { conn.Close() })
	defer stopData()
	return t.More, FollowTask(streamLink(ep, control, conn, t), t)
}
