package stream_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/boardtest"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/stream"
)

// newEndpoint makes an endpoint that ends with the test.
func newEndpoint(t testing.TB, d *ivshmem.Device, c stream.Config) *stream.Endpoint {
	t.Helper()
	ep, err := stream.New(d, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ep.Close() })
	return ep
}

// pair is an endpoint, peer 0, and a model, peer 1, on a board.
func pair(t testing.TB, c stream.Config, s shape) (*stream.Endpoint, *model) {
	t.Helper()
	b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 2, Output: 64 << 10})
	ep := newEndpoint(t, b.Device(t, 0, boardtest.Apart), c)
	return ep, newModel(t, b.Device(t, 1, boardtest.Apart), s).start()
}

// accept lets the model dial the endpoint.
func accept(t testing.TB, ep *stream.Endpoint, m *model, slot uint32) (*stream.Conn, *call) {
	t.Helper()
	l, err := ep.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	call, ok := m.dial(ep.Device().ID(), slot, 7)
	if !ok {
		t.Fatal("refused")
	}
	c, err := l.AcceptStream()
	if err != nil {
		t.Fatal(err)
	}
	return c, call
}

// dial lets the endpoint dial the model.
func dial(t testing.TB, ep *stream.Endpoint, m *model, slot uint32) (*stream.Conn, *call) {
	t.Helper()
	calls := make(chan *call, 1)
	go func() {
		o, peerSlot := m.incoming(ep.Device().ID())
		calls <- m.answer(o, peerSlot, slot, 2)
	}()
	c, err := ep.Dial(t.Context(), m.dev.ID(), 9)
	if err != nil {
		t.Fatal(err)
	}
	return c, <-calls
}

var roles = map[string]func(testing.TB, *stream.Endpoint, *model, uint32) (*stream.Conn, *call){"accepts": accept, "dials": dial}

// free waits until all slots of an endpoint are, by its own area.
func free(t testing.TB, o other) {
	t.Helper()
	until(t, "free slots", func() bool {
		for slot := range o.n {
			if o.block(slot, 0) != 0 {
				return false
			}
		}
		return true
	})
}

// TestWire exchanges every kind of record with the model, at every alignment
// and around the end of rings of different sizes, in both roles.
func TestWire(t *testing.T) {
	kinds := map[string]link.Config{
		"output": {Peers: 2, Vectors: 2, Output: 128 << 10},
		"rw":     {Peers: 3, Vectors: 1, ReadWrite: 300<<10 + 4096},
	}
	shapes := []struct {
		ring  uint64
		model shape
	}{
		{512, shape{1, 9, 4}}, {512, shape{40, 9, 10}}, {1024, shape{3, 14, 5}}, {32 << 10, shape{2, 15, 6}}, {4096, shape{16, 12, 7}},
	}
	for kind, l := range kinds {
		for role, connect := range roles {
			for _, s := range shapes {
				t.Run(fmt.Sprint(kind, "/", role, "/", s.ring, s.model), func(t *testing.T) {
					devices := ivshmemtest.Peers(t, l)
					ep := newEndpoint(t, devices[0], stream.Config{Ring: s.ring})
					m := newModel(t, devices[1], s.model).start()
					c, k := connect(t, ep, m, s.model.n-1)
					exchange(t, c, k)
					free(t, k.o)
				})
			}
		}
	}
}

func exchange(t *testing.T, c *stream.Conn, k *call) {
	r := rand.New(rand.NewPCG(1, uint64(k.m.r)))
	most := int(k.m.r)/2 - 16
	// Bytes to the endpoint, in records of all sizes, with padding here and there.
	sent := make(chan []byte, 1)
	var writer sync.WaitGroup
	writer.Go(func() {
		var all []byte
		for n := range 600 {
			p := make([]byte, min(n%200, k.room(), most))
			for i := range p {
				p[i] = byte(1 + (len(all)+i)%251)
			}
			all = append(all, p...)
			k.record(0, p)
			if n%17 == 0 && k.room() < most {
				k.pad()
			}
		}
		sent <- all
		k.record(end, []byte{0})
	})
	var got []byte
	for !bytes.HasSuffix(got, []byte{0}) {
		p := make([]byte, 1+r.IntN(300))
		n, err := c.Read(p)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, p[:n]...)
	}
	if want := <-sent; !bytes.Equal(got[:len(got)-1], want) {
		t.Fatalf("%d bytes that are not those that were sent, %d", len(got)-1, len(want))
	}
	writer.Wait()
	// Messages to the endpoint: in one record, in many, packed.
	var messages [][]byte
	for n := range 300 {
		messages = append(messages, bytes.Repeat([]byte{byte(n)}, n*7%(most*3/4)))
	}
	plain := messages
	writer.Go(func() {
		for i := 0; i < len(plain); {
			if i%3 == 0 { // what fits, packed
				var p []byte
				for i < len(plain) && len(p)+8+int(up(len(plain[i]))) <= min(most, k.room(), 16384) {
					p = binary.LittleEndian.AppendUint64(p, uint64(len(plain[i])))
					p = append(p, plain[i]...)
					p = append(p, make([]byte, int(up(len(p)))-len(p))...)
					i++
				}
				if len(p) > 0 {
					k.record(packed, p)
					continue
				}
			}
			for p, done := plain[i], false; !done; {
				n := min(len(p), 1+r.IntN(most), k.room())
				done = n == len(p)
				flags := uint64(0)
				if done {
					flags = end
				}
				k.record(flags, p[:n])
				p = p[n:]
			}
			i++
		}
	})
	buf := make([]byte, most)
	for i, want := range messages {
		n, err := c.Receive(buf)
		if err != nil || !bytes.Equal(buf[:n], want) {
			t.Fatalf("message %d: %d bytes, %v, want %d", i, n, err, len(want))
		}
	}
	// From the endpoint, one by one, many at once, without copies.
	failed := make(chan error, 1)
	writer.Wait()
	go func() {
		for _, p := range plain[:100] {
			if err := c.Send(p); err != nil {
				failed <- err
				return
			}
		}
		if _, err := c.SendAll(plain[100:]); err != nil {
			failed <- err
			return
		}
		for n := range 128 {
			p, err := c.UnsafeReserve(n)
			if err != nil {
				failed <- err
				return
			}
			for i := range p {
				p[i] = byte(n)
			}
			c.UnsafeCommit(n)
		}
		_, err := c.Write([]byte("bytes"))
		c.CloseWrite()
		failed <- err
	}()
	for n := range 128 {
		messages = append(messages, bytes.Repeat([]byte{byte(n)}, n))
	}
	for i := 0; i < len(messages); {
		for _, p := range k.messages() {
			if !bytes.Equal(p, messages[i]) {
				t.Fatalf("message %d has %d bytes, want %d", i, len(p), len(messages[i]))
			}
			i++
		}
	}
	var tail []byte
	for {
		flags, p := k.next()
		if flags&last != 0 {
			break
		}
		tail = append(tail, p...)
	}
	if err := <-failed; err != nil || string(tail) != "bytes" {
		t.Fatalf("%q, %v", tail[max(0, len(tail)-20):], err)
	}
	// The end.
	k.record(0, []byte("last words"))
	k.close()
	if p, err := io.ReadAll(c); err != nil || string(p) != "last words" {
		t.Fatalf("%q, %v", p, err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write behind the end: %v, want EPIPE", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	k.m.until("the other to close", k.over)
	k.free()
}

// TestCloseOrders closes both ends in each order, with and without a half
// close, and uses every slot again.
func TestCloseOrders(t *testing.T) {
	for role, connect := range roles {
		t.Run(role, func(t *testing.T) {
			ep, m := pair(t, stream.Config{Ring: 4096}, shape{4, 9, 4})
			o := m.look(0)
			for i := range 100 {
				c, k := connect(t, ep, m, uint32(i)%4)
				switch i % 4 {
				case 0: // the endpoint first
					c.Close()
					m.until("a close", k.over)
					if k.close(); o.block(k.peer, 0) == k.id {
						m.until("a free slot", func() bool { return o.block(k.peer, 0) != k.id })
					}
					k.free()
				case 1: // the model first
					k.close()
					if _, err := c.Read(make([]byte, 1)); err != io.EOF {
						t.Fatalf("read: %v, want EOF", err)
					}
					c.Close()
					m.until("a close", k.over)
					k.free()
				case 2: // the model, without a word
					k.free()
					if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
						t.Fatalf("read: %v, want ECONNRESET", err)
					}
					c.Close()
				case 3: // one way first
					c.CloseWrite()
					if flags, _ := k.next(); flags != last {
						t.Fatalf("record %#x", flags)
					}
					k.record(0, []byte("x"))
					k.record(last, nil)
					if p, err := io.ReadAll(c); string(p) != "x" || err != nil {
						t.Fatalf("%q, %v", p, err)
					}
					c.Close()
					m.until("a close", k.over)
					k.close()
					k.free()
				}
				m.until("a free slot", func() bool { return o.block(k.peer, 0) != k.id })
			}
			free(t, o)
		})
	}
}

// TestRefused has dials refused in both directions, and given up.
func TestRefused(t *testing.T) {
	ep, m := pair(t, stream.Config{Ring: 4096}, shape{4, 9, 4})
	for i := range 50 {
		if _, ok := m.dial(0, uint32(i%4), 7); ok {
			t.Fatal("connected where nobody listens")
		}
		answered := make(chan *call, 1)
		go func() {
			o, slot := m.incoming(0)
			answered <- m.answer(o, slot, 1, 3)
		}()
		if _, err := ep.Dial(t.Context(), 1, 9); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("dial: %v, want ECONNREFUSED", err)
		}
		k := <-answered
		m.until("the slot to be given back", func() bool { return k.o.block(k.peer, 0) != k.id })
		k.free()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		if _, err := ep.Dial(ctx, 1, 9); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("dial: %v, want a deadline", err)
		}
		cancel()
	}
	free(t, m.look(0))
}

// TestSlots has one peer take all slots but the last, which is for refusals.
func TestSlots(t *testing.T) {
	ep, m := pair(t, stream.Config{Ring: 4096}, shape{100, 9, 4})
	var conns []*stream.Conn
	for len(conns) < ep.Slots()-1 {
		c, _ := accept(t, ep, m, uint32(len(conns)))
		conns = append(conns, c)
	}
	l, err := ep.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, ok := m.dial(0, m.n-1, 7); ok {
		t.Error("connected without a slot")
	}
	m.setState(0)
	for _, c := range conns {
		c.Close()
	}
	m.start()
	free(t, m.look(0))
}

// TestRestart replaces a peer by another with the same ID at moments when the
// endpoint has something with it.
func TestRestart(t *testing.T) {
	ep, m := pair(t, stream.Config{Ring: 4096}, shape{4, 12, 4})
	o := m.look(0)
	reset := func(err error) {
		t.Helper()
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("%v, want ECONNRESET", err)
		}
	}
	for range 20 {
		// In the middle of a dial.
		failed := make(chan error, 1)
		go func() {
			_, err := ep.Dial(t.Context(), 1, 9)
			failed <- err
		}()
		m.incoming(0)
		m.start()
		reset(<-failed)
		// Blocked in reading and writing, and with data that nobody read.
		var conns []*stream.Conn
		var calls []*call
		for slot := range uint32(3) {
			c, k := accept(t, ep, m, slot)
			conns, calls = append(conns, c), append(calls, k)
		}
		calls[2].record(0, []byte("x"))
		for i, f := range []func() error{
			func() error { _, err := conns[0].Read(make([]byte, 1)); return err },
			func() error { _, err := conns[1].Write(make([]byte, 1<<20)); return err },
		} {
			go func() { failed <- f() }()
			m.until("a sleeper", func() bool { return o.block(calls[i].peer, 4+uint64(i)) != 0 })
		}
		m.start()
		reset(<-failed)
		reset(<-failed)
		for _, c := range conns {
			_, err := c.Read(make([]byte, 1))
			reset(err)
			c.Close()
		}
		// The successor is a peer like any other.
		c, k := accept(t, ep, m, 0)
		k.record(0, []byte("x"))
		if p := make([]byte, 2); must(c.Read(p)) != 1 || p[0] != 'x' {
			t.Fatalf("read %q", p)
		}
		c.Close()
		k.close()
		k.free()
		free(t, o)
	}
}

// TestRestartOtherShape lets a peer die whose last words were not all read,
// and another with rings of another size write over them: none of it may be
// read as the former's.
func TestRestartOtherShape(t *testing.T) {
	b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 2, Output: 64 << 10})
	ep := newEndpoint(t, b.Device(t, 0, boardtest.Apart), stream.Config{})
	m := newModel(t, b.Device(t, 1, boardtest.Apart), shape{32, 9, 4}).start()
	c, k := accept(t, ep, m, 31)
	k.record(0, []byte("one"))
	k.record(0, []byte("two"))
	p := make([]byte, 3)
	if must(c.Read(p)) != 3 || string(p) != "one" {
		t.Fatalf("read %q", p)
	}
	b.SetState(1, 0)
	// A successor that knows nothing of the slot, nor of the former's rings.
	store(m.own, 8, 0)
	copy(m.own[k.m.ringAt(31)+k.head:][24:], "six")
	if n, err := c.Read(p); err == nil {
		t.Errorf("read %q, a successor's bytes", p[:n])
	}
	c.Close()
}

// TestPackedLastWords lets a peer die behind a packed record of which a message
// was read: the others are there, too.
func TestPackedLastWords(t *testing.T) {
	b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 2, Output: 64 << 10})
	ep := newEndpoint(t, b.Device(t, 0, boardtest.Apart), stream.Config{})
	m := newModel(t, b.Device(t, 1, boardtest.Apart), shape{4, 9, 4}).start()
	c, k := accept(t, ep, m, 0)
	var p []byte
	for i := range byte(3) {
		p = binary.LittleEndian.AppendUint64(p, 1)
		p = append(p, i, 0, 0, 0, 0, 0, 0, 0)
	}
	k.record(packed, p)
	for i := range byte(3) {
		if n, err := c.Receive(p); n != 1 || err != nil || p[0] != i {
			t.Fatalf("message %d: %d bytes, %v", i, n, err)
		}
		if i == 0 {
			b.SetState(1, 0)
			until(t, "the death to be seen", func() bool {
				_, err := c.Write(nil)
				return errors.Is(err, syscall.ECONNRESET)
			})
		}
	}
	if _, err := c.Receive(p); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("behind the end: %v, want ECONNRESET", err)
	}
	c.Close()
}
