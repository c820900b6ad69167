package relay_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/ivshmem-go/ivshmem/internal/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// echo answers what it reads in capitals, after the end of what it reads.
func echo(t *testing.T, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			b, err := io.ReadAll(c)
			if err != nil {
				return
			}
			io.WriteString(c, strings.ToUpper(string(b)))
		}()
	}
}

func TestRoute(t *testing.T) {
	target, front := listen(t), listen(t)
	go echo(t, target)
	ctx, cancel := context.WithCancel(t.Context())
	r := &relay.Route{Listener: front, Failed: func(err error) { t.Error(err) },
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", target.Addr().String())
		}}
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			c, err := net.Dial("tcp", front.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.WriteString(c, "half closed")
			c.(*net.TCPConn).CloseWrite()
			if b, err := io.ReadAll(c); string(b) != "HALF CLOSED" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
	wg.Wait()
	// One that is open when the context ends.
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	io.ReadAll(c)
	c.Close()
	target.Close()
}

func TestRouteFails(t *testing.T) {
	front := listen(t)
	failed := make(chan error, 1)
	cause := errors.New("nobody there")
	r := &relay.Route{Listener: front, Failed: func(err error) { failed <- err },
		Dial: func(context.Context) (net.Conn, error) { return nil, cause }}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != cause {
		t.Error(err)
	}
	if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
		t.Error(b, err)
	}
	c.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	closed := listen(t)
	closed.Close()
	r = &relay.Route{Listener: closed}
	if err := r.Run(t.Context()); err == nil {
		t.Error("a closed listener: no error")
	}
}
