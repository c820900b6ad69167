package vnet_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// canceled is a context for calls that must not wait.
func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// TestWire exchanges frames with a raw peer, as many as wrap around both the
// rings and the data, for every division of a section.
func TestWire(t *testing.T) {
	for _, g := range geometries {
		if g.output > 0x100000 || g.output%4096 != 0 {
			continue
		}
		t.Run(fmt.Sprintf("%#x", g.output), func(t *testing.T) {
			l, r := against(t, g.output, vnet.Config{MTU: g.max})
			random := rand.New(rand.NewPCG(1, g.output))
			p := make([]byte, vnet.MaxFrame)
			for i := range 2*int(g.entries) + 5 {
				size := min(14+random.IntN(g.max+4), 14+random.IntN(3000))
				if i%50 == 0 {
					size = g.max + 18
				}
				f := frame(size, i)
				if err := l.Send(t.Context(), f); err != nil {
					t.Fatal(err)
				}
				id, got := r.receive()
				if !bytes.Equal(got, f) {
					t.Fatalf("frame %d: %d bytes that are not the %d that were sent", i, len(got), size)
				}
				r.complete(uint32(id), 1)

				r.send(f)
				n, err := l.Receive(t.Context(), p)
				if err != nil || !bytes.Equal(p[:n], f) {
					t.Fatalf("frame %d: %d bytes of %d, %v", i, n, size, err)
				}
				r.returned(uint16((r.sent-1)*7+3) & uint16(g.entries-1))
			}
			s := l.Stats()
			if want := uint64(2*g.entries + 5); s.Sent.Frames != want || s.Received.Frames != want || s.Sent.Bytes != s.Received.Bytes || s.Received.Dropped() != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestWireUnsafe is TestWire without copies.
func TestWireUnsafe(t *testing.T) {
	l, r := against(t, 0x1000, vnet.Config{})
	if l.MTU() != 144 {
		t.Fatal(l.MTU())
	}
	for i := range 200 {
		f := frame(14+i%149, i)
		p, err := l.UnsafeReserve(t.Context())
		if err != nil || len(p) != 144+18 {
			t.Fatal(len(p), err)
		}
		again, err := l.UnsafeReserve(canceled())
		if err != nil || &again[0] != &p[0] {
			t.Fatal("reserved twice:", err)
		}
		for _, n := range []int{-1, 0, 13, 144 + 19} {
			var size *vnet.FrameSizeError
			if err := l.UnsafeCommit(n); !errors.As(err, &size) || size.Length != n || size.Max != 144+18 {
				t.Fatalf("%d bytes: %v", n, err)
			}
		}
		if err := l.UnsafeCommit(copy(p, f)); err != nil {
			t.Fatal(err)
		}
		id, got := r.receive()
		if !bytes.Equal(got, f) {
			t.Fatal(i, got)
		}
		r.complete(uint32(id), 1)

		r.send(f)
		for range 2 {
			if got, err = l.UnsafePeek(t.Context()); err != nil || !bytes.Equal(got, f) {
				t.Fatal(i, got, err)
			}
		}
		if err := l.UnsafeRelease(); err != nil {
			t.Fatal(err)
		}
		r.returned()
	}
	if err := l.UnsafeCommit(20); !errors.Is(err, vnet.ErrReset) {
		t.Errorf("nothing is reserved: %v", err)
	}
	if err := l.UnsafeRelease(); !errors.Is(err, vnet.ErrReset) {
		t.Errorf("nothing is held: %v", err)
	}
	if err := l.Send(t.Context(), make([]byte, 13)); err == nil {
		t.Error("13 bytes were sent")
	}
	if err := l.Send(t.Context(), make([]byte, 144+19)); err == nil {
		t.Error("MTU + 19 bytes were sent")
	}
	r.send(make([]byte, 100))
	if n, err := l.Receive(t.Context(), make([]byte, 99)); n != 0 || err != io.ErrShortBuffer {
		t.Errorf("100 bytes into 99: %d, %v", n, err)
	}
	r.returned()
}

// TestWireCleared looks at what a link writes before it is READY, and that it
// writes nowhere else.
func TestWireCleared(t *testing.T) {
	b := newBoard(t, 0x4000, 2)
	r := newRaw(t, b, 1)
	for i := range b.Memory[4096:] {
		b.Memory[4096+i] = byte(i*7 + 1)
	}
	peers := bytes.Clone(r.own)
	l := open(t, b.Device(t, 0, apart), vnet.Config{})
	r.await(1)
	if r.other[5] != byte(5*7+1) {
		t.Error("cleared in INIT")
	}
	r.setState(1)
	r.await(2)
	if len(bytes.Trim(r.other, "\x00")) != 0 {
		t.Error("READY, and not all of the own section is 0")
	}
	if !bytes.Equal(r.own, peers) {
		t.Error("the peer's section was written")
	}
	// Nothing of a section is looked at before it is READY: this one is full
	// of nonsense.
	if _, err := l.Receive(canceled(), make([]byte, vnet.MaxFrame)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if s := l.Stats(); s.Received.Dropped() != 0 || s.Violations != (vnet.ViolationStats{}) {
		t.Errorf("%+v", s)
	}
	clear(r.own)
	r.setState(2)
	r.await(3)
	if l.Carrier() {
		t.Error("carrier, and the peer is READY only")
	}
	if err := l.Send(t.Context(), make([]byte, 60)); !errors.Is(err, vnet.ErrNoCarrier) {
		t.Errorf("sent without carrier: %v", err)
	}
	r.setState(3)
	carrier(t, true, l)
	if s := l.Stats(); s.Sent.NoCarrier != 1 || s.State != vnet.StateRun || s.PeerState != vnet.StateRun || !s.Up || !s.Carrier {
		t.Errorf("%+v", s)
	}
}

// TestDoorbells rings where the event indexes say so.
func TestDoorbells(t *testing.T) {
	l, r := against(t, 0x4000, vnet.Config{MTU: 100})
	rung := func() int { return r.b.Doorbells(1, 1) }
	sent := 0
	// Batches, and what the peer asks for beforehand.
	for i, c := range []struct {
		batch int
		event int // counted from the first frame of the batch
		want  int
	}{
		{1, 0, 1}, {1, 1, 0}, {1, -1, 0}, {5, 0, 1}, {5, 4, 1}, {5, 5, 0}, {5, 2, 1}, {5, -1, 0}, {5, -30000, 0}, {5, 30000, 0}, {20, 19, 1}, {20, 20, 0},
	} {
		before := rung()
		put16(r.own, r.availEvent_, uint16(sent+c.event))
		frames := make([][]byte, c.batch)
		for j := range frames {
			frames[j] = frame(60, sent+j)
		}
		if n, err := l.SendAll(t.Context(), frames); n != c.batch || err != nil {
			t.Fatal(n, err)
		}
		for range frames {
			id, _ := r.receive()
			r.complete(uint32(id), 1)
			sent++
		}
		if got := rung() - before; got != c.want {
			t.Errorf("%d: %d doorbells, want %d", i, got, c.want)
		}
	}
	if s := l.Stats(); s.Sent.Doorbells != uint64(rung()) {
		t.Errorf("%d doorbells counted, %d rung", s.Sent.Doorbells, rung())
	}
	// Frames that are returned.
	p := make([]byte, vnet.MaxFrame)
	for i, event := range []int{0, 1, 0, 5, -1, 0, 2000, -2000} {
		before := rung()
		put16(r.own, r.usedEvent, uint16(int(r.sent)+event))
		r.send(frame(60, i))
		if _, err := l.Receive(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		want := 0
		if event == 0 {
			want = 1
		}
		if got := rung() - before; got != want {
			t.Errorf("event %d: %d doorbells, want %d", event, got, want)
		}
	}
	// While nobody waits, avail_event stays as it is. It is set before a wait.
	before := get16(r.other, r.availEvent_)
	for i := range 3 {
		r.send(frame(60, i))
	}
	for range 3 {
		if _, err := l.Receive(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	if got := get16(r.other, r.availEvent_); got != before {
		t.Errorf("avail_event %d, was %d: the receiver did not wait", got, before)
	}
	l.Receive(canceled(), p)
	if got := get16(r.other, r.availEvent_); got != uint16(r.sent) {
		t.Errorf("avail_event %d, want %d: the receiver waits", got, r.sent)
	}
}

// TestFull fills the queue. The sender asks to be rung when half of it came
// back, and not before.
func TestFull(t *testing.T) {
	l, r := against(t, 0x4000, vnet.Config{MTU: 100})
	n := 0
	for ; ; n++ {
		if err := l.Send(canceled(), frame(60, n)); err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			break
		}
	}
	if n != 64 { // descriptors; data has room for many more
		t.Errorf("%d frames fit, want 64", n)
	}
	if got := get16(r.other, r.usedEvent); got != 31 {
		t.Errorf("used_event %d, want 31", got)
	}
	sent := make(chan error)
	go func() { sent <- l.Send(t.Context(), frame(60, n)) }()
	for range 31 {
		id, _ := r.receive()
		r.complete(uint32(id), 1)
	}
	r.ring() // nothing that it waits for: it sleeps on
	id, _ := r.receive()
	select {
	case err := <-sent:
		t.Errorf("sent: %v", err)
	default:
	}
	r.complete(uint32(id), 1)
	r.ring()
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if s := l.Stats(); s.Sent.Waits == 0 || s.Sent.Frames != 65 {
		t.Errorf("%+v", s)
	}
}

// TestEveryMTU sends frames of all sizes with every kind of MTU, for as long as
// it takes for the data to be used at every offset. A sender that goes on from
// where it stopped has no room for a frame some time.
func TestEveryMTU(t *testing.T) {
	for _, g := range geometries {
		if g.output > 0x20000 || g.output%4096 != 0 {
			continue
		}
		for _, mtu := range []int{68, 69, g.mtu, g.max * 2 / 3, g.max - 1, g.max} {
			t.Run(fmt.Sprintf("%#x/%d", g.output, mtu), func(t *testing.T) {
				l, r := against(t, g.output, vnet.Config{MTU: mtu})
				random := rand.New(rand.NewPCG(2, g.output))
				for i := range 600 {
					size := 14 + random.IntN(mtu+5)
					if i%3 == 0 {
						size = mtu + 18
					}
					err := l.Send(canceled(), frame(size, i))
					back := random.IntN(3)
					if errors.Is(err, context.Canceled) {
						// The peer returns all there is: then there is room.
						back = 1 << 16
					} else if err != nil {
						t.Fatal(err)
					}
					for ; back > 0 && get16(r.other, r.avail+2) != uint16(r.completed); back-- {
						id, f := r.receive()
						var number int
						if fmt.Sscanf(string(f[:12]), "%d", &number); !bytes.Equal(f, frame(len(f), number)) {
							t.Fatalf("frame %d was overwritten", number)
						}
						r.complete(uint32(id), 1)
					}
					if err == nil {
						continue
					}
					if err := l.Send(canceled(), frame(size, i)); err != nil {
						t.Fatalf("frame %d of %d bytes: the queue is empty, and has no room: %v", i, size, err)
					}
				}
			})
		}
	}
}

// TestDescriptors has the peer describe what is no frame. It is dropped, counted,
// and returned in order like what is around it.
func TestDescriptors(t *testing.T) {
	const L, H = 0x4000, 0x700
	for _, c := range []struct {
		name  string
		id    uint16
		addr  uint64
		n     uint32
		flags uint16
		count func(s *vnet.ReceiveStats) uint64
	}{
		{"descriptor n", 64, H, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Index }},
		{"descriptor 65535", 65535, H, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Index }},
		{"next", 5, H, 60, 1, func(s *vnet.ReceiveStats) uint64 { return s.Flags }},
		{"write", 5, H, 60, 2, func(s *vnet.ReceiveStats) uint64 { return s.Flags }},
		{"indirect", 5, H, 60, 4, func(s *vnet.ReceiveStats) uint64 { return s.Flags }},
		{"flag 8", 5, H, 60, 1 << 8, func(s *vnet.ReceiveStats) uint64 { return s.Flags }},
		{"flag 15", 5, H, 60, 1 << 15, func(s *vnet.ReceiveStats) uint64 { return s.Flags }},
		{"all flags", 5, H, 60, 65535, func(s *vnet.ReceiveStats) uint64 { return s.Flags }},
		{"address 0", 5, 0, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"before the data", 5, H - 1, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"end of the section", 5, L, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"end of the section, nothing", 5, L, 0, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"behind it", 5, L + 1, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"2^32", 5, 1<<32 + H, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"2^64-1", 5, 1<<64 - 1, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"2^64-60", 5, 1<<64 - 60, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"2^63", 5, 1<<63 + H, 60, 0, func(s *vnet.ReceiveStats) uint64 { return s.Address }},
		{"one too long", 5, H, L - H + 1, 0, func(s *vnet.ReceiveStats) uint64 { return s.Length }},
		{"one too long at the end", 5, L - 60, 61, 0, func(s *vnet.ReceiveStats) uint64 { return s.Length }},
		{"2^32-1 bytes", 5, H, 1<<32 - 1, 0, func(s *vnet.ReceiveStats) uint64 { return s.Length }},
		{"2^31 bytes", 5, L - 1, 1 << 31, 0, func(s *vnet.ReceiveStats) uint64 { return s.Length }},
		{"nothing", 5, H, 0, 0, func(s *vnet.ReceiveStats) uint64 { return s.Short }},
		{"13 bytes", 5, H, 13, 0, func(s *vnet.ReceiveStats) uint64 { return s.Short }},
		{"a last byte", 5, L - 1, 1, 0, func(s *vnet.ReceiveStats) uint64 { return s.Short }},
		// These are frames.
		{"at the start", 5, H, 14, 0, nil},
		{"at the end", 63, L - 14, 14, 0, nil},
		{"all there is", 0, H, L - H, 0, nil},
		{"unaligned", 5, H + 1, 1601, 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, r := against(t, L, vnet.Config{})
			if c.id < 64 {
				r.describe(uint64(c.id), c.addr, c.n, c.flags)
			}
			r.describe(9, H, 77, 0)
			want := 77
			r.publish(c.id, 9)
			if c.count == nil {
				want = int(c.n)
			}
			r.ring()
			p := make([]byte, vnet.MaxFrame)
			if n, err := l.Receive(t.Context(), p); n != want || err != nil {
				t.Fatalf("%d bytes, %v, want %d", n, err, want)
			}
			if c.count == nil {
				if n, err := l.Receive(t.Context(), p); n != 77 || err != nil {
					t.Fatal(n, err)
				}
			}
			r.returned(c.id, 9)
			s := l.Stats()
			if c.count != nil && c.count(&s.Received) != 1 {
				t.Errorf("not counted: %+v", s.Received)
			}
			if !l.Carrier() || s.Received.Dropped() != 2-s.Received.Frames || s.Resets != (vnet.ResetStats{}) {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestLongFrame is a section that has room for frames that nobody may send.
func TestLongFrame(t *testing.T) {
	l, r := against(t, 0x100000, vnet.Config{})
	for i, n := range []uint32{65535 + 18, 65535 + 19, 500000} {
		r.describe(uint64(i), r.header, n, 0)
		r.publish(uint16(i))
	}
	p := make([]byte, vnet.MaxFrame)
	if n, err := l.Receive(t.Context(), p); n != 65553 || err != nil {
		t.Error(n, err)
	}
	if n, err := l.Receive(canceled(), p); err == nil {
		t.Errorf("a frame of %d bytes", n)
	}
	if s := l.Stats().Received; s.Length != 2 || s.Dropped() != 2 {
		t.Errorf("%+v", s)
	}
	r.returned(0, 1, 2)
}

// TestFlippingDescriptor changes a descriptor under the reader's hands. What was
// checked is what is used.
func TestFlippingDescriptor(t *testing.T) {
	l, r := against(t, 0x4000, vnet.Config{})
	r.describe(3, r.header, 60, 0)
	stop := make(chan struct{})
	flipped := make(chan struct{})
	go func() {
		defer close(flipped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			n := uint32(60)
			if i%2 == 0 {
				n = 1 << 31
			}
			put32(r.own, 16*3+8, n)
		}
	}()
	p := make([]byte, vnet.MaxFrame)
	for s := l.Stats().Received; s.Frames < 3000 || s.Length < 100; s = l.Stats().Received {
		r.publish(3)
		if n, err := l.Receive(canceled(), p); err == nil && n != 60 {
			t.Fatal(n)
		}
	}
	close(stop)
	<-flipped
	if s := l.Stats().Received; s.Frames+s.Length != r.sent || s.Bytes != 60*s.Frames {
		t.Errorf("%+v", s)
	}
}
