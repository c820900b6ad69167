package vnet_test

import (
	"encoding/binary"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/vnet"
)

// raw is a peer that writes the bytes of the protocol page where that says they
// are. It does nothing by itself.
type raw struct {
	testing.TB
	b          *board
	id         uint32
	dev        *ivshmem.Device
	own, other []byte // output sections
	// Offsets and sizes of the page's tables.
	n                                   uint64
	avail, usedEvent, used, availEvent_ uint64
	header                              uint64
	sent, completed                     uint64 // frames
}

// newRaw is a peer in State RESET.
func newRaw(t testing.TB, b *board, id uint32) *raw {
	t.Helper()
	out := b.Layout.Output
	section := func(id uint64) []byte { return b.Memory[4096+id*out:][:out] }
	r := &raw{TB: t, b: b, id: id, dev: b.Device(t, id, apart), own: section(uint64(id)), other: section(uint64(1 - id))}
	for _, g := range geometries {
		if g.output == out {
			r.n, r.header = uint64(g.entries), g.header
			r.avail, r.usedEvent, r.used, r.availEvent_ = g.avail, g.usedEvnt, g.used, g.availEvnt
			return r
		}
	}
	t.Fatalf("no geometry of %#x", out)
	return nil
}

// word is an aligned word, of which half is a half.
func word(p []byte, at uint64) *uint32 { return (*uint32)(unsafe.Pointer(&p[at&^3])) }

func get16(p []byte, at uint64) uint16 {
	return uint16(atomic.LoadUint32(word(p, at)) >> (at & 2 * 8))
}

func get32(p []byte, at uint64) uint32 { return atomic.LoadUint32(word(p, at)) }

func put16(p []byte, at uint64, v uint16) {
	shift := at & 2 * 8
	for {
		old := atomic.LoadUint32(word(p, at))
		if atomic.CompareAndSwapUint32(word(p, at), old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}

func put32(p []byte, at uint64, v uint32) { atomic.StoreUint32(word(p, at), v) }

func (r *raw) state() uint32 { return r.b.State(1 - r.id) }

func (r *raw) setState(v uint32) {
	r.Helper()
	if err := r.dev.SetState(v); err != nil {
		r.Fatal(err)
	}
}

// until waits for a condition.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !f(); time.Sleep(20 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: ", what)
		}
	}
}

func (r *raw) await(state uint32) {
	r.Helper()
	until(r, "the other's state", func() bool { return r.state() == state })
}

// start goes through the states until both run. The other has been opened, or
// is yet to come.
func (r *raw) start() *raw {
	r.Helper()
	r.setState(0)
	until(r, "RESET or INIT", func() bool { return r.state() <= 1 })
	r.setState(1)
	until(r, "INIT or READY", func() bool { s := r.state(); return s == 1 || s == 2 })
	clear(r.own)
	r.sent, r.completed = 0, 0
	r.setState(2)
	until(r, "READY or RUN", func() bool { return r.state() >= 2 })
	r.setState(3)
	r.await(3)
	return r
}

// describe writes a descriptor of the own queue.
func (r *raw) describe(id, addr uint64, n uint32, flags uint16) {
	d := r.own[16*id:]
	binary.LittleEndian.PutUint64(d, addr)
	binary.LittleEndian.PutUint32(d[8:], n)
	binary.LittleEndian.PutUint16(d[12:], flags)
	binary.LittleEndian.PutUint16(d[14:], 0x5a5a) // next: private
}

// publish makes descriptors available.
func (r *raw) publish(ids ...uint16) {
	for _, id := range ids {
		put16(r.own, r.avail+4+2*(r.sent%r.n), id)
		r.sent++
		put16(r.own, r.avail+2, uint16(r.sent))
	}
}

// send sends a frame at the start of the data, and rings if it has to.
func (r *raw) send(frame []byte) {
	r.Helper()
	id := (r.sent*7 + 3) % r.n // in any order
	copy(r.own[r.header:], frame)
	r.describe(id, r.header, uint32(len(frame)), 0)
	old := uint16(r.sent)
	r.publish(uint16(id))
	if get16(r.other, r.availEvent_) == old {
		r.ring()
	}
}

func (r *raw) ring() {
	r.Helper()
	vector := 1
	if r.b.Vectors() == 1 {
		vector = 0
	}
	if err := r.dev.Ring(1-r.id, vector); err != nil {
		r.Fatal(err)
	}
}

// returned checks the other's used ring: all that was sent has come back, in
// order, and of length 1.
func (r *raw) returned(ids ...uint16) {
	r.Helper()
	until(r, "frames come back", func() bool { return get16(r.other, r.used+2) == uint16(r.sent) })
	for i, id := range ids {
		at := r.used + 4 + 8*((r.sent-uint64(len(ids))+uint64(i))%r.n)
		if got, n := get32(r.other, at), get32(r.other, at+4); got != uint32(id) || n != 1 {
			r.Errorf("used entry {%d, %d}, want {%d, 1}", got, n, id)
		}
	}
}

// receive takes the next frame of the other's queue without returning it.
func (r *raw) receive() (id uint16, frame []byte) {
	r.Helper()
	until(r, "a frame", func() bool { return get16(r.other, r.avail+2) != uint16(r.completed) })
	id = get16(r.other, r.avail+4+2*(r.completed%r.n))
	if uint64(id) >= r.n {
		r.Fatalf("descriptor %d of %d", id, r.n)
	}
	d := r.other[16*uint64(id):]
	addr, n := binary.LittleEndian.Uint64(d), uint64(binary.LittleEndian.Uint32(d[8:]))
	if flags := binary.LittleEndian.Uint16(d[12:]); flags != 0 || addr < r.header || addr+n > uint64(len(r.other)) {
		r.Fatalf("descriptor %d: %d bytes at %#x, flags %#x", id, n, addr, flags)
	}
	return id, r.other[addr : addr+n]
}

// complete returns a frame.
func (r *raw) complete(id, n uint32) {
	at := r.used + 4 + 8*(r.completed%r.n)
	put32(r.own, at, id)
	put32(r.own, at+4, n)
	r.completed++
	put16(r.own, r.used+2, uint16(r.completed))
}

// against is a link, peer 0, and a raw peer, both running.
func against(t testing.TB, output uint64, c vnet.Config) (*vnet.Link, *raw) {
	t.Helper()
	b := newBoard(t, output, 2)
	r := newRaw(t, b, 1)
	l := open(t, b.Device(t, 0, apart), c)
	r.start()
	carrier(t, true, l)
	return l, r
}
