package vnet

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/ivshmem-go/ivshmem/shmem"
)

// sections are the output sections of both, of 1000h bytes each.
func sections(t *testing.T) (own *shmem.ReadWrite, peer *shmem.ReadOnly, bytes []byte) {
	t.Helper()
	bytes = make([]byte, 0x2000)
	m, err := shmem.NewMemory(bytes)
	if err != nil {
		t.Fatal(err)
	}
	if own, err = m.ReadWrite("own", 0, 0x1000); err != nil {
		t.Fatal(err)
	}
	if peer, err = m.ReadOnly("peer", 0x1000, 0x1000); err != nil {
		t.Fatal(err)
	}
	return own, peer, bytes[0x1000:]
}

// TestIndexes has the peer write all values of its indexes, in all relations to
// the own ones.
func TestIndexes(t *testing.T) {
	own, peer, bytes := sections(t)
	g, err := NewGeometry(0x1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, next := range []uint16{0, 1000, 1<<16 - 5} {
		for index := range 1 << 16 {
			ahead := uint16(index) - next
			binary.LittleEndian.PutUint16(bytes[0x202:], uint16(index))
			r := receiver{queue: g.queue(), own: own, peer: peer, next: next, limit: next}
			err := r.look()
			if (err == nil) != (ahead <= 32) || err == nil && r.limit != uint16(index) || err != nil && r.limit != next {
				t.Fatalf("avail index %d, next %d: %v, limit %d", index, next, err, r.limit)
			}
			if err != nil && !errors.As(err, new(*ViolationError)) {
				t.Fatal(err)
			}
		}
		for _, outstanding := range []uint16{7, 32} {
			for i := range uint16(32) {
				binary.LittleEndian.PutUint32(bytes[0x284+8*i:], uint32(i))
				binary.LittleEndian.PutUint32(bytes[0x288+8*i:], 1)
			}
			for index := range 1 << 16 {
				back := uint16(index) - next
				binary.LittleEndian.PutUint16(bytes[0x282:], uint16(index))
				s := sender{queue: g.queue(), own: own, peer: peer, done: next, next: next + outstanding, at: make([]uint64, 32)}
				err := s.reclaim()
				if (err == nil) != (back <= outstanding) || err == nil && s.done != uint16(index) || err != nil && s.done != next {
					t.Fatalf("used index %d, %d frames from %d: %v, done %d", index, outstanding, next, err, s.done)
				}
			}
		}
	}
}

// TestPassed compares the test of an event with a walk over all indexes.
func TestPassed(t *testing.T) {
	for _, from := range []uint16{0, 5, 1<<16 - 3} {
		for _, n := range []uint16{0, 1, 2, 40, 4096} {
			for event := range 1 << 16 {
				// Going from one index to another publishes those between.
				want := uint16(event)-from < n
				if got := passed(uint16(event), from, from+n); got != want {
					t.Fatalf("%d to %d passes %d: %v", from, from+n, event, got)
				}
			}
		}
	}
}

// TestPlaces finds room in all patterns of what is outstanding, and none where
// something is.
func TestPlaces(t *testing.T) {
	own, peer, bytes := sections(t)
	g, err := NewGeometry(0x1000)
	if err != nil {
		t.Fatal(err)
	}
	words, err := own.View(0, 512)
	if err != nil {
		t.Fatal(err)
	}
	for mtu := MinMTU; mtu <= g.MaxMTU(); mtu += 4 {
		s := sender{queue: g.queue(), own: own, peer: peer, header: g.Header, size: g.Data(), most: uint64(mtu + 18), at: make([]uint64, 32), carrier: true, ring: func() {}}
		if s.descriptors, err = words.Words(); err != nil {
			t.Fatal(err)
		}
		clear(bytes)
		type span struct{ from, to uint64 }
		var out []span
		state := uint32(mtu)
		random := func(n int) int { state = state*1664525 + 1013904223; return int(state>>8) % n }
		for step := range 2000 {
			s.mu.Lock()
			err := s.reserve()
			if err == nil {
				n := uint64(14 + random(mtu+5))
				p := span{s.position, s.position + s.most}
				if p.to > g.Data() {
					t.Fatalf("MTU %d: a frame from %d to %d of %d", mtu, p.from, p.to, g.Data())
				}
				for _, o := range out {
					if p.from < o.to && o.from < p.to {
						t.Fatalf("MTU %d: %v is in use, and %v is reserved", mtu, o, p)
					}
				}
				s.commit(int(n))
				out = append(out, span{p.from, p.from + n})
			} else if err != errFull || len(out) == 0 {
				t.Fatalf("MTU %d, step %d, %d outstanding: %v", mtu, step, len(out), err)
			}
			s.mu.Unlock()
			back := random(3)
			if err != nil {
				back = max(1, back)
			}
			for ; back > 0 && len(out) > 0; back-- {
				used := binary.LittleEndian.Uint16(bytes[0x282:])
				binary.LittleEndian.PutUint32(bytes[0x284+8*(used%32):], uint32(used%32))
				binary.LittleEndian.PutUint32(bytes[0x288+8*(used%32):], 1)
				binary.LittleEndian.PutUint16(bytes[0x282:], used+1)
				out = out[1:]
			}
		}
	}
}

// TestBudget has a peer that sends nonsense faster than it is dropped. The
// receiver comes back now and then.
func TestBudget(t *testing.T) {
	own, peer, bytes := sections(t)
	g, err := NewGeometry(0x1000)
	if err != nil {
		t.Fatal(err)
	}
	sent := uint16(0)
	send := func() {
		sent++
		if sent < 10000 {
			binary.LittleEndian.PutUint16(bytes[0x202:], sent)
			binary.LittleEndian.PutUint16(bytes[0x244:], sent-1) // used_event
		}
	}
	send()
	r := receiver{queue: g.queue(), own: own, peer: peer, header: g.Header, output: g.Output, running: true, ring: send}
	view, err := peer.View(0, 512)
	if err != nil {
		t.Fatal(err)
	}
	if r.descriptors, err = view.Words(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.peek(); err != errBudget || r.stats.Dropped() != budget {
		t.Errorf("%v after %d frames", err, r.stats.Dropped())
	}
}

// TestDescriptorIsReadOnce changes a descriptor all the time between one that is
// right and one that is not. What is returned is never a bit of both.
func TestDescriptorIsReadOnce(t *testing.T) {
	own, peer, bytes := sections(t)
	g, err := NewGeometry(0x1000)
	if err != nil {
		t.Fatal(err)
	}
	r := receiver{queue: g.queue(), own: own, peer: peer, header: g.Header, output: g.Output}
	view, err := peer.View(0, 512)
	if err != nil {
		t.Fatal(err)
	}
	if r.descriptors, err = view.Words(); err != nil {
		t.Fatal(err)
	}
	right := [2]uint64{0x700, 60}
	wrong := [2]uint64{0x10, 1<<32 | 4000}
	var stop atomic.Bool
	var flipper sync.WaitGroup
	flipper.Go(func() {
		for !stop.Load() {
			for _, d := range [][2]uint64{wrong, right} {
				for i, w := range d {
					atomic.StoreUint64((*uint64)(unsafe.Pointer(&bytes[8*i])), w)
				}
				for range 5 {
					shmem.Pause()
				}
			}
		}
	})
	defer flipper.Wait()
	defer stop.Store(true)
	accepted, refused := 0, 0
	for accepted < 100_000 || refused < 100_000 {
		if f, cause := r.read(); cause != nil {
			refused++
		} else if accepted++; f.at != 0x700 || f.length != 60 {
			t.Fatalf("%d bytes at %#x", f.length, f.at)
		}
	}
}
