package stream_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/ivshmem-go/ivshmem"
)

// model is a peer written from docs/stream.md, a word at a time: it shares no
// code with the package. It polls, and does what a test says, nothing else.
type model struct {
	t      testing.TB
	dev    *ivshmem.Device
	areas  [][]byte // of all peers, as this one sees them
	own    []byte
	epoch  uint32
	n      uint32 // slots
	r      uint64 // bytes of a ring
	e      uint64 // events
	vector uint64
	events uint64
	dials  uint32
}

// shape is how a model divides its area.
type shape struct {
	n          uint32
	logR, logE uint64
}

func (s shape) word() uint64 { return uint64(s.n) | s.logR<<32 | s.logE<<40 }

// newModel makes a peer that is not there yet.
func newModel(t testing.TB, dev *ivshmem.Device, s shape) *model {
	t.Helper()
	m := &model{t: t, dev: dev, n: s.n, r: 1 << s.logR, e: 1 << s.logE, vector: 0xffffffff}
	sec := dev.Sections()
	for id := range uint64(dev.MaxPeers()) {
		var area []byte
		var err error
		if sec.Output != nil {
			if uint32(id) == dev.ID() {
				area, err = sec.Output.ReadOnly().UnsafeBytes(0, sec.Output.Size())
			} else {
				area, err = must(sec.Input(uint32(id))).UnsafeBytes(0, sec.Layout.Output)
			}
		} else {
			share := sec.ReadWrite.Size() / uint64(dev.MaxPeers()) / 64 * 64
			area, err = sec.ReadWrite.ReadOnly().UnsafeBytes(id*share, share)
		}
		if err != nil {
			t.Fatal(err)
		}
		m.areas = append(m.areas, area)
	}
	m.own = m.areas[dev.ID()]
	return m
}

// word is a word of an area, for atomic access.
func word(area []byte, offset uint64) *uint64 {
	return (*uint64)(unsafe.Pointer(&area[offset : offset+8 : offset+8][0]))
}

func load(area []byte, offset uint64) uint64     { return atomic.LoadUint64(word(area, offset)) }
func store(area []byte, offset uint64, x uint64) { atomic.StoreUint64(word(area, offset), x) }

func (m *model) slotAt(slot uint32) uint64 { return 128 + 8*m.e + 128*uint64(slot) }
func (m *model) ringAt(slot uint32) uint64 { return m.slotAt(m.n) + m.r*uint64(slot) }

// start arrives, as somebody new.
func (m *model) start() *model {
	m.prepare()
	m.setState(m.epoch)
	return m
}

// prepare makes an area of which nobody was told yet.
func (m *model) prepare() {
	m.epoch = rand.Uint32N(1<<32-1) + 1
	m.events = 0
	store(m.own, 8, 0)
	for slot := range m.n {
		store(m.own, m.slotAt(slot), 0)
	}
	store(m.own, 64, 0)
	store(m.own, 16, shape{m.n, uint64(log2(m.r)), uint64(log2(m.e))}.word())
	store(m.own, 24, m.vector)
	store(m.own, 8, 1|uint64(m.epoch)<<32)
	store(m.own, 0, 0x6D61657274737669)
}

func log2(n uint64) int {
	i := 0
	for ; n > 1; n >>= 1 {
		i++
	}
	return i
}

func (m *model) setState(v uint32) {
	m.t.Helper()
	if err := m.dev.SetState(v); err != nil {
		m.t.Fatal(err)
	}
}

// event writes an event, and rings if the peer wants to be.
func (m *model) event(peer, slot uint32) {
	m.write(m.events, peer, slot)
	m.events++
	store(m.own, 64, m.events)
	m.ring(peer)
}

func (m *model) write(number uint64, peer, slot uint32) {
	store(m.own, 128+8*(number%m.e), uint64(peer)<<32|uint64(slot))
}

func (m *model) ring(peer uint32) {
	if v := load(m.areas[peer], 24); v != 0xffffffff {
		m.dev.Ring(peer, int(v))
	}
}

// other is the area of a peer, as its header divides it.
type other struct {
	area  []byte
	id    uint32
	epoch uint32
	n     uint32
	r, e  uint64
}

func (m *model) look(peer uint32) other {
	m.t.Helper()
	a := m.areas[peer]
	g := load(a, 16)
	o := other{a, peer, uint32(load(a, 8) >> 32), uint32(g), 1 << (g >> 32 & 0xff), 1 << (g >> 40 & 0xff)}
	if load(a, 0) != 0x6D61657274737669 || uint32(load(a, 8)) != 1 {
		m.t.Fatalf("peer %d has no header", peer)
	}
	if s, err := m.dev.State(peer); err != nil || s != o.epoch {
		m.t.Fatalf("State of peer %d is %#x, %v, its epoch %#x", peer, s, err, o.epoch)
	}
	return o
}

func (o other) slotAt(slot uint32) uint64 { return 128 + 8*o.e + 128*uint64(slot) }
func (o other) ringAt(slot uint32) uint64 { return o.slotAt(o.n) + o.r*uint64(slot) }
func (o other) block(slot uint32, w uint64) uint64 {
	return load(o.area, o.slotAt(slot)+8*w)
}

// find waits for a slot of the other that has the ID, and returns it.
func (m *model) find(o other, id uint64) (slot uint32) {
	m.t.Helper()
	m.until("an answer", func() bool {
		for slot = range o.n {
			if o.block(slot, 0) == id {
				return true
			}
		}
		return false
	})
	return slot
}

// until waits for a condition.
func (m *model) until(what string, f func() bool) {
	m.t.Helper()
	until(m.t, what, f)
}

func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(50 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// call is the model's end of a connection.
type call struct {
	m          *model
	o          other
	id         uint64
	slot, peer uint32 // own slot, and the other's
	tail, head uint64 // written, read
}

func (m *model) set(slot uint32, w, x uint64) { store(m.own, m.slotAt(slot)+8*w, x) }

// take takes a slot.
func (m *model) take(slot uint32, id uint64, state, peer uint32, word2 uint64, epoch uint32) {
	for _, w := range []uint64{4, 5, 8} {
		m.set(slot, w, 0)
	}
	store(m.own, m.ringAt(slot), 0)
	m.set(slot, 1, uint64(state)|uint64(peer)<<32)
	m.set(slot, 2, word2)
	m.set(slot, 3, uint64(epoch))
	m.set(slot, 0, id)
}

// knock dials without an event.
func (m *model) knock(peer, slot, port uint32) *call {
	m.t.Helper()
	o := m.look(peer)
	m.dials++
	c := &call{m: m, o: o, id: uint64(m.epoch)<<32 | uint64(m.dials), slot: slot}
	m.take(slot, c.id, 1, peer, 70000|uint64(port)<<32, o.epoch)
	return c
}

// dial connects, and reports whether the other agreed.
func (m *model) dial(peer, slot, port uint32) (*call, bool) {
	m.t.Helper()
	c := m.knock(peer, slot, port)
	m.event(peer, slot)
	return c, c.answered(port)
}

// answered waits for the answer.
func (c *call) answered(port uint32) bool {
	m, o := c.m, c.o
	m.t.Helper()
	c.peer = m.find(o, c.id)
	w1, w2, w3 := o.block(c.peer, 1), o.block(c.peer, 2), o.block(c.peer, 3)
	if uint32(w1>>32) != m.dev.ID() || uint32(w2) != c.slot || uint32(w2>>32) != port || uint32(w3) != m.epoch {
		m.t.Fatalf("answer: peer and state %#x, port and slot %#x, epoch %#x", w1, w2, w3)
	}
	switch uint32(w1) {
	case 2:
		m.set(c.slot, 2, uint64(c.peer)|uint64(port)<<32)
		m.set(c.slot, 1, 2|uint64(o.id)<<32)
		return true
	case 3:
		m.set(c.slot, 0, 0)
		m.event(o.id, c.slot)
	default:
		m.t.Fatalf("answer: state %d", uint32(w1))
	}
	return false
}

// incoming waits for a peer that dials, and returns its slot.
func (m *model) incoming(peer uint32) (o other, slot uint32) {
	m.t.Helper()
	o = m.look(peer)
	m.until("somebody who dials", func() bool {
		for slot = range o.n {
			w1 := o.block(slot, 1)
			if o.block(slot, 0) != 0 && uint32(w1) == 1 && uint32(w1>>32) == m.dev.ID() && uint32(o.block(slot, 3)) == m.epoch {
				return true
			}
		}
		return false
	})
	return o, slot
}

// answer answers who dials by a state.
func (m *model) answer(o other, peerSlot, slot, state uint32) *call {
	c := &call{m: m, o: o, id: o.block(peerSlot, 0), slot: slot, peer: peerSlot}
	m.take(slot, c.id, state, o.id, uint64(peerSlot)|o.block(peerSlot, 2)&^0xffffffff, o.epoch)
	m.event(o.id, slot)
	return c
}

const (
	end     = 1 << 33
	padding = 1 << 34
	last    = 1 << 35
	packed  = 1 << 36
)

func up(n int) uint64 { return uint64(n+7) / 8 * 8 }

// room is what a record at the tail may carry.
func (c *call) room() int { return int(c.m.r-c.tail%c.m.r) - 8 }

// record writes a record, when there is room for it, and rings if it is due.
func (c *call) record(flags uint64, p []byte) {
	c.m.t.Helper()
	size := 8 + up(len(p))
	need := size + 8
	if flags&last != 0 {
		need = 8
	}
	c.await(need)
	ring := c.m.own[c.m.ringAt(c.slot):][:c.m.r]
	at := c.tail % c.m.r
	copy(ring[at+8:], p)
	if flags&last == 0 {
		store(ring, (at+size)%c.m.r, 0)
	}
	store(ring, at, uint64(len(p))|1<<32|flags)
	from := c.tail
	c.tail += size
	if e := c.o.block(c.peer, 4); from < e && e <= c.tail {
		c.m.event(c.o.id, c.slot)
	}
}

// await waits for free space, as one who sleeps or one who polls.
func (c *call) await(need uint64) {
	c.m.t.Helper()
	free := func() bool { return c.m.r-(c.tail-c.o.block(c.peer, 8)) >= need }
	if !free() {
		c.m.set(c.slot, 5, c.tail+need-c.m.r)
		c.m.until("space", free)
	}
}

// pad fills the ring up to its end.
func (c *call) pad() {
	c.m.t.Helper()
	c.record(padding, make([]byte, c.room()))
}

// next waits for a record and returns its header and bytes.
func (c *call) next() (flags uint64, p []byte) {
	c.m.t.Helper()
	ring := c.o.area[c.o.ringAt(c.peer):][:c.o.r]
	at := c.head % c.o.r
	c.m.set(c.slot, 4, 1+c.head)
	c.m.until("a record", func() bool { return load(ring, at) != 0 })
	h := load(ring, at)
	n := h & 0xffffffff
	if h&(1<<32) == 0 || h>>37 != 0 || at+8+n > c.o.r {
		c.m.t.Fatalf("record %#x at %d", h, c.head)
	}
	p = slices.Clone(ring[at+8:][:n])
	from := c.head
	c.head += 8 + up(int(n))
	c.m.set(c.slot, 8, c.head)
	if e := c.o.block(c.peer, 5); from < e && e <= c.head {
		c.m.event(c.o.id, c.slot)
	}
	if c.o.block(c.peer, 0) != c.id {
		c.m.t.Fatal("the connection was reset")
	}
	return h &^ 0xffffffff &^ (1 << 32), p
}

// message reads a message, or more that come packed; nil: the end.
func (c *call) messages() (all [][]byte) {
	c.m.t.Helper()
	m := []byte{}
	for {
		flags, p := c.next()
		switch {
		case flags&padding != 0:
			continue
		case flags&last != 0:
			return nil
		case flags&packed != 0:
			if len(m) > 0 {
				c.m.t.Fatal("a packed record inside of a message")
			}
			for len(p) > 0 {
				n := binary.LittleEndian.Uint64(p)
				all = append(all, p[8:8+n])
				p = p[8+up(int(n)):]
			}
			return all
		}
		m = append(m, p...)
		if flags&end != 0 {
			return [][]byte{m}
		}
	}
}

// close closes, and sets the slot free when the other has closed, too.
func (c *call) close() {
	c.record(last, nil)
	c.m.set(c.slot, 1, 4|uint64(c.o.id)<<32)
	c.m.event(c.o.id, c.slot)
}

// over reports whether the other end is closed or gone.
func (c *call) over() bool {
	return c.o.block(c.peer, 0) != c.id || uint32(c.o.block(c.peer, 1)) == 4
}

func (c *call) free() {
	c.m.set(c.slot, 0, 0)
	c.m.event(c.o.id, c.slot)
}

func (c *call) String() string { return fmt.Sprintf("connection %#x", c.id) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
