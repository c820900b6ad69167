package virtio_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio"
)

// hostile is a driver whose queue is nothing but memory: 8 entries, descriptors
// at 1000h, avail at 1080h, used at 10c0h of a section of 2000h bytes; the
// block ends at 50h.
const (
	hostileSection = 0x2000
	hostileDesc    = 0x1000
	hostileAvail   = 0x1080
	hostileUsed    = 0x10c0
)

func hostile(t testing.TB, b *board, features uint64) *linux {
	t.Helper()
	l := frontEnd(t, b)
	l.play(features)
	return l
}

// play goes from a reset to DRIVER_OK.
func (l *linux) play(features uint64) {
	l.Helper()
	l.acceptFeatures(features)
	clear(l.m[hostileDesc : hostileUsed+0x100])
	for _, w := range [][3]uint64{{0x1c, 4, 0}, {0x20, 2, 8}, {0x24, 2, 1}, {0x28, 8, hostileDesc}, {0x30, 8, hostileAvail}, {0x38, 8, hostileUsed}, {0x26, 2, 1}, {0x44, 4, 0xf}} {
		l.put(w[0], w[1], w[2])
	}
}

// describe writes a descriptor to a table.
func (l *linux) describe(table, id, at uint64, n uint32, flags, next uint16) {
	putDescriptor(l.m[table+16*id:], at, n, flags, next)
}

// works sends a request that is one, after a reset.
func (l *linux) works(features uint64) {
	l.Helper()
	l.play(features)
	copy(l.m[0x1800:], "abc")
	l.describe(hostileDesc, 5, 0x1800, 3, 1, 2)
	l.describe(hostileDesc, 2, 0x1900, 10, 2, 0)
	put16(l.m, hostileAvail+4, 5)
	put16(l.m, hostileAvail+2, 1)
	l.ring(1)
	until(l, "an answer", func() bool { return get16(l.m, hostileUsed+2) == 1 })
	if id, n := get32(l.m, hostileUsed+4), get32(l.m, hostileUsed+8); id != 5 || n != 3 || string(l.m[0x1900:0x1903]) != "cba" {
		l.Errorf("used %d, %d bytes, %q", id, n, l.m[0x1900:0x1903])
	}
}

// What is wrong in a queue asks for a reset, with nothing used, and the device
// works after it.
func TestDescriptors(t *testing.T) {
	t.Parallel()
	const (
		next, write, indirect = 1, 2, 4
		table                 = 0x1400
	)
	type d struct {
		id, at      uint64
		n           uint32
		flags, next uint16
	}
	for _, c := range []struct {
		name   string
		d      []d // those from id 100 on are in the indirect table
		head   uint16
		index  uint16 // of avail; 0: 1
		direct bool   // no indirect descriptors are negotiated
		field  string // "": it is good
	}{
		{name: "good", d: []d{{0, 0x1800, 4, 0, 0}}},
		{name: "behind the block", d: []d{{0, 0x50, 4, 0, 0}}},
		{name: "at the end", d: []d{{0, hostileSection - 4, 4, 0, 0}}},
		{name: "all of it", d: []d{{0, 0x50, hostileSection - 0x50, 0, 0}}},
		{name: "in the block", d: []d{{0, 0x4f, 4, 0, 0}}, field: "address of a descriptor"},
		{name: "at 0", d: []d{{0, 0, 4, 0, 0}}, field: "address of a descriptor"},
		{name: "over the end", d: []d{{0, hostileSection - 3, 4, 0, 0}}, field: "address of a descriptor"},
		{name: "behind the end", d: []d{{0, hostileSection, 1, 0, 0}}, field: "address of a descriptor"},
		{name: "wraps", d: []d{{0, 1<<64 - 2, 4, 0, 0}}, field: "address of a descriptor"},
		{name: "wraps in 32 bits", d: []d{{0, 0x1800, 1<<32 - 1, 0, 0}}, field: "address of a descriptor"},
		{name: "address of 33 bits", d: []d{{0, 1<<32 + 0x1800, 4, 0, 0}}, field: "address of a descriptor"},
		{name: "to write, in the block", d: []d{{0, 0x40, 16, write, 0}}, field: "address of a descriptor"},
		{name: "of no bytes", d: []d{{0, 0x1800, 0, 0, 0}}, field: "length of a descriptor"},
		{name: "unknown flags", d: []d{{0, 0x1800, 4, 8, 0}}, field: "flags of a descriptor"},
		{name: "to read behind to write", d: []d{{0, 0x1800, 4, write | next, 1}, {1, 0x1800, 4, 0, 0}}, field: "flags of a descriptor"},
		{name: "head beyond the queue", head: 8, field: "head of a buffer"},
		{name: "head far beyond", head: 65535, field: "head of a buffer"},
		{name: "next beyond the queue", d: []d{{0, 0x1800, 4, next, 8}}, field: "next descriptor"},
		{name: "to itself", d: []d{{0, 0x1800, 4, next, 0}}, field: "length of a chain"},
		{name: "in a circle", d: []d{{0, 0x1800, 4, next, 1}, {1, 0x1800, 4, next, 0}}, field: "length of a chain"},
		{name: "index too far", index: 9, field: "index of available"},
		{name: "index half a round ahead", index: 32768, field: "index of available"},
		{name: "index goes back", index: 65535, field: "index of available"},
		{name: "indirect", d: []d{{0, table, 32, indirect, 0}, {100, 0x1800, 4, next, 1}, {101, 0x1900, 4, write, 0}}},
		{name: "indirect, in any order", d: []d{{0, table, 48, indirect, 0}, {100, 0x1800, 4, next, 2}, {102, 0x1900, 4, write, 0}}},
		{name: "indirect, not negotiated", direct: true, d: []d{{0, table, 16, indirect, 0}, {100, 0x1800, 4, 0, 0}}, field: "flags of a descriptor"},
		{name: "indirect, of no bytes", d: []d{{0, table, 0, indirect, 0}}, field: "length of an indirect table"},
		{name: "indirect, of half a descriptor", d: []d{{0, table, 24, indirect, 0}}, field: "length of an indirect table"},
		{name: "indirect, longer than the queue", d: []d{{0, table, 9 * 16, indirect, 0}, {100, 0x1800, 4, next, 1}, {101, 0x1800, 4, next, 2}, {102, 0x1800, 4, next, 3},
			{103, 0x1800, 4, next, 4}, {104, 0x1800, 4, next, 5}, {105, 0x1800, 4, next, 6}, {106, 0x1800, 4, next, 7}, {107, 0x1800, 4, next, 8}, {108, 0x1900, 4, write, 0}}}, // as Linux makes them
		{name: "indirect, far longer", d: []d{{0, table, 1025 * 16, indirect, 0}}, field: "length of an indirect table"},
		{name: "indirect, of 4 GiB", d: []d{{0, table, 1<<32 - 16, indirect, 0}}, field: "length of an indirect table"},
		{name: "indirect, in the block", d: []d{{0, 0x40, 16, indirect, 0}}, field: "address of an indirect table"},
		{name: "indirect, over the end", d: []d{{0, hostileSection - 16, 32, indirect, 0}}, field: "address of an indirect table"},
		{name: "indirect, wraps", d: []d{{0, 1<<64 - 16, 32, indirect, 0}}, field: "address of an indirect table"},
		{name: "indirect in indirect", d: []d{{0, table, 16, indirect, 0}, {100, table, 16, indirect, 0}}, field: "flags of a descriptor"},
		{name: "indirect behind another", d: []d{{0, 0x1800, 4, next, 1}, {1, table, 16, indirect, 0}, {100, 0x1800, 4, 0, 0}}},
		{name: "indirect with another behind", d: []d{{0, table, 16, indirect | next, 1}, {100, 0x1800, 4, 0, 0}}, field: "flags of a descriptor"},
		{name: "indirect, next beyond the table", d: []d{{0, table, 32, indirect, 0}, {100, 0x1800, 4, next, 2}}, field: "next descriptor"},
		{name: "indirect, in a circle", d: []d{{0, table, 32, indirect, 0}, {100, 0x1800, 4, next, 1}, {101, 0x1800, 4, next, 0}}, field: "length of a chain"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBoard(t, protocol, hostileSection, 2)
			dev := b.Device(t, 0, apart)
			s := serve(t, dev, echo(8))
			features := uint64(modern | 1<<28 | 1<<29)
			if c.direct {
				features = modern
			}
			l := hostile(t, b, features)
			for _, d := range c.d {
				at, id := uint64(hostileDesc), d.id
				if id >= 100 {
					at, id = table, id-100
				}
				l.describe(at, id, d.at, d.n, d.flags, d.next)
			}
			put16(l.m, hostileAvail+4, c.head)
			put16(l.m, hostileAvail+2, max(c.index, 1))
			l.ring(1)
			if c.field == "" {
				until(t, "it is used", func() bool { return get16(l.m, hostileUsed+2) == 1 })
			} else {
				until(t, "a request for a reset", func() bool { return get32(l.m, 0x44) == 0x4f && get8(l.m, 0x40) == 1 })
				if n := s.Stats(); n.Violations != 1 || !strings.Contains(n.LastViolation, "queue 0: "+c.field) {
					t.Errorf("%+v, want %q", n, c.field)
				}
				if get16(l.m, hostileUsed+2) != 0 {
					t.Error("something was used")
				}
				until(t, "vector 0 is rung", func() bool { return b.Doorbells(1, 0) == 1 })
			}
			l.works(features)
		})
	}
}

// More buffers than the queue has entries, in small steps: none of them has come
// back.
func TestTooManyBuffers(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, hostileSection, 2)
	taken := make(chan *virtio.Chain, 100)
	d := echo(8)
	d.Run = keepAll(taken)
	s := serve(t, b.Device(t, 0, apart), d)
	l := hostile(t, b, modern)
	l.describe(hostileDesc, 0, 0x1800, 4, 0, 0)
	for i := range uint16(8) {
		put16(l.m, hostileAvail+2, i+1)
		l.ring(1)
		<-taken
	}
	put16(l.m, hostileAvail+2, 9)
	l.ring(1)
	until(t, "a violation", func() bool { return s.Stats().Violations == 1 })
	if len(taken) != 0 {
		t.Error("a ninth buffer")
	}
}

// An index that goes back to what the device has already.
func TestIndexGoesBack(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, hostileSection, 2)
	taken := make(chan *virtio.Chain, 100)
	d := echo(8)
	d.Run = keepAll(taken)
	s := serve(t, b.Device(t, 0, apart), d)
	l := hostile(t, b, modern)
	l.describe(hostileDesc, 0, 0x1800, 4, 0, 0)
	put16(l.m, hostileAvail+2, 4)
	l.ring(1)
	for range 4 {
		<-taken
	}
	put16(l.m, hostileAvail+2, 2)
	l.ring(1)
	until(t, "a violation", func() bool { return s.Stats().Violations == 1 })
	if len(taken) != 0 {
		t.Error("a buffer was taken twice")
	}
}

// All indexes that a driver may say, from all that it may have said: those that
// are up to the number of entries ahead are good.
func TestAvailIndexes(t *testing.T) {
	t.Parallel()
	for _, eventIdx := range []uint64{0, 1 << 29} {
		b := newBoard(t, protocol, hostileSection, 2)
		violated := make(chan error, 1)
		next := make(chan uint16)
		d := echo(8)
		d.Run = walkIndexes(next, violated)
		serve(t, b.Device(t, 0, apart), d)
		l := hostile(t, b, modern|eventIdx)
		l.describe(hostileDesc, 0, 0x1800, 4, 0, 0)
		last := uint16(0)
		for i := range 2 * 65536 / 8 { // twice around, by 8 at a time
			last += 8
			put16(l.m, hostileAvail+2, last)
			next <- 8
			if err := <-violated; err != nil {
				t.Fatalf("step %d: %v", i, err)
			}
			if got := get16(l.m, hostileUsed+2); got != last {
				t.Fatalf("used %d, want %d", got, last)
			}
		}
		for ahead := range 65536 {
			if ahead <= 8 {
				continue
			}
			if ahead%997 != 0 && ahead > 20 && ahead < 65520 {
				continue // the rest in steps: each needs a session of its own
			}
			put16(l.m, hostileAvail+2, last+uint16(ahead))
			next <- 1
			var v *virtio.ViolationError
			if err := <-violated; !errors.As(err, &v) || v.Value != uint64(last+uint16(ahead)) {
				t.Fatalf("%d ahead: %v", ahead, err)
			}
			l.play(modern | eventIdx)
			l.describe(hostileDesc, 0, 0x1800, 4, 0, 0)
			last = 0
		}
	}
}

// What is wrong in used rings ends the driver, and nothing else.
func TestUsed(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		id    int64 // -1: what was added first
		n     uint32
		index uint16
		field string
	}{
		{"good", -1, 10, 1, ""},
		{"nothing written", -1, 0, 1, ""},
		{"too long", -1, 11, 1, "length of a used buffer"},
		{"much too long", -1, 1<<32 - 1, 1, "length of a used buffer"},
		{"never added", 7, 10, 1, "used buffer"},
		{"beyond the queue", 8, 10, 1, "used buffer"},
		{"65536", 65536, 10, 1, "used buffer"},
		{"2^32-1", 1<<32 - 1, 10, 1, "used buffer"},
		{"more than were added", 0, 10, 3, "index of used buffers"},
		{"index far ahead", 0, 10, 32768, "index of used buffers"},
		{"index goes back", 0, 10, 65535, "index of used buffers"},
		{"led to by another", -2, 10, 1, "used buffer"},
	} {
		for _, low := range []uint32{0, 1 << 28, 1 << 29, 3 << 28} {
			t.Run(fmt.Sprintf("%s, features %#x", c.name, low), func(t *testing.T) {
				t.Parallel()
				b := newBoard(t, protocol, 0x8000, 2)
				e := newExample(t, b, 1, nil, func(int, []exampleSegment) uint32 { return 0 })
				e.low = low
				d, queues := started(t, b, apart, 8)
				e.hung.Store(true)
				q := queues[0]
				for range 2 {
					if err := q.Add(alloc(t, d, 64), virtio.Out(0, 10), virtio.In(20, 4), virtio.In(24, 6)); err != nil {
						t.Fatal(err)
					}
				}
				// The rings are where the driver said.
				avail, used := uint64(get32(b.ReadWrite(), 0x30)), uint64(get32(b.ReadWrite(), 0x38))
				head := get16(b.ReadWrite(), avail+4)
				id := c.id
				switch {
				case id == -1:
					id = int64(head)
				case id == -2 && low&(1<<28) == 0:
					id = int64(get16(b.ReadWrite(), uint64(get32(b.ReadWrite(), 0x28))+16*uint64(head)+14))
				case id == -2:
					id = 2 // its table leads there
				}
				put32(b.ReadWrite(), used+4, uint32(id))
				put32(b.ReadWrite(), used+8, c.n)
				put16(b.ReadWrite(), used+2, c.index)
				buf, n, err := q.Next(t.Context())
				var v *virtio.ViolationError
				if c.field == "" {
					if err != nil || buf == nil || n != int(c.n) {
						t.Errorf("%d bytes, %v", n, err)
					}
					// And again: it is nobody's any more.
					put32(b.ReadWrite(), used+12, uint32(id))
					put16(b.ReadWrite(), used+2, 2)
					if _, _, err = q.Next(t.Context()); !errors.As(err, &v) {
						t.Errorf("used twice: %v", err)
					}
					return
				}
				if !errors.As(err, &v) || v.Queue != 0 || !strings.Contains(v.Field, c.field) || v.Bound == "" {
					t.Errorf("%v, want a violation of %q", err, c.field)
				}
				if err2 := q.Kick(); !errors.Is(err2, err) {
					t.Errorf("afterwards: %v", err2)
				}
			})
		}
	}
}

// A block that says nonsense is refused.
func TestHostileBlock(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		at    uint64
		value uint32
		field string
	}{
		{0, 0, "revision"}, {4, 0, "size"}, {4, 0x4b, "size"}, {4, 0x2001, "size"}, {4, 1<<32 - 1, "size"},
	} {
		b := newBoard(t, protocol, 0x2000, 2)
		put32(b.ReadWrite(), 0, 1)
		put32(b.ReadWrite(), 4, 0x4c)
		put32(b.ReadWrite(), c.at, c.value)
		p := b.Attach(t, 0, apart)
		p.Store(0x10, 1)
		_, err := virtio.Open(t.Context(), b.Device(t, 1, apart), virtio.DriverConfig{ID: 4})
		var v *virtio.ViolationError
		if !errors.As(err, &v) || v.Field != c.field || v.Value != uint64(c.value) {
			t.Errorf("%d at %d: %v", c.value, c.at, err)
		}
	}
}
