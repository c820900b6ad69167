// Package relay joins connections of two kinds, many at a time.
package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
)

// Route takes connections from a listener and joins each with one that Dial
// makes.
type Route struct {
	Listener net.Listener
	Dial     func(ctx context.Context) (net.Conn, error)
	// Failed is told when a connection could not be made, or broke.
	Failed func(error)
}

// Run takes connections until the context ends, then closes all and waits for
// them. It returns an error if the listener fails before that.
func (r *Route) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { r.Listener.Close() })
	defer stop()
	for {
		from, err := r.Listener.Accept()
		if err != nil {
			r.Listener.Close()
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		wg.Go(func() {
			to, err := r.Dial(ctx)
			if err != nil {
				from.Close()
				r.fail(ctx, err)
				return
			}
			r.fail(ctx, Join(ctx, from, to))
		})
	}
}

func (r *Route) fail(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil && r.Failed != nil {
		r.Failed(err)
	}
}

// Join carries bytes between two connections until both directions have ended,
// one has broken, or the context ends, and closes both. The end of one
// direction is passed on, where the connection can.
func Join(ctx context.Context, a, b net.Conn) error {
	closeBoth := func() { a.Close(); b.Close() }
	stop := context.AfterFunc(ctx, closeBoth)
	defer stop()
	results := make(chan error, 2)
	go func() { results <- carry(a, b) }()
	go func() { results <- carry(b, a) }()
	err := <-results
	if err != nil {
		closeBoth() // the other direction ends by this
		<-results
		return err
	}
	err = <-results
	closeBoth()
	return err
}

func carry(to, from net.Conn) error {
	buf := make([]byte, 64<<10)
	// Hidden from io.CopyBuffer: what the kernel can do between sockets helps
	// with none of these.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, buf)
	if err != nil {
		return err
	}
	if w, ok := to.(interface{ CloseWrite() error }); ok {
		if err := w.CloseWrite(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
	return to.Close()
}
