package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/boardtest"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/stream"
)

// TestEventOverrun has the ring of events full, and the next one under way:
// its word is written, its number is not. The event that it writes over must
// not be lost.
func TestEventOverrun(t *testing.T) {
	ep, m := pair(t, stream.Config{}, shape{4, 9, 4})
	l, err := ep.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	first, ok := m.dial(0, 3, 7) // the endpoint has seen all events
	if !ok {
		t.Fatal("refused")
	}
	k := m.knock(0, 0, 7)
	m.write(m.events, 0, 0)
	for i := uint64(1); i <= m.e; i++ {
		m.write(m.events+i, 0, 1)
	}
	m.events += m.e
	store(m.own, 64, m.events)
	m.ring(0)
	if !k.answered(7) {
		t.Fatal("refused")
	}
	for range 2 {
		c, err := l.AcceptStream()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	first.free()
	k.free()
}

// TestSlotOfTheDead has a peer knock while there is no slot, which becomes free
// as another peer dies.
func TestSlotOfTheDead(t *testing.T) {
	b := boardtest.New(t, boardtest.Config{Peers: 3, Vectors: 2, Output: 4096})
	ep := newEndpoint(t, b.Device(t, 0, boardtest.Apart), stream.Config{Ring: 1024})
	if ep.Slots() != 3 {
		t.Fatalf("%d slots, want 3", ep.Slots())
	}
	l, err := ep.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dead := newModel(t, b.Device(t, 1, boardtest.Apart), shape{3, 9, 4}).start()
	for slot := range uint32(3) {
		// The last one is refused, and stays.
		dead.knock(0, slot, 7)
		dead.event(0, slot)
		if slot < 2 {
			c, err := l.AcceptStream()
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
	}
	until(t, "all slots to be taken", func() bool {
		o := dead.look(0)
		return o.block(0, 0) != 0 && o.block(1, 0) != 0 && o.block(2, 0) != 0
	})
	m := newModel(t, b.Device(t, 2, boardtest.Apart), shape{2, 9, 4}).start()
	k := m.knock(0, 0, 7)
	m.event(0, 0)
	time.Sleep(20 * time.Millisecond) // for the endpoint to find out that there is none
	b.SetState(1, 0)
	if !k.answered(7) {
		t.Fatal("refused")
	}
}

// TestDialLate lets contexts end at the moment of the answer: what comes of it
// is an error, or a connection of which nothing is the matter.
func TestDialLate(t *testing.T) {
	ep, m := pair(t, stream.Config{}, shape{4, 9, 4})
	for i := range 1000 {
		ctx, cancel := context.WithCancel(t.Context())
		calls := make(chan *call, 1)
		go func() {
			o, from := m.incoming(0)
			k := m.answer(o, from, 1, 2)
			for range i % 100 * 50 { // some moment from now on
				runtime.KeepAlive(i)
			}
			cancel()
			k.record(0, []byte("x"))
			calls <- k
		}()
		c, err := ep.Dial(ctx, 1, 7)
		k := <-calls
		if err == nil {
			time.Sleep(100 * time.Microsecond)
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatalf("read on a connection that was dialed: %v", err)
			}
			c.Close()
		}
		k.free()
		m.until("the end of the call", func() bool { return k.o.block(k.peer, 0) != k.id })
	}
}

// TestOneShotStates has a State change while a doorbell has disarmed the
// device: there is no interrupt for it.
func TestOneShotStates(t *testing.T) {
	b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 2, Output: 64 << 10})
	ep := newEndpoint(t, b.Device(t, 0, boardtest.OneShots), stream.Config{Mode: stream.Sleep})
	m := newModel(t, b.Device(t, 1, boardtest.Apart), shape{4, 9, 4}).start()
	for range 50 {
		c, k := accept(t, ep, m, 0)
		failed := make(chan error, 1)
		go func() {
			_, err := c.Read(make([]byte, 1))
			failed <- err
		}()
		until(t, "a sleeper", func() bool { return k.o.block(k.peer, 4) != 0 })
		until(t, "the device to be armed", func() bool { return b.RingAndLeave(0, 1, 1) })
		select {
		case err := <-failed:
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Fatal(err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("a reader does not see its peer leave")
		}
		c.Close()
		m.start()
	}
}

// TestEndpointAfterEndpoint closes an endpoint whose connections are still held,
// and starts another on the same device: the former's must leave the latter's
// alone.
func TestEndpointAfterEndpoint(t *testing.T) {
	b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 2, Output: 64 << 10})
	d := b.Device(t, 0, boardtest.Apart)
	m := newModel(t, b.Device(t, 1, boardtest.Apart), shape{4, 9, 4}).start()
	ep := newEndpoint(t, d, stream.Config{})
	var former []*stream.Conn
	for slot := range uint32(3) {
		c, _ := accept(t, ep, m, slot)
		former = append(former, c)
	}
	if _, err := former[1].UnsafeReserve(10); err != nil {
		t.Fatal(err)
	}
	ep.Close()
	m.start()
	ep = newEndpoint(t, d, stream.Config{})
	var conns []*stream.Conn
	var calls []*call
	for slot := range uint32(3) {
		c, k := accept(t, ep, m, slot)
		conns, calls = append(conns, c), append(calls, k)
	}
	o := m.look(0)
	events := load(o.area, 64)
	for _, c := range conns {
		if _, err := c.Write([]byte("latter")); err != nil {
			t.Fatal(err)
		}
	}
	former[0].CloseWrite()
	if err := former[1].UnsafeCommit(10); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a commit behind the end: %v, want %v", err, net.ErrClosed)
	}
	for _, c := range former {
		c.Write([]byte("former"))
		c.Close()
	}
	if n := load(o.area, 64); n != events {
		t.Errorf("%d events, want %d", n, events)
	}
	for i, c := range conns {
		if _, p := calls[i].next(); string(p) != "latter" {
			t.Errorf("read %q", p)
		}
		c.Close()
	}
}

// TestPatrol runs connections over devices without interrupts.
func TestPatrol(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 1, Output: 64 << 10})
		x, y := newEndpoint(t, b.Device(t, 0, boardtest.Silent), stream.Config{}), newEndpoint(t, b.Device(t, 1, boardtest.Silent), stream.Config{})
		a, z := connect(t, x, y, 7)
		return a, z, func() { a.Close(); z.Close() }, nil
	})
}

// TestPatrolDeviceCloses closes the device under an endpoint without interrupts.
func TestPatrolDeviceCloses(t *testing.T) {
	for _, w := range []boardtest.Wiring{boardtest.Silent, boardtest.Apart} {
		b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 1, Output: 64 << 10})
		d := b.Device(t, 0, w)
		ep, err := stream.New(d, stream.Config{})
		if err != nil {
			t.Fatal(err)
		}
		l, err := ep.Listen(7)
		if err != nil {
			t.Fatal(err)
		}
		failed := make(chan error, 1)
		go func() {
			_, err := l.Accept()
			failed <- err
		}()
		d.Close()
		select {
		case err := <-failed:
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("accept: %v, want %v", err, os.ErrClosed)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("accept does not see the device closed")
		}
	}
}

// TestStress has connections come and go between endpoints: bytes and messages
// both ways, deadlines, and ends at any moment. Whoever hangs fails.
func TestStress(t *testing.T) {
	kinds := map[string]func(testing.TB) []*ivshmem.Device{
		"link": func(t testing.TB) []*ivshmem.Device {
			return ivshmemtest.Peers(t, link.Config{Peers: 3, Vectors: 2, Output: 64 << 10})
		},
		"one vector": func(t testing.TB) []*ivshmem.Device {
			return ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 1, ReadWrite: 64 << 10})
		},
		"one-shot": func(t testing.TB) []*ivshmem.Device {
			return ivshmemtest.Peers(t, link.Config{Peers: 3, Vectors: 2, Output: 64 << 10}, ivshmem.WithOneShot())
		},
		"poller": func(t testing.TB) []*ivshmem.Device {
			return ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Output: 64 << 10}, ivshmem.WithSleep(ivshmem.SleepPoller))
		},
		"one silent": func(t testing.TB) []*ivshmem.Device {
			b := boardtest.New(t, boardtest.Config{Peers: 3, Vectors: 2, Output: 64 << 10})
			return []*ivshmem.Device{b.Device(t, 0, boardtest.Apart), b.Device(t, 1, boardtest.Silent), b.Device(t, 2, boardtest.Silent)}
		},
	}
	for kind, devices := range kinds {
		for mode, m := range modes {
			for _, users := range []int{2, 20} {
				if m == stream.Poll && users > 2 {
					continue // a CPU each
				}
				t.Run(fmt.Sprint(kind, "/", mode, "/", users), func(t *testing.T) {
					var eps []*stream.Endpoint
					for _, d := range devices(t) {
						eps = append(eps, newEndpoint(t, d, stream.Config{Mode: m, Ring: 1024}))
					}
					stress(t, eps, users)
				})
			}
		}
	}
}

// stress lets users of each endpoint dial and be dialed for a while.
func stress(t *testing.T, eps []*stream.Endpoint, users int) {
	duration := 50 * time.Millisecond
	if s := os.Getenv("STREAM_STRESS"); s != "" {
		duration = must(time.ParseDuration(s))
	}
	deadline := time.Now().Add(duration)
	hung := time.AfterFunc(duration+60*time.Second, func() {
		p := make([]byte, 1<<20)
		os.Stderr.Write(p[:runtime.Stack(p, true)])
		panic("a user hangs")
	})
	defer hung.Stop()
	var servers, clients sync.WaitGroup
	var listeners []*stream.Listener
	for _, ep := range eps {
		l, err := ep.Listen(7)
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
		servers.Go(func() {
			for {
				c, err := l.AcceptStream()
				if err != nil {
					return
				}
				servers.Go(func() { // echoes, and may stop at any time
					defer c.Close()
					if r := rand.IntN(4); r == 0 {
						io.CopyN(c, c, rand.Int64N(5000))
						return
					}
					io.Copy(c, c)
				})
			}
		})
	}
	for _, ep := range eps {
		for range users {
			clients.Go(func() {
				for time.Now().Before(deadline) {
					to := eps[rand.IntN(len(eps))].Device().ID()
					if to == ep.Device().ID() {
						continue
					}
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(20))*time.Millisecond)
					c, err := ep.Dial(ctx, to, 7)
					cancel()
					if err != nil {
						if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, stream.ErrTooMany) {
							t.Error(err)
							return
						}
						continue
					}
					visit(t, c)
				}
			})
		}
	}
	clients.Wait()
	for _, l := range listeners {
		l.Close()
	}
	servers.Wait()
	for _, ep := range eps {
		// Nobody holds a slot any more: so all of them can be had at once.
		for _, other := range eps {
			if other != ep {
				free(t, newModel(t, other.Device(), shape{1, 9, 4}).look(ep.Device().ID()))
			}
		}
	}
}

// visit has something echoed.
func visit(t *testing.T, c *stream.Conn) {
	defer c.Close()
	var writer sync.WaitGroup
	defer writer.Wait()
	p := make([]byte, 1+rand.IntN(4000))
	for i := range p {
		p[i] = byte(i)
	}
	writer.Go(func() {
		if _, err := c.Write(p); err == nil && rand.IntN(2) == 0 {
			c.CloseWrite()
		}
	})
	switch rand.IntN(4) {
	case 0:
		c.SetDeadline(time.Now().Add(time.Duration(rand.IntN(2000)) * time.Microsecond))
	case 1:
		time.AfterFunc(time.Duration(rand.IntN(2000))*time.Microsecond, func() { c.Close() })
	}
	q := make([]byte, len(p))
	n, err := io.ReadFull(c, q)
	if !bytes.Equal(q[:n], p[:n]) {
		t.Errorf("%d bytes that are not those that were sent", n)
	}
	if err != nil {
		c.SetDeadline(time.Now())
	}
}
