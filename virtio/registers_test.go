package virtio_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/entropy"
)

// frontEnd is the raw other end of a served device, READY.
func frontEnd(t testing.TB, b *board) *linux {
	t.Helper()
	l := newLinux(t, b)
	until(t, "the back-end is ready", l.ready)
	l.p = b.Attach(t, 1, apart)
	l.register(regs.State, 1)
	l.initMemory(uint64(get32(l.m, 4)))
	return l
}

// put writes a register and waits for the answer.
func (l *linux) put(at, width, v uint64) {
	l.Helper()
	if err := l.write(at, width, v); err != nil {
		l.Fatalf("register %#x: %v", at, err)
	}
	if err := l.idle(); err != nil {
		l.Fatalf("register %#x: %v", at, err)
	}
}

// shows checks bytes of the register block, in hexadecimal.
func (l *linux) shows(what string, at int, want string) {
	l.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(want, " ", ""))
	if err != nil {
		l.Fatal(err)
	}
	if got := l.m[at : at+len(b)]; !bytes.Equal(got, b) {
		l.Errorf("%s: at %02x: % x, want % x", what, at, got, b)
	}
}

// accept negotiates features up to FEATURES_OK.
func (l *linux) acceptFeatures(f uint64) {
	l.Helper()
	for _, w := range [][3]uint64{{0x44, 4, 0}, {0x44, 4, 1}, {0x44, 4, 3},
		{0x18, 4, 1}, {0x14, 4, f >> 32}, {0x18, 4, 0}, {0x14, 4, f & (1<<32 - 1)}, {0x44, 4, 0xb}} {
		l.put(w[0], w[1], w[2])
	}
	l.features = f
}

const modern = 1<<32 | 1<<33

// The block is byte for byte what the page says, at the start, for each selector,
// and after a reset.
func TestRegisters(t *testing.T) {
	b := newBoard(t, protocol, 0x2000, 3)
	for i := range b.ReadWrite() {
		b.ReadWrite()[i] = 0xee
	}
	d := echo(8, 64)
	d.Config = []byte{1, 2, 3, 4, 5}
	d.Features = 1<<9 | 1<<50
	s := serve(t, b.Device(t, 0, apart), d)
	l := frontEnd(t, b)
	fresh := func(what string) {
		t.Helper()
		l.shows(what, 0x00, "01000000 58000000 00000000 00020030 00000000 00000000 00000000 00000000")
		l.shows(what, 0x20, "0800 0100 0000 0000 0000000000000000 0000000000000000 0000000000000000")
		l.shows(what, 0x40, "00 00 0000 00000000 00000000 0102030405 00000000000000 eeee")
	}
	fresh("at the start")
	l.put(0x10, 4, 1)
	l.shows("high features", 0x0c, "13000400 01000000")
	l.put(0x10, 4, 7)
	l.shows("no features", 0x0c, "00000000")
	l.put(0x10, 4, 0)
	l.shows("low features", 0x0c, "00020030")
	l.put(0x1c, 4, 1)
	l.shows("queue 1", 0x20, "4000 0200 0000 0000 0000000000000000")
	l.put(0x20, 2, 16)
	l.put(0x24, 2, 2)
	l.put(0x28, 8, 0x1000)
	l.put(0x30, 8, 0x1100)
	l.put(0x38, 8, 0x1140)
	for _, sel := range []uint64{2, 3, 1 << 31, 1<<32 - 1} {
		l.put(0x1c, 4, sel)
		l.shows("no queue", 0x20, strings.Repeat("00", 0x20))
		l.put(0x26, 2, 1) // has no effect
	}
	l.put(0x1c, 4, 0)
	l.shows("queue 0", 0x20, "0800 0100 0000 0000 0000000000000000")
	l.put(0x1c, 4, 1)
	l.shows("queue 1 again", 0x20, "1000 0200 0200 0000 0010000000000000 0011000000000000 4011000000000000")
	l.acceptFeatures(modern) // resets first
	l.put(0x1c, 4, 1)
	l.put(0x20, 2, 16)
	l.put(0x28, 8, 0x1000)
	l.put(0x30, 8, 0x1100)
	l.put(0x38, 8, 0x1140)
	l.put(0x26, 2, 1)
	l.put(0x1c, 4, 0)
	l.put(0x1c, 4, 1)
	l.shows("queue 1, enabled", 0x20, "1000 0200 0000 0100 0010")
	l.put(0x26, 4, 0) // as Linux does, over half of queue_desc
	l.put(0x1c, 4, 1)
	l.shows("queue 1, disabled", 0x20, "4000 0200 0000 0000 0000000000000000")

	for _, at := range []uint64{0x01, 0x04, 0x08, 0x0c, 0x40, 0x42, 0x48, 0x4c, 0x53, 0x58, 0x1000, 1<<32 - 1} {
		put32(l.m, 8, uint32(at)) // announced without anything written
		l.ring(0)
		until(t, fmt.Sprintf("an answer to %#x", at), func() bool { return get32(l.m, 8) == 0 })
	}
	l.put(0x4c, 4, 0xffffffff) // nobody asked for that
	l.shows("configuration", 0x4c, "0102030405")
	put8(l.m, 0x40, 1)
	put8(l.m, 0x41, 1)
	l.put(0x44, 4, 0)
	fresh("after a reset")

	// The next driver finds nothing of this one.
	l.put(0x1c, 4, 1)
	l.register(regs.State, 0)
	until(t, "the back-end begins anew", func() bool { return get32(l.m, 0x1c) == 0 && l.ready() })
	fresh("for the next driver")
	if n := s.Stats(); n.Violations != 0 || n.Sessions != 0 || b.Rung(1) != 0 {
		t.Errorf("%+v, rung %v", n, b.Rung(1))
	}
}

// The back-end waits for the front-end to be gone before it shows the block, and
// follows it whatever its states are.
func TestStates(t *testing.T) {
	b := newBoard(t, protocol, 0x2000, 1)
	l := newLinux(t, b)
	l.p = b.Attach(t, 1, apart)
	l.register(regs.State, 1)
	s := serve(t, b.Device(t, 0, apart), echo(8))
	l.register(regs.State, 7)
	time.Sleep(time.Millisecond) // gives it time to do wrong
	if l.ready() {
		t.Error("ready before the last driver is gone")
	}
	l.register(regs.State, 0)
	until(t, "ready", l.ready)
	l.register(regs.State, 5) // not ready, and not there
	l.put(0x1c, 4, 3)
	l.register(regs.State, 1)
	l.put(0x1c, 4, 2)
	l.register(regs.State, 2)
	until(t, "not ready", func() bool { return !l.ready() })
	l.register(regs.State, 0)
	until(t, "ready again", l.ready)
	if err := s.stop(); err != nil || l.ready() {
		t.Errorf("%v, ready %v after the end", err, l.ready())
	}
}

// A session is from DRIVER_OK to a reset, or what is none.
func TestSessions(t *testing.T) {
	for name, end := range map[string]func(l *linux){
		"reset":      func(l *linux) { l.put(0x44, 4, 0) },
		"failed":     func(l *linux) { l.put(0x44, 4, 0x8f) },
		"not ok":     func(l *linux) { l.put(0x44, 4, 0x0b) },
		"left":       func(l *linux) { l.register(regs.State, 0) },
		"died":       func(l *linux) { l.b.Kill(1) },
		"disabled":   func(l *linux) { l.put(0x1c, 4, 0); l.put(0x26, 4, 0) },
		"many loops": func(l *linux) { l.put(0x44, 4, 0); l.put(0x44, 4, 0); l.put(0x44, 4, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBoard(t, protocol, 0x2000, 2)
			began, ended := make(chan *virtio.Chain, 1), make(chan error, 1)
			d := virtio.Device{ID: 4, Queues: []int{8}, Run: func(ctx context.Context, s *virtio.Session) error {
				c, err := s.Queue(0).Next(ctx)
				if err != nil {
					return err
				}
				began <- c
				<-ctx.Done()
				var p [1]byte
				_, rerr := c.ReadAt(p[:], 0)
				_, werr := c.WriteAt(p[:], 0)
				perr := s.Queue(0).Push(c, 0)
				_, nerr := s.Queue(0).TryNext()
				for _, err := range []error{rerr, werr, perr, nerr} {
					if !errors.Is(err, virtio.ErrReset) {
						t.Errorf("%v, want ErrReset", err)
					}
				}
				ended <- nil
				return errors.New("it does not matter")
			}}
			s := serve(t, b.Device(t, 0, apart), d)
			l := newLinux(t, b)
			if err := l.again(1); err != nil {
				t.Fatal(err)
			}
			q := l.queues[0]
			l.mu.Lock()
			if _, err := q.add([][]byte{{1}}, 1); err != nil {
				t.Fatal(err)
			}
			q.kick()
			l.mu.Unlock()
			<-began
			used := get32(l.m, q.used)
			end(l)
			<-ended
			l.halt()
			if get32(l.m, q.used) != used {
				t.Error("used after the end")
			}
			if err := s.stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// What Run fails with ends Serve, and its return without error does not.
func TestRunFails(t *testing.T) {
	for _, want := range []error{nil, errors.New("out of paper")} {
		b := newBoard(t, protocol, 0x2000, 2)
		d := virtio.Device{ID: 4, Queues: []int{8}, Run: func(ctx context.Context, s *virtio.Session) error { return want }}
		dev := b.Device(t, 0, apart)
		back, err := virtio.NewBackEnd(dev, d)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- back.Serve(ctx) }()
		l := newLinux(t, b)
		if err := l.again(1); err != nil {
			t.Fatal(err)
		}
		if want == nil {
			until(t, "a session", func() bool { return back.Stats().Sessions == 1 })
			l.remove()
			if err := l.again(1); err != nil {
				t.Fatal(err)
			}
			until(t, "a second session", func() bool { return back.Stats().Sessions == 2 })
			cancel()
		}
		if err := <-ended; !errors.Is(err, want) || l.ready() {
			t.Errorf("Serve: %v, want %v; ready %v", err, want, l.ready())
		}
		cancel()
		l.remove()
	}
}

// The end of Serve ends a session in which nothing happens.
func TestServeEndsSession(t *testing.T) {
	b := newBoard(t, protocol, 0x2000, 2)
	s := serve(t, b.Device(t, 0, apart), echo(8))
	l := newLinux(t, b)
	if err := l.again(1); err != nil {
		t.Fatal(err)
	}
	until(t, "the device waits for a buffer", func() bool { return s.Stats().Sessions == 1 && !s.Guarding() })
	ended := make(chan error, 1)
	go func() { ended <- s.stop() }()
	until(t, "Serve ends", func() bool { return len(ended) == 1 })
	if err := <-ended; err != nil || l.ready() {
		t.Errorf("%v, ready %v", err, l.ready())
	}
	l.remove()
}

// Serve says why it ends.
func TestServeEnds(t *testing.T) {
	b := newBoard(t, protocol, 0x2000, 2)
	dev := b.Device(t, 0, apart)
	s := serve(t, dev, echo(8))
	until(t, "ready", func() bool { return newLinux(t, b).ready() })
	if err := s.Serve(t.Context()); err == nil {
		t.Error("served twice")
	}
	back, err := virtio.NewBackEnd(b.Device(t, 0, apart), echo(8))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- back.Serve(context.Background()) }()
	until(t, "ready", func() bool { return newLinux(t, b).ready() })
	back.Device().Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// Drivers that accept too little or too much do not get a session, but a request
// for a reset.
func TestFeatures(t *testing.T) {
	for _, c := range []struct {
		name     string
		features uint64
		ok       bool
	}{
		{"least", modern, true},
		{"all", modern | 1<<36 | 3<<28 | 1<<9, true},
		{"legacy", 1 << 33, false},
		{"guest-physical addresses", 1 << 32, false},
		{"packed rings", modern | 1<<34, false},
		{"of the device, not offered", modern | 1<<8, false},
		{"none", 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBoard(t, protocol, 0x2000, 2)
			d := echo(8)
			d.Features = 1 << 9
			s := serve(t, b.Device(t, 0, apart), d)
			l := frontEnd(t, b)
			l.acceptFeatures(c.features)
			if ok := get32(l.m, 0x44) == 0xb; ok != c.ok {
				t.Errorf("status %#x after FEATURES_OK", get32(l.m, 0x44))
			}
			// Changes after that do not count.
			l.put(0x14, 4, 1<<34>>32)
			l.put(0x44, 4, 0xf)
			if c.ok {
				until(t, "a session", func() bool { return s.Stats().Sessions == 1 })
				if get32(l.m, 0x44) != 0xf {
					t.Errorf("status %#x", get32(l.m, 0x44))
				}
				return
			}
			if n := s.Stats(); n.Violations != 1 || n.Sessions != 0 {
				t.Errorf("%+v", n)
			}
			if get32(l.m, 0x44) != 0x4f && get32(l.m, 0x44) != 0x47 || get8(l.m, 0x40) != 1 || b.Doorbells(1, 0) == 0 {
				t.Errorf("status %#x, configuration event %d", get32(l.m, 0x44), get8(l.m, 0x40))
			}
			l.acceptFeatures(modern)
			l.put(0x44, 4, 0xf)
			until(t, "a session after a reset", func() bool { return s.Stats().Sessions == 1 })
		})
	}
}

// Configuration changes carry a generation, and an event once there is a
// session.
func TestConfig(t *testing.T) {
	b := newBoard(t, protocol, 0x2000, 2)
	type write struct {
		offset int
		value  string
	}
	writes := make(chan write, 1)
	d := echo(8)
	d.Config = []byte("0123456789ab")
	d.ConfigWritten = func(offset int, value []byte) { writes <- write{offset, string(value)} }
	s := serve(t, b.Device(t, 0, apart), d)
	l := frontEnd(t, b)
	l.put(0x4c+8, 4, 'X'|'Y'<<8)
	if w := <-writes; w != (write{8, "XY\x00\x00"}) {
		t.Errorf("%+v", w)
	}
	l.put(0x4c+2, 1, 'Z')
	if w := <-writes; w != (write{2, "Z3456789"}) {
		t.Errorf("%+v", w)
	}
	l.shows("configuration", 0x4c, hex.EncodeToString(d.Config))
	if err := s.SetConfig(1, []byte("AB")); err != nil {
		t.Fatal(err)
	}
	l.shows("changed", 0x48, "02000000"+hex.EncodeToString([]byte("0AB3456789ab")))
	l.shows("no event", 0x40, "00")
	for _, bad := range []struct{ offset, n int }{{-1, 1}, {12, 1}, {13, 0}, {0, 13}, {1 << 40, 1}} {
		if err := s.SetConfig(bad.offset, make([]byte, bad.n)); err == nil {
			t.Errorf("%+v is inside", bad)
		}
	}
	l.acceptFeatures(modern)
	l.put(0x44, 4, 0xf)
	until(t, "a session", func() bool { return s.Stats().Sessions == 1 })
	if err := s.SetConfig(11, []byte("Z")); err != nil {
		t.Fatal(err)
	}
	l.shows("changed", 0x40, "01")
	l.shows("changed", 0x48, "04000000"+hex.EncodeToString([]byte("0AB3456789aZ")))
	if b.Doorbells(1, 0) != 1 {
		t.Errorf("%d doorbells", b.Doorbells(1, 0))
	}
	// It is kept for the next driver.
	l.register(regs.State, 0)
	until(t, "the back-end begins anew", func() bool { return get32(l.m, 0x44) == 0 && l.ready() })
	l.shows("next driver", 0x4c, hex.EncodeToString([]byte("0AB3456789aZ")))
}

// Queues that do not lie where they have to, or are too large, are refused by a
// request for a reset.
func TestQueueRegisters(t *testing.T) {
	const section = 0x2000
	good := [5]uint64{8, 0x1000, 0x1080, 0x10c0, 0} // size, desc, driver, device
	for _, c := range []struct {
		name  string
		field int
		value uint64
		ok    bool
	}{
		{"good", 0, 8, true},
		{"one entry", 0, 1, true},
		{"no entry", 0, 0, false},
		{"not a power of two", 0, 7, false},
		{"more than offered", 0, 16, false},
		{"32768 entries", 0, 32768, false},
		{"descriptors behind the block", 1, 0x50, true},
		{"descriptors in the block", 1, 0x40, false},
		{"descriptors at 0", 1, 0, false},
		{"descriptors at the end", 1, section - 128, true},
		{"descriptors beyond the end", 1, section - 112, false},
		{"descriptors far away", 1, 1 << 40, false},
		{"descriptors wrap", 1, 1<<64 - 16, false},
		{"descriptors not aligned", 1, 0x1008, false},
		{"avail behind the block", 2, 0x50, true},
		{"avail in the block", 2, 0x4e, false},
		{"avail at the end", 2, section - 22, true},
		{"avail beyond the end", 2, section - 20, false},
		{"avail wraps", 2, 1<<64 - 2, false},
		{"avail not aligned", 2, 0x1081, false},
		{"used at the end", 3, section - 72, true}, // 70 bytes, aligned to 4
		{"used beyond the end", 3, section - 68, false},
		{"used in the block", 3, 0x4c, false},
		{"used not aligned", 3, 0x10c2, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBoard(t, protocol, section, 2)
			s := serve(t, b.Device(t, 0, apart), echo(8))
			l := frontEnd(t, b)
			l.acceptFeatures(modern)
			l.put(0x1c, 4, 0)
			v := good
			v[c.field] = c.value
			l.put(0x20, 2, v[0])
			l.put(0x28, 8, v[1])
			l.put(0x30, 8, v[2])
			l.put(0x38, 8, v[3])
			l.put(0x26, 2, 1)
			n := s.Stats()
			if ok := n.Violations == 0; ok != c.ok {
				t.Errorf("%+v", n)
			}
			if status := get32(l.m, 0x44); (status == 0xb) != c.ok || !c.ok && status != 0x4b {
				t.Errorf("status %#x", status)
			}
			if b.Rung(1) != 0 {
				t.Error("rung before DRIVER_OK")
			}
		})
	}
}

// Links that are not for this are refused, with what to do.
func TestUnsuitable(t *testing.T) {
	device := func(c link.Config) *ivshmem.Device {
		t.Helper()
		return ivshmemtest.Peers(t, c)[0]
	}
	good := link.Config{Peers: 2, Vectors: 2, Protocol: protocol, ReadWrite: 0x2000}
	change := func(f func(c *link.Config)) link.Config {
		c := good
		f(&c)
		return c
	}
	for _, c := range []struct {
		link link.Config
		want string
	}{
		{change(func(c *link.Config) { c.Protocol = 1 }), "--protocol 0xc004"},
		{change(func(c *link.Config) { c.Protocol = 0x8003 }), "--protocol 0xc004"},
		{change(func(c *link.Config) { c.Peers = 3 }), "--peers 2"},
		{change(func(c *link.Config) { c.ReadWrite = 0 }), "--rw"},
		{change(func(c *link.Config) { c.ReadWrite = 0x1000 }), "larger --rw"},
	} {
		_, err := virtio.NewBackEnd(device(c.link), echo(8))
		if !errors.Is(err, virtio.ErrUnsuitable) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.link, err, c.want)
		}
	}
	peers := ivshmemtest.Peers(t, good)
	if _, err := virtio.NewBackEnd(peers[1], echo(8)); !errors.Is(err, virtio.ErrUnsuitable) {
		t.Errorf("back-end at the front-end's end: %v", err)
	}
	if _, err := virtio.Open(t.Context(), peers[0], virtio.DriverConfig{ID: entropy.ID}); !errors.Is(err, virtio.ErrUnsuitable) {
		t.Errorf("front-end at the back-end's end: %v", err)
	}
	for _, d := range []virtio.Device{
		{ID: 4, Queues: []int{0}}, {ID: 4, Queues: []int{3}}, {ID: 4, Queues: []int{1 << 16}}, {ID: 4, Queues: []int{-8}},
		{ID: 4, Config: make([]byte, 1025)}, {ID: 4, Features: virtio.RingPacked}, {ID: 4, Features: virtio.Version1},
	} {
		if _, err := virtio.NewBackEnd(peers[0], d); err == nil {
			t.Errorf("%+v is accepted", d)
		}
	}
}
