package pingpong

import (
	"context"
	"runtime"

	"github.com/ivshmem-go/ivshmem/stream"
)

// maxSize is the largest message that a follower makes room for.
const maxSize = 64 << 20

// Follow does what a leading peer asks for, until the context ends or, if once
// is set, one run is over.
func Follow(ctx context.Context, ep *stream.Endpoint, once bool) error {
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
	for {
		c, err := control.AcceptStream()
		if err == nil {
			err = follow(ctx, ep, c, idle, data)
			c.Close()
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil || once {
			return err
		}
	}
}

func follow(ctx context.Context, ep *stream.Endpoint, control *stream.Conn, idle, data *stream.Listener) error {
	stop := context.AfterFunc(ctx, func() { control.Close() })
	defer stop()
	var c StreamConfig
	if err := receiveJSON(control, &c); err != nil {
		return err
	}
	if c.Size < minSize || c.Size > maxSize {
		return &MessageError{Field: "size", Expected: minSize, Found: uint64(c.Size)}
	}
	for range c.Conns {
		i, err := idle.AcceptStream()
		if err != nil {
			return err
		}
		defer i.Close()
		if c.Read {
			go i.Read(make([]byte, 1))
		}
	}
	conn, err := data.AcceptStream()
	if err != nil {
		return err
	}
	defer conn.Close()
	stopData := context.AfterFunc(ctx, func() { conn.Close() })
	defer stopData()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p := make([]byte, c.Size)
	if c.Measure != Idle {
		if err := answer(conn, c, p, 1, c.Warmup); err != nil {
			return err
		}
	}
	var start usage
	if err := receiveJSON(control, &start); err != nil {
		return err
	}
	before := spent(ep)
	if err := sendJSON(control, usage{}); err != nil {
		return err
	}
	failed := ""
	if c.Measure != Idle {
		if err := answer(conn, c, p, c.Warmup+1, c.Messages); err != nil {
			failed = err.Error()
		}
	}
	if err := receiveJSON(control, &start); err != nil {
		return err
	}
	u := spent(ep).since(before)
	u.Error = failed
	if err := sendJSON(control, u); err != nil {
		return err
	}
	control.Read(make([]byte, 1)) // until the leading peer has read it
	return nil
}

// answer takes n messages, and sends back those that are round trips.
func answer(conn *stream.Conn, c StreamConfig, p []byte, from, n uint64) error {
	over := c.Over
	if c.Measure == Rate {
		over = Messages
	}
	for seq := from; seq < from+n; seq++ {
		if err := take(conn, over, p, seq); err != nil {
			return err
		}
		if c.Measure == Latency {
			if err := give(conn, over, p); err != nil {
				return err
			}
		}
	}
	return nil
}
