package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var links = map[string]link.Config{
	"output sections": {Peers: 2, Vectors: 2, Output: 64 << 10},
	"R/W section":     {Peers: 3, Vectors: 1, ReadWrite: 256 << 10},
}

var modes = map[string]stream.Mode{"adaptive": stream.Adaptive, "sleep": stream.Sleep, "poll": stream.Poll}

// endpoints returns endpoints on all peers of a fresh link.
func endpoints(t testing.TB, l link.Config, c stream.Config, opts ...ivshmem.Option) []*stream.Endpoint {
	t.Helper()
	var eps []*stream.Endpoint
	for _, d := range ivshmemtest.Peers(t, l, opts...) {
		ep, err := stream.New(d, c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ep.Close() })
		eps = append(eps, ep)
	}
	return eps
}

// connect returns both ends of a connection: the one that dialed, on a, and
// the one that was accepted, on b.
func connect(t testing.TB, a, b *stream.Endpoint, port uint32) (*stream.Conn, *stream.Conn) {
	t.Helper()
	l, err := b.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	type result struct {
		c   *stream.Conn
		err error
	}
	accepted := make(chan result, 1)
	go func() {
		c, err := l.AcceptStream()
		accepted <- result{c, err}
	}()
	dialed, err := a.Dial(t.Context(), b.Device().ID(), port)
	if err != nil {
		t.Fatal(err)
	}
	r := <-accepted
	if r.err != nil {
		t.Fatal(r.err)
	}
	return dialed, r.c
}

func TestConn(t *testing.T) {
	for name, l := range links {
		for mode, m := range modes {
			t.Run(name+"/"+mode, func(t *testing.T) {
				nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
					eps := endpoints(t, l, stream.Config{Mode: m})
					a, b := connect(t, eps[0], eps[1], 7)
					return a, b, func() { a.Close(); b.Close() }, nil
				})
			})
		}
	}
}

func TestDialNobody(t *testing.T) {
	eps := endpoints(t, links["R/W section"], stream.Config{})
	if _, err := eps[0].Dial(t.Context(), 1, 7); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v, want ECONNREFUSED", err)
	}
	eps[2].Close()
	if _, err := eps[0].Dial(t.Context(), 2, 7); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("nobody there: %v, want EHOSTUNREACH", err)
	}
	for _, peer := range []uint32{0, 3, 1 << 31} {
		if _, err := eps[0].Dial(t.Context(), peer, 7); err == nil {
			t.Errorf("dialed peer %d", peer)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("the cause")
	cancel(cause)
	if _, err := eps[0].Dial(ctx, 1, 7); !errors.Is(err, context.Canceled) {
		t.Errorf("dialed with a canceled context: %v", err)
	}
}

func TestMessages(t *testing.T) {
	for name, l := range links {
		t.Run(name, func(t *testing.T) {
			eps := endpoints(t, l, stream.Config{Ring: 512})
			a, b := connect(t, eps[0], eps[1], 7)
			sizes := []int{0, 1, 7, 8, 9, 63, 64, 65, 100, 127, 128, 129, 500, 511, 512, 513, 5000, 0, 3}
			go func() {
				for round := range 20 {
					for _, n := range sizes {
						p := make([]byte, n)
						for i := range p {
							p[i] = byte(i + n + round)
						}
						if err := a.Send(p); err != nil {
							t.Error(err)
							return
						}
					}
				}
				a.Close()
			}()
			buf := make([]byte, 5000)
			for round := range 20 {
				for _, want := range sizes {
					n, err := b.Receive(buf)
					if err != nil || n != want {
						t.Fatalf("message of %d bytes, %v, want %d bytes", n, err, want)
					}
					for i, x := range buf[:n] {
						if x != byte(i+n+round) {
							t.Fatalf("byte %d of %d is %#x, want %#x", i, n, x, byte(i+n+round))
						}
					}
				}
			}
			if _, err := b.Receive(buf); err != io.EOF {
				t.Errorf("after the end: %v, want EOF", err)
			}
			b.Close()
		})
	}
}

func TestSendAll(t *testing.T) {
	for name, l := range links {
		for _, ring := range []uint64{512, 4096, 16384} {
			t.Run(fmt.Sprint(name, ring), func(t *testing.T) {
				eps := endpoints(t, l, stream.Config{Ring: ring})
				a, b := connect(t, eps[0], eps[1], 7)
				var batch [][]byte
				for n := range 90 {
					batch = append(batch, bytes.Repeat([]byte{byte(n)}, n*n%531))
				}
				const rounds = 50
				go func() {
					for range rounds {
						if n, err := a.SendAll(batch); err != nil || n != len(batch) {
							t.Error(n, err)
							return
						}
					}
					a.Close()
				}()
				buf := make([]byte, 600)
				for range rounds {
					for i, want := range batch {
						n, err := b.Receive(buf)
						if err != nil || !bytes.Equal(buf[:n], want) {
							t.Fatalf("message %d: %d bytes, %v, want %d", i, n, err, len(want))
						}
					}
				}
				if _, err := b.Receive(buf); err != io.EOF {
					t.Errorf("after the end: %v, want EOF", err)
				}
				b.Close()
			})
		}
	}
}

func TestUnsafe(t *testing.T) {
	eps := endpoints(t, links["output sections"], stream.Config{Ring: 1024})
	a, b := connect(t, eps[0], eps[1], 7)
	go func() {
		for i := range 1000 {
			n := i % 250
			p, err := a.UnsafeReserve(n + 5)
			if err != nil || len(p) != n+5 {
				t.Error(len(p), err)
				return
			}
			for j := range p[:n] {
				p[j] = byte(i)
			}
			if err := a.UnsafeCommit(n); err != nil {
				t.Error(err)
			}
		}
		a.Close()
	}()
	for i := range 1000 {
		p, end, err := b.UnsafePeek()
		if err != nil || !end || !bytes.Equal(p, bytes.Repeat([]byte{byte(i)}, i%250)) {
			t.Fatalf("message %d: %d bytes, end %v, %v", i, len(p), end, err)
		}
		if err := b.UnsafeRelease(); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := b.UnsafePeek(); err != io.EOF {
		t.Errorf("after the end: %v, want EOF", err)
	}
	b.Close()
	if _, err := b.UnsafeReserve(300); !errors.Is(err, stream.ErrMessageTooLong) {
		t.Errorf("reserved more than a quarter: %v", err)
	}
}

// What a peer wrote before it left can be read, and its end seen.
func TestPeerLeaves(t *testing.T) {
	for name, l := range links {
		for _, orderly := range []bool{true, false} {
			t.Run(fmt.Sprint(name, orderly), func(t *testing.T) {
				eps := endpoints(t, l, stream.Config{})
				a, b := connect(t, eps[0], eps[1], 7)
				blocked := make(chan error, 1)
				c, d := connect(t, eps[0], eps[1], 8)
				go func() {
					_, err := d.Read(make([]byte, 1))
					blocked <- err
				}()
				a.Write([]byte("last words"))
				if orderly {
					a.Close()
				}
				eps[0].Device().Close()
				if err := <-blocked; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("a blocked read: %v, want ECONNRESET", err)
				}
				got, err := io.ReadAll(b)
				if string(got) != "last words" {
					t.Errorf("read %q", got)
				}
				if orderly && err != nil || !orderly && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the end: %v", err)
				}
				if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
					t.Errorf("write to a peer that left: %v", err)
				}
				b.Close()
				c.Close()
				d.Close()
				if _, err := eps[1].Dial(t.Context(), 0, 7); !errors.Is(err, syscall.EHOSTUNREACH) {
					t.Errorf("dial a peer that left: %v, want EHOSTUNREACH", err)
				}
			})
		}
	}
}
