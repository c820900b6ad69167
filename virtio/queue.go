package virtio

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
)

// queueRegisters is what the block shows of the selected queue.
type queueRegisters struct {
	size                       uint16
	deviceVector, driverVector uint16
	enable                     uint16
	desc, driver, device       uint64
}

// ring is where a split virtqueue lies in the section (virtio specification,
// "Split Virtqueues").
type ring struct {
	size  uint16
	desc  uint64 // descriptors: address 8, length 4, flags 2, next 2
	avail uint64 // flags 2, index 2, heads 2 each, used_event 2
	used  uint64 // flags 2, index 2, {id 4, length 4} each, avail_event 2

	delayed bool // see Delay
}

const (
	descriptorSize = 16
	ringIndex      = 2 // of avail and used: behind the flags
	ringEntries    = 4

	flagNext     = 1
	flagWrite    = 2
	flagIndirect = 4

	// noNotify and noInterrupt are flags of used and avail: do not ring me.
	noNotify    = 1
	noInterrupt = 1
)

// delay is how many buffers the other side need not tell of before it tells of
// one, when it has n.
func (r *ring) delay(n uint16) uint16 {
	if !r.delayed || n < 2 {
		return 0
	}
	return n/2 - 1
}

func (r *ring) mask() uint16         { return r.size - 1 }
func (r *ring) availSize() uint64    { return 6 + 2*uint64(r.size) }
func (r *ring) usedSize() uint64     { return 6 + 8*uint64(r.size) }
func (r *ring) usedEvent() uint64    { return r.avail + ringEntries + 2*uint64(r.size) }
func (r *ring) availEvent() uint64   { return r.used + ringEntries + 8*uint64(r.size) }
func (r *ring) head(i uint16) uint64 { return r.avail + ringEntries + 2*uint64(i&r.mask()) }
func (r *ring) done(i uint16) uint64 { return r.used + ringEntries + 8*uint64(i&r.mask()) }

// passed reports whether an index that goes from one value to another passes an
// event: whether who waits for the event has to be told. All of them wrap.
func passed(event, from, to uint16) bool { return to-event-1 < to-from }

var errEmpty = errors.New("no buffers")

// Queue is a virtqueue as the device sees it. It belongs to one session. It is
// safe for concurrent use.
type Queue struct {
	b         *BackEnd
	index     int
	vectors   []int          // 0, and the one that the driver rings for it
	registers queueRegisters // with b.mu held
	ready     func() bool

	// life is held for reading while buffers are touched, and by kill.
	life sync.RWMutex
	dead bool // with life or mu held; written with both

	mu sync.Mutex
	// Below: with mu held.
	ring
	on       bool
	eventIdx bool
	indirect bool
	limit    uint64 // first byte behind the register block
	next     uint16 // index of the next available buffer
	returned uint16 // index of the next used one
	quiet    uint16 // flags of used
	warm     bool   // something came when it was looked for last
	most     uint16 // the most buffers that were here at a time
	free     []*Chain
	// wanted is the vector that the driver wants interrupts on.
	wanted int
	ctx    context.Context // the session's
}

func newQueue(b *BackEnd, index int) *Queue {
	vector := b.vectorOf(index)
	q := &Queue{b: b, index: index, limit: b.size, vectors: []int{0, vector}}
	if vector == 0 {
		q.vectors = q.vectors[:1]
	}
	q.registers.size = uint16(b.device.Queues[index])
	q.registers.deviceVector = uint16(vector)
	q.ready = func() bool {
		if b.look() {
			b.call()
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.dead || q.on && q.b.mem.load16(q.ring.avail+ringIndex) != q.next
	}
	return q
}

// enable checks what the driver said about the queue, and opens it. The caller
// holds b.mu.
func (q *Queue) enable() *ViolationError {
	m, r := q.b.mem, &q.registers
	most := q.b.device.Queues[q.index]
	n := ring{size: r.size, desc: r.desc, avail: r.driver, used: r.device}
	violation := func(field string, v uint64, bound string, args ...any) *ViolationError {
		return &ViolationError{q.index, field, v, fmt.Sprintf(bound, args...)}
	}
	switch {
	case bits.OnesCount16(n.size) != 1 || int(n.size) > most:
		return violation("queue_size", uint64(n.size), "a power of two up to %d", most)
	case n.desc%16 != 0 || !m.holds(q.limit, n.desc, descriptorSize*uint64(n.size)):
		return violation("queue_desc", n.desc, "%d bytes, aligned to 16, from %#x to %#x", descriptorSize*uint64(n.size), q.limit, m.Size())
	case n.avail%2 != 0 || !m.holds(q.limit, n.avail, n.availSize()):
		return violation("queue_driver", n.avail, "%d bytes, aligned to 2, from %#x to %#x", n.availSize(), q.limit, m.Size())
	case n.used%4 != 0 || !m.holds(q.limit, n.used, n.usedSize()):
		return violation("queue_device", n.used, "%d bytes, aligned to 4, from %#x to %#x", n.usedSize(), q.limit, m.Size())
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ring = n
	q.eventIdx = q.b.accepted.Has(EventIdx)
	q.indirect = q.b.accepted.Has(IndirectDesc)
	q.wanted = int(r.driverVector)
	q.on = !q.dead
	return nil
}

// kill makes sure that nobody touches the queue or its buffers any more.
func (q *Queue) kill() {
	q.mu.Lock()
	q.life.Lock()
	q.dead = true
	q.life.Unlock()
	q.mu.Unlock()
}

func (q *Queue) killed() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dead
}

// Delay has the driver ring when half of the buffers are here that it had at the
// most, and not for each: for a queue of which Next is waited for as for room,
// by one who may fill all at once. Without [EventIdx] it does nothing.
func (q *Queue) Delay() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.delayed = true
}

// Size is the number of entries, as the driver set it; 0: it left the queue
// out.
func (q *Queue) Size() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.on {
		return 0
	}
	return int(q.ring.size)
}

// Next returns the next buffer of the driver, and waits for one. It fails with
// the context's error, with [ErrReset] when the session is over, or a
// *[ViolationError], which ends it. Buffers go back by Push, in any order. A
// wait with the session's own context, as Run got it, allocates nothing.
func (q *Queue) Next(ctx context.Context) (*Chain, error) {
	for {
		if q.b.device.Spin > 0 {
			q.look(ctx)
		}
		c, err := q.TryNext()
		if c != nil || err != nil {
			return c, err
		}
		if err := q.b.await(q.patience(ctx), q); err != nil {
			return nil, err
		}
	}
}

// look looks for a buffer, but not for long, and does not ask to be rung
// meanwhile.
func (q *Queue) look(ctx context.Context) {
	q.mu.Lock()
	next, at, warm := q.next, q.ring.avail+ringIndex, q.warm && q.on
	q.mu.Unlock()
	if !warm {
		return
	}
	warm = spin(ctx, q.b.device.Spin, func() bool {
		q.life.RLock()
		defer q.life.RUnlock()
		return q.dead || q.b.mem.load16(at) != next
	})
	q.mu.Lock()
	q.warm = warm
	q.mu.Unlock()
}

// patience is the context to wait with. The end of the session's own kills the
// queue, which ready sees: a wait that need not watch it allocates nothing.
func (q *Queue) patience(ctx context.Context) context.Context {
	q.mu.Lock()
	defer q.mu.Unlock()
	if ctx == q.ctx {
		return context.Background()
	}
	return ctx
}

// TryNext is Next without waiting: it returns nil where there is no buffer.
func (q *Queue) TryNext() (*Chain, error) {
	q.mu.Lock()
	c, err := q.pop()
	q.warm = q.warm || c != nil
	q.mu.Unlock()
	if err == errEmpty {
		return nil, nil
	}
	if v, ok := err.(*ViolationError); ok {
		q.b.violated(q, v)
	}
	return c, err
}

// pop takes the next buffer, or arranges for the driver to ring when there is
// one. The caller holds mu.
func (q *Queue) pop() (*Chain, error) {
	if q.dead {
		return nil, ErrReset
	}
	if !q.on {
		return nil, errEmpty
	}
	m := q.b.mem
	index := m.load16(q.ring.avail + ringIndex)
	if index == q.next {
		if q.eventIdx {
			m.Store16(q.availEvent(), q.next+q.delay(q.most))
		}
		q.quiet = 0
		m.Store32(q.ring.used, uint32(q.returned)<<16) // a full barrier
		if index = m.load16(q.ring.avail + ringIndex); index == q.next {
			return nil, errEmpty
		}
	}
	// Also what was taken and has not been returned occupies entries.
	if index-q.returned > q.ring.size || index-q.next > q.ring.size {
		return nil, &ViolationError{q.index, "index of available buffers", uint64(index),
			fmt.Sprintf("%d to %d, no more than the queue has entries", q.next, q.returned+q.ring.size)}
	}
	q.most = max(q.most, index-q.returned)
	if !q.eventIdx && q.quiet == 0 {
		q.quiet = noNotify
		m.Store32(q.ring.used, noNotify|uint32(q.returned)<<16)
	}
	c := q.chain()
	c.head = m.load16(q.ring.head(q.next))
	if err := q.walk(c); err != nil {
		q.free = append(q.free, c)
		return nil, err
	}
	q.next++
	c.held = true
	return c, nil
}

// chain is a chain to be filled. The caller holds mu.
func (q *Queue) chain() *Chain {
	n := len(q.free)
	if n == 0 {
		return &Chain{q: q}
	}
	c := q.free[n-1]
	q.free = q.free[:n-1]
	c.clear()
	return c
}

// Push returns a buffer to the driver, which finds the first written bytes of
// its writable part changed, and is interrupted if it wants that. The chain
// must not be used any more. It fails with [ErrReset] when the session is
// over.
func (q *Queue) Push(c *Chain, written int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.pushable(c, written); err != nil {
		return err
	}
	q.put(c, written)
	q.publish(q.returned - 1)
	return nil
}

// PushAll is Push for several buffers, all different: the driver finds all of
// them, or none.
func (q *Queue) PushAll(chains []*Chain, written []int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, c := range chains {
		if err := q.pushable(c, written[i]); err != nil {
			return err
		}
	}
	before := q.returned
	for i, c := range chains {
		q.put(c, written[i])
	}
	q.publish(before)
	return nil
}

// pushable checks what is to be returned. The caller holds mu.
func (q *Queue) pushable(c *Chain, written int) error {
	switch {
	case c.q != q || !c.held:
		return fmt.Errorf("virtqueue %d: expected a buffer that was taken from it and not returned", q.index)
	case written < 0 || written > c.writable:
		return fmt.Errorf("virtqueue %d: expected at most %d bytes written, found %d", q.index, c.writable, written)
	case q.dead:
		return ErrReset
	}
	return nil
}

// put puts a buffer into the used ring, where the driver does not look yet. The
// caller holds mu.
func (q *Queue) put(c *Chain, written int) {
	m := q.b.mem
	at := q.ring.done(q.returned)
	m.Store32(at, uint32(c.head))
	m.Store32(at+4, uint32(written))
	q.returned++
	c.held = false
	q.free = append(q.free, c)
}

// publish shows the driver the buffers that were put from an index on, and
// interrupts it if it wants that. The caller holds mu.
func (q *Queue) publish(from uint16) {
	m := q.b.mem
	m.Store32(q.ring.used, uint32(q.quiet)|uint32(q.returned)<<16) // a full barrier
	if q.interrupt(from) {
		m.Store8(regQueueEvent, 1)
		q.b.dev.Ring(q.b.peer, q.wanted)
	}
}

// interrupt reports whether the driver wants to hear of the buffers that were
// used from an index on. The caller holds mu.
func (q *Queue) interrupt(from uint16) bool {
	if q.wanted >= q.b.dev.Vectors() {
		return false // the driver has none
	}
	if q.eventIdx {
		return passed(q.b.mem.load16(q.usedEvent()), from, q.returned)
	}
	return q.b.mem.load16(q.ring.avail)&noInterrupt == 0
}

// descriptor is a descriptor in private memory.
type descriptor struct {
	at          uint64
	n           uint32
	flags, next uint16
}

func decode(raw *[descriptorSize]byte) descriptor {
	le := binary.LittleEndian
	return descriptor{le.Uint64(raw[:]), le.Uint32(raw[8:]), le.Uint16(raw[12:]), le.Uint16(raw[14:])}
}
