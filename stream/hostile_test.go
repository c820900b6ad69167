package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/boardtest"
	"github.com/ivshmem-go/ivshmem/stream"
)

// violated checks the error of what a peer spoilt.
func violated(t testing.TB, err error, peer uint32) {
	t.Helper()
	var v *stream.ViolationError
	if !errors.As(err, &v) || v.Peer != peer || v.Field == "" || v.Bound == "" {
		t.Errorf("%v, want a violation by peer %d", err, peer)
	}
}

// triple is an endpoint, a hostile model, and an honest endpoint on a board.
func triple(t testing.TB, output uint64, s shape) (ep *stream.Endpoint, m *model, honest *stream.Endpoint) {
	t.Helper()
	b := boardtest.New(t, boardtest.Config{Peers: 3, Vectors: 2, Output: output})
	ep = newEndpoint(t, b.Device(t, 0, boardtest.Apart), stream.Config{})
	m = newModel(t, b.Device(t, 1, boardtest.Apart), s).start()
	return ep, m, newEndpoint(t, b.Device(t, 2, boardtest.Apart), stream.Config{})
}

// echoes lets a connection of honest peers echo until stop is called, which
// reports what went wrong.
func echoes(t testing.TB, a, b *stream.Endpoint) (stop func()) {
	t.Helper()
	x, y := connect(t, a, b, 99)
	var all sync.WaitGroup
	var ending atomic.Bool
	all.Go(func() {
		io.Copy(y, y)
		y.Close()
	})
	n := 0
	all.Go(func() {
		defer x.Close()
		p, q := make([]byte, 100), make([]byte, 100)
		for ; !ending.Load() || n == 0; n++ {
			p[0] = byte(n)
			x.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := x.Write(p); err != nil {
				t.Error("honest peers:", err)
				return
			}
			if _, err := io.ReadFull(x, q); err != nil || q[0] != byte(n) {
				t.Error("honest peers:", q[0], err)
				return
			}
		}
	})
	return func() {
		ending.Store(true)
		all.Wait()
	}
}

// TestHostileHeader dials a peer with every field of its header at its bounds
// and beyond.
func TestHostileHeader(t *testing.T) {
	const output = 64 << 10
	good := shape{4, 9, 4}
	fits := uint32((output - 128 - 8*16) / (128 + 512))
	for _, c := range []struct {
		name  string
		word  uint64
		value uint64
		want  any // an error, nil: it is well, or "violation"
	}{
		{"magic", 0, 0x6D61657274737668, stream.ErrProtocol},
		{"nothing", 0, 0, stream.ErrProtocol},
		{"version 0", 1, 0, stream.ErrProtocol},
		{"version 2", 1, 2, stream.ErrProtocol},
		{"another epoch", 1, 1 | 77<<32, syscall.EHOSTUNREACH},
		{"no slots", 2, shape{0, 9, 4}.word(), "violation"},
		{"all slots that fit", 2, shape{fits, 9, 4}.word(), nil},
		{"one more", 2, shape{fits + 1, 9, 4}.word(), "violation"},
		{"65536 slots", 2, shape{65536, 9, 4}.word(), "violation"},
		{"65537 slots", 2, shape{65537, 9, 4}.word(), "violation"},
		{"2^32-1 slots", 2, shape{1<<32 - 1, 24, 10}.word(), "violation"},
		{"ring 2^8", 2, shape{4, 8, 4}.word(), "violation"},
		{"ring 2^13", 2, shape{4, 13, 4}.word(), nil},
		{"ring 2^14", 2, shape{4, 14, 4}.word(), "violation"},
		{"ring 2^24", 2, shape{1, 24, 4}.word(), "violation"},
		{"ring 2^25", 2, shape{1, 25, 4}.word(), "violation"},
		{"ring 2^255", 2, shape{1, 255, 4}.word(), "violation"},
		{"events 2^3", 2, shape{4, 9, 3}.word(), "violation"},
		{"events 2^10", 2, shape{4, 9, 10}.word(), nil},
		{"events 2^11", 2, shape{4, 9, 11}.word(), "violation"},
		{"more", 2, good.word() | 1<<48, "violation"},
		{"much more", 2, good.word() | 1<<63, "violation"},
		{"vector 1", 3, 1, nil},
		{"vector 2", 3, 2, "violation"},
		{"vector 2^32-2", 3, 1<<32 - 2, "violation"},
		{"no vector", 3, 1<<32 - 1, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := boardtest.New(t, boardtest.Config{Peers: 3, Vectors: 2, Output: output})
			ep, honest := newEndpoint(t, b.Device(t, 0, boardtest.Apart), stream.Config{}), newEndpoint(t, b.Device(t, 2, boardtest.Apart), stream.Config{})
			stop := echoes(t, ep, honest)
			defer stop()
			m := newModel(t, b.Device(t, 1, boardtest.Apart), good)
			m.prepare()
			if c.word == 1 && c.value>>32 == 0 {
				c.value |= uint64(m.epoch) << 32
			}
			store(m.own, 8*c.word, c.value)
			m.setState(m.epoch)
			wait := 30 * time.Second
			if c.want == nil { // nobody answers
				wait = time.Millisecond
			}
			for range 3 {
				ctx, cancel := context.WithTimeout(t.Context(), wait)
				_, err := ep.Dial(ctx, 1, 7)
				cancel()
				switch want := c.want.(type) {
				case nil:
					if !errors.Is(err, context.DeadlineExceeded) {
						t.Fatalf("%v, want nobody to answer", err)
					}
				case error:
					if !errors.Is(err, want) {
						t.Fatalf("%v, want %v", err, want)
					}
				default:
					violated(t, err, 1)
				}
			}
		})
	}
}

// TestHostileRecords has a connection read what is no record.
func TestHostileRecords(t *testing.T) {
	const valid = 1 << 32
	read := func(c *stream.Conn) error { _, err := c.Read(make([]byte, 8)); return err }
	receive := func(c *stream.Conn) error { _, err := c.Receive(make([]byte, 8)); return err }
	peek := func(c *stream.Conn) error { _, _, err := c.UnsafePeek(); return err }
	all := []func(*stream.Conn) error{read, receive, peek}
	type words map[uint64]uint64 // by position
	for _, c := range []struct {
		name string
		at   words
		by   []func(*stream.Conn) error
	}{
		{"not valid", words{0: 1}, all},
		{"unknown flag", words{0: valid | 1<<37}, all},
		{"highest flag", words{0: valid | 1<<63}, all},
		{"all ones", words{0: 1<<64 - 1}, all},
		{"longer than the ring", words{0: valid | end | 505}, all},
		{"much longer", words{0: valid | end | 1<<32 - 1}, all},
		{"around the end", words{0: valid | 8, 16: valid | 489}, []func(*stream.Conn) error{func(c *stream.Conn) error {
			c.Read(make([]byte, 8))
			return read(c)
		}}},
		{"padding that ends early", words{0: valid | padding | 496}, all},
		{"padding that ends late", words{0: valid | padding | 505}, all},
		{"nothing but padding", words{0: valid | padding | 504}, all},
		{"nothing but nothing", words{0: valid, 8: valid, 16: valid}, []func(*stream.Conn) error{read, receive}},
		{"packed beyond the end", words{0: valid | packed | 505}, all},
		{"packed nothing", words{0: valid | packed}, all},
		{"packed bytes", words{0: valid | packed | 16, 8: 5}, []func(*stream.Conn) error{read, peek}},
		{"packed 1 byte", words{0: valid | packed | 1, 8: 0}, []func(*stream.Conn) error{receive}},
		{"packed 7 bytes", words{0: valid | packed | 7, 8: 0}, []func(*stream.Conn) error{receive}},
		{"packed too long", words{0: valid | packed | 16, 8: 9}, []func(*stream.Conn) error{receive}},
		{"packed without its padding", words{0: valid | packed | 15, 8: 1}, []func(*stream.Conn) error{receive}},
		{"packed 2^64-1", words{0: valid | packed | 16, 8: 1<<64 - 1}, []func(*stream.Conn) error{receive}},
		{"packed 2^64-8", words{0: valid | packed | 16, 8: 1<<64 - 8}, []func(*stream.Conn) error{receive}},
		{"packed 2^63", words{0: valid | packed | 16, 8: 1 << 63}, []func(*stream.Conn) error{receive}},
	} {
		for i, by := range c.by {
			t.Run(fmt.Sprint(c.name, i), func(t *testing.T) {
				ep, m := pair(t, stream.Config{}, shape{4, 9, 4})
				conn, k := accept(t, ep, m, 3)
				for at, x := range c.at {
					if at != 0 {
						store(m.own, m.ringAt(3)+at, x)
					}
				}
				store(m.own, m.ringAt(3), c.at[0])
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				err := by(conn)
				violated(t, err, 1)
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%v, want ECONNRESET", err)
				}
				if _, err := conn.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("write: %v, want ECONNRESET", err)
				}
				if s := ep.Stats(); s.Violations != 1 || s.Resets != 1 {
					t.Errorf("%+v, want one violation and one reset", s)
				}
				conn.Close()
				m.until("the reset", func() bool { return k.o.block(k.peer, 0) == 0 })
			})
		}
	}
}

// TestHostileHead has a connection write while the peer's head is no position.
func TestHostileHead(t *testing.T) {
	for _, head := range []uint64{1, 7, 9, 1 << 20, 1 << 40, 1<<63 - 8, 1 << 63, 1<<64 - 8, 1<<64 - 1} {
		for name, write := range map[string]func(*stream.Conn) error{
			"Write":   func(c *stream.Conn) error { _, err := c.Write(make([]byte, 4096)); return err },
			"Send":    func(c *stream.Conn) error { return c.Send(make([]byte, 4096)) },
			"SendAll": func(c *stream.Conn) error { _, err := c.SendAll(make([][]byte, 4096)); return err },
			"UnsafeReserve": func(c *stream.Conn) (err error) {
				for err == nil {
					if _, err = c.UnsafeReserve(100); err == nil {
						c.UnsafeCommit(100)
					}
				}
				return err
			},
		} {
			t.Run(fmt.Sprintf("%s/%#x", name, head), func(t *testing.T) {
				ep, m := pair(t, stream.Config{Ring: 512}, shape{4, 9, 4})
				c, _ := accept(t, ep, m, 0)
				m.set(0, 8, head)
				c.SetDeadline(time.Now().Add(20 * time.Second))
				err := write(c)
				violated(t, err, 1)
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%v, want ECONNRESET", err)
				}
				c.Close()
			})
		}
	}
	t.Run("back", func(t *testing.T) {
		ep, m := pair(t, stream.Config{Ring: 512}, shape{4, 9, 4})
		c, k := accept(t, ep, m, 0)
		for range 50 { // until it has seen some of it
			if _, err := c.Write(make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
			for n := 0; n < 100; {
				_, p := k.next()
				n += len(p)
			}
		}
		m.set(0, 8, 8)
		c.SetDeadline(time.Now().Add(20 * time.Second))
		_, err := c.Write(make([]byte, 4096))
		violated(t, err, 1)
		c.Close()
	})
}

// TestHostileEvents lets counters jump and events name what there is not.
func TestHostileEvents(t *testing.T) {
	ep, m, honest := triple(t, 64<<10, shape{8, 9, 4})
	stop := echoes(t, ep, honest)
	for range 20 {
		for _, e := range []uint64{0, 8, 9, 1<<32 - 1, 1 << 32, 1<<64 - 1} {
			for i := range m.e {
				store(m.own, 128+8*i, e)
			}
			for _, n := range []uint64{m.events + 1, m.events + m.e, m.events + m.e + 1, 1 << 40, 1<<64 - 1, 1 << 63, 0, m.events} {
				store(m.own, 64, n)
				m.ring(0)
				runtime.Gosched()
			}
		}
		m.events = rand.Uint64() // not one that was seen already
		c, k := accept(t, ep, m, 3)
		k.record(0, []byte("x"))
		if n, err := c.Read(make([]byte, 2)); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		k.free()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
		c.Close()
	}
	stop()
	free(t, m.look(0))
}

// TestHostileAnswers answers a dial by everything but an answer, and then by
// one.
func TestHostileAnswers(t *testing.T) {
	ep, m := pair(t, stream.Config{}, shape{8, 9, 4})
	type result struct {
		c   *stream.Conn
		err error
	}
	dialed := make(chan result, 1)
	go func() {
		c, err := ep.Dial(t.Context(), 1, 9)
		dialed <- result{c, err}
	}()
	o, from := m.incoming(0)
	id := o.block(from, 0)
	for _, c := range []struct {
		id          uint64
		state, peer uint32
		slot, epoch uint32
	}{
		{id + 1, 2, 0, from, o.epoch}, {id, 2, 1, from, o.epoch}, {id, 2, 0, from + 1, o.epoch}, {id, 2, 0, o.n, o.epoch},
		{id, 2, 0, 1<<32 - 1, o.epoch}, {id, 2, 0, from, o.epoch + 1}, {id, 0, 0, from, o.epoch}, {id, 5, 0, from, o.epoch},
		{id, 1<<32 - 1, 0, from, o.epoch}, {0, 2, 0, from, o.epoch}, {id, 4, 0, from, o.epoch},
	} {
		m.take(2, c.id, c.state, c.peer, uint64(c.slot)|9<<32, c.epoch)
		m.event(0, 2)
		m.set(2, 0, 0)
		m.event(0, 2)
	}
	// A dial that comes in shows that all of it was seen.
	a, k := accept(t, ep, m, 3)
	select {
	case r := <-dialed:
		t.Fatal("dialed:", r)
	default:
	}
	m.answer(o, from, 2, 2)
	r := <-dialed
	if r.err != nil {
		t.Fatal(r.err)
	}
	// A second answer, on another slot, is nobody's, as is one to the own dial.
	m.answer(o, from, 5, 2)
	m.answer(o, from, 6, 3)
	m.take(4, k.id, 2, 0, uint64(k.peer)|7<<32, o.epoch)
	store(m.own, m.ringAt(4), 1|1<<32)
	m.event(0, 4)
	b, k2 := accept(t, ep, m, 7)
	k.record(0, []byte("right"))
	if p := make([]byte, 9); must(a.Read(p)) != 5 || string(p[:5]) != "right" {
		t.Errorf("read %q", p)
	}
	for _, c := range []*stream.Conn{a, b, r.c} {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		c.Close()
	}
	k.free()
	k2.free()
	m.set(2, 0, 0)
	m.event(0, 2)
	free(t, o)
}

// TestHostileDials dials from more slots than the endpoint has, where nobody
// listens, and where nobody accepts: others still get through.
func TestHostileDials(t *testing.T) {
	for _, port := range []uint32{5, 7} {
		t.Run(fmt.Sprint(port), func(t *testing.T) {
			ep, m, honest := triple(t, 256<<10, shape{300, 9, 10})
			l, err := ep.Listen(7)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if m.n < uint32(ep.Slots()) {
				t.Fatalf("%d slots", ep.Slots())
			}
			for round := range 20 {
				for slot := range m.n {
					m.knock(0, slot, port)
					m.event(0, slot)
				}
				if round%4 == 3 {
					stop := echoes(t, honest, ep)
					stop()
				}
			}
			m.setState(0)
			l.Close()
			free(t, m.look(0))
		})
	}
}

// TestHostileStorm writes what is random, or nearly right, all over an area, as
// fast as it goes, with State and doorbells, beside peers that are honest.
func TestHostileStorm(t *testing.T) {
	ep, m, honest := triple(t, 64<<10, shape{16, 9, 4})
	l, err := ep.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	var users sync.WaitGroup
	use := func(c *stream.Conn) {
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Duration(rand.IntN(20)) * time.Millisecond))
		p := make([]byte, 700)
		for i := 0; ; i++ {
			var err error
			switch rand.IntN(5) {
			case 0:
				_, err = c.Read(p)
			case 1:
				_, err = c.Receive(p)
			case 2:
				_, err = c.Write(p[:rand.IntN(len(p))])
			case 3:
				_, err = c.SendAll([][]byte{p[:rand.IntN(100)], p[:10]})
			case 4:
				if _, _, err = c.UnsafePeek(); err == nil {
					err = c.UnsafeRelease()
				}
			}
			if err != nil && !errors.Is(err, io.ErrShortBuffer) {
				return
			}
		}
	}
	users.Go(func() {
		for {
			c, err := l.AcceptStream()
			if err != nil {
				return
			}
			users.Go(func() { use(c) })
		}
	})
	var ending atomic.Bool
	users.Go(func() {
		for !ending.Load() {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Millisecond)
			c, err := ep.Dial(ctx, 1, 9)
			cancel()
			if err == nil {
				use(c)
			}
		}
	})
	stop := echoes(t, ep, honest)
	deadline := time.Now().Add(time.Second)
	o := m.look(0)
	for range 2 {
		users.Go(func() {
			r := rand.New(rand.NewPCG(rand.Uint64(), 1))
			size := uint64(len(m.own))
			for time.Now().Before(deadline) {
				slot := r.Uint32N(m.n)
				switch r.IntN(12) {
				case 0:
					store(m.own, 8*r.Uint64N(size/8), r.Uint64()>>r.Uint64N(64))
				case 1:
					store(m.own, 64, load(m.own, 64)+r.Uint64N(2*m.e))
				case 2:
					store(m.own, 128+8*r.Uint64N(m.e), r.Uint64N(uint64(m.n)+2))
				case 3, 4: // a dial
					m.take(slot, uint64(m.epoch)<<32|uint64(1+r.Uint32N(50)), 1, 0, 7<<32, o.epoch)
				case 5: // an answer
					from := r.Uint32N(o.n)
					m.take(slot, o.block(from, 0), 2+r.Uint32N(2), 0, uint64(from)|9<<32, o.epoch)
				case 6:
					m.set(slot, 1, r.Uint64N(6))
				case 7:
					m.set(slot, 8, 8*r.Uint64N(600))
				case 8: // records
					for at := m.ringAt(slot); at < m.ringAt(slot)+m.r; at += 8 {
						store(m.own, at, 1<<32|r.Uint64N(32)<<32|r.Uint64N(100))
					}
				case 9:
					if r.IntN(50) == 0 {
						m.dev.SetState(m.epoch * r.Uint32N(2))
					}
					store(m.own, 8, 1|uint64(m.epoch)<<32)
					store(m.own, 0, 0x6D61657274737669)
					store(m.own, 16, shape{16, 9, 4}.word())
					store(m.own, 24, r.Uint64N(2))
				case 10:
					m.set(slot, 4+r.Uint64N(2), 8*r.Uint64N(600))
				}
				m.dev.Ring(0, r.IntN(2))
			}
		})
	}
	for time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	stop = echoes(t, honest, ep) // who comes now gets through
	stop()
	ending.Store(true)
	l.Close()
	m.setState(0)
	users.Wait()
	free(t, o)
	if s := ep.Stats(); s.Resets == 0 {
		t.Errorf("%+v: nothing happened", s)
	}
}

// TestHostileCircle leaves a ring of nothing but records behind: what a reader
// gets of a peer that is gone has an end.
func TestHostileCircle(t *testing.T) {
	ep, m := pair(t, stream.Config{}, shape{4, 9, 4})
	c, _ := accept(t, ep, m, 0)
	for at := uint64(512); at > 0; at -= 16 {
		store(m.own, m.ringAt(0)+at-16, 8|1<<32|end)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	for range 1000 {
		if n, err := c.Receive(make([]byte, 8)); n != 8 || err != nil {
			t.Fatal(n, err)
		}
	}
	m.setState(0)
	for {
		if _, err := c.Receive(make([]byte, 8)); err != nil {
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%v, want ECONNRESET", err)
			}
			break
		}
	}
	c.Close()
}

// TestOneDoorbell has many slots answered at a time: that rings once.
func TestOneDoorbell(t *testing.T) {
	ep, m := pair(t, stream.Config{Ring: 512}, shape{40, 9, 6})
	m.vector = 1
	m.setState(0)
	m.start()
	before := ep.Stats().Doorbells
	var calls []*call
	for slot := range m.n {
		calls = append(calls, m.knock(0, slot, 5))
		m.write(m.events, 0, slot)
		m.events++
	}
	store(m.own, 64, m.events)
	m.ring(0)
	for _, k := range calls {
		m.find(k.o, k.id)
	}
	// Another call comes behind the doorbells for those.
	if rung := ep.Stats().Doorbells - before; rung > 5 {
		t.Errorf("%d doorbells for %d answers at a time", rung, len(calls))
	}
}
