package virtio

import (
	"context"
	"fmt"
	"math/bits"
	"sync"
)

// Buffer is memory of the driver in the R/W section. Its bytes are copied, as
// the device may change them at any time.
type Buffer struct {
	d     *Driver
	at, n uint64
	table uint64 // room for indirect descriptors
	busy  bool   // with the mu of the queue held that has it
}

// indirectMost is the most segments of a buffer that are put into its indirect
// table: one for each page, and a few.
func indirectMost(n uint64) uint64 { return 4 + n/4096 }

// tableSize is how many segments the indirect table of a buffer has room for.
func (b *Buffer) tableSize() int { return int((b.at - b.table) / descriptorSize) }

// Alloc takes memory of n bytes for a buffer, zeroed. It fails with a
// *[SpaceError] where there is none.
func (d *Driver) Alloc(n int) (*Buffer, error) {
	if n < 1 {
		return nil, fmt.Errorf("buffer of %d bytes: expected at least 1", n)
	}
	b := &Buffer{d: d, n: uint64(n)}
	table := uint64(0)
	if d.features.Has(IndirectDesc) {
		table = indirectMost(b.n) * descriptorSize
	}
	at, err := d.reserve(table + b.n)
	if err != nil {
		return nil, err
	}
	b.table, b.at = at, at+table
	return b, nil
}

// reserve takes zeroed memory.
func (d *Driver) reserve(n uint64) (uint64, error) {
	d.mu.Lock()
	at, err := d.memory.take(n)
	d.mu.Unlock()
	if err != nil {
		return 0, err
	}
	d.life.RLock()
	defer d.life.RUnlock()
	if d.err != nil {
		return 0, d.err
	}
	d.mem.zero(at, n)
	return at, nil
}

// Free gives the memory back. A buffer that a queue has must not be freed.
func (b *Buffer) Free() {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	b.d.memory.give(b.table, b.at+b.n-b.table)
	b.n = 0
}

// Size is the size in bytes.
func (b *Buffer) Size() int { return int(b.n) }

func (b *Buffer) allow(n int, offset int64) error {
	if offset < 0 || uint64(offset) > b.n || uint64(n) > b.n-uint64(offset) {
		return fmt.Errorf("buffer of %d bytes: expected an access inside, found %d bytes at %d", b.n, n, offset)
	}
	return b.d.err
}

// ReadAt copies bytes out, all of p or, with an error, none.
func (b *Buffer) ReadAt(p []byte, offset int64) (int, error) {
	b.d.life.RLock()
	defer b.d.life.RUnlock()
	if err := b.allow(len(p), offset); err != nil {
		return 0, err
	}
	return b.d.mem.ReadAt(p, int64(b.at)+offset)
}

// WriteAt copies bytes in, all of p or, with an error, none.
func (b *Buffer) WriteAt(p []byte, offset int64) (int, error) {
	b.d.life.RLock()
	defer b.d.life.RUnlock()
	if err := b.allow(len(p), offset); err != nil {
		return 0, err
	}
	return b.d.mem.WriteAt(p, int64(b.at)+offset)
}

// Segment is a part of a buffer that the device reads, or writes.
type Segment struct {
	Offset, Length int
	Write          bool
	// Same says that what is in a part to be written may come back to whoever
	// gets the buffer from the device, which may not write all that it says: it
	// is not zeroed, as for a buffer that serves the same reader again.
	Same bool
}

// Out is a segment for the device to read.
func Out(offset, length int) Segment { return Segment{Offset: offset, Length: length} }

// In is a segment for the device to write.
func In(offset, length int) Segment { return Segment{Offset: offset, Length: length, Write: true} }

// DriverQueue is a virtqueue as the driver sees it. It is safe for concurrent
// use.
type DriverQueue struct {
	d       *Driver
	index   int
	vectors []int // 0, and the one that the device rings for it
	kick    int   // vector that the driver rings
	ready   func() bool

	mu sync.Mutex
	// Below: with mu held. All that the device believes of is a copy of this, and
	// not read back.
	ring
	eventIdx bool
	indirect bool
	slots    []slot
	free     []uint16 // descriptors
	next     uint16   // index of the next available buffer
	told     uint16   // that of the next one that the device is told of
	taken    uint16   // index of the next used buffer
	pending  uint16   // buffers that the device has
	quiet    uint16   // flags of avail
	warm     bool     // something came when it was looked for last
}

// slot is what the driver knows of a descriptor.
type slot struct {
	buffer   *Buffer // of which this is the head
	writable uint32
	next     uint16 // of the same buffer
	more     bool
}

// SetUpQueue gives the device a queue of at most so many entries; the device may
// want fewer, and what it gets is a power of two. It has to be before Start.
// It fails with a *[SpaceError] where there is no room for the rings.
func (d *Driver) SetUpQueue(ctx context.Context, index, entries int) (*DriverQueue, error) {
	q, err := d.setUpQueue(ctx, index, entries)
	if err != nil {
		return nil, fmt.Errorf("virtqueue %d: %w", index, err)
	}
	return q, nil
}

func (d *Driver) setUpQueue(ctx context.Context, index, entries int) (*DriverQueue, error) {
	if index < 0 || entries < 1 {
		return nil, fmt.Errorf("%d entries: expected at least 1", entries)
	}
	if err := d.put32(ctx, regQueueSel, uint32(index)); err != nil {
		return nil, err
	}
	if err := d.answered(ctx); err != nil {
		return nil, err
	}
	most := int(d.mem.load16(regQueueSize))
	switch {
	case most == 0:
		return nil, fmt.Errorf("%w: the device has no such queue", ErrUnsuitable)
	case d.mem.load16(regQueueEnable) != 0:
		return nil, fmt.Errorf("the queue has been set up already")
	}
	entries = 1 << (bits.Len(uint(min(entries, most))) - 1)
	q := &DriverQueue{d: d, index: index, vectors: []int{0, d.vectorOf(index)}, slots: make([]slot, entries)}
	if q.vectors[1] == 0 {
		q.vectors = q.vectors[:1]
	}
	// A vector that the link does not have would not be heard: the device
	// looks at everything after each interrupt, or should.
	if q.kick = int(d.mem.load16(regQueueDeviceVector)); q.kick >= d.dev.Vectors() {
		q.kick = 0
	}
	if err := q.place(entries); err != nil {
		return nil, err
	}
	vector := uint16(q.vectors[len(q.vectors)-1])
	for _, f := range []func() error{
		func() error { return d.put16(ctx, regQueueSize, q.size) },
		func() error { return d.put16(ctx, regQueueDriverVector, vector) },
		func() error { return d.put64(ctx, regQueueDesc, q.desc) },
		func() error { return d.put64(ctx, regQueueDriver, q.avail) },
		func() error { return d.put64(ctx, regQueueDevice, q.used) },
		func() error { return d.put16(ctx, regQueueEnable, 1) },
		func() error { return d.answered(ctx) },
	} {
		if err := f(); err != nil {
			return nil, err
		}
	}
	return q, nil
}

// place puts the rings into the section.
func (q *DriverQueue) place(entries int) error {
	q.size = uint16(entries)
	used := lines(descriptorSize*uint64(q.size) + q.availSize())
	at, err := q.d.reserve(used + q.usedSize())
	if err != nil {
		return err
	}
	q.desc, q.avail, q.used = at, at+descriptorSize*uint64(q.size), at+used
	q.eventIdx = q.d.features.Has(EventIdx)
	q.indirect = q.d.features.Has(IndirectDesc)
	for i := range q.slots {
		q.free = append(q.free, uint16(entries-1-i))
	}
	q.ready = func() bool {
		if q.d.look() {
			return true
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.d.mem.load16(q.used+ringIndex) != q.taken
	}
	return nil
}

// Delay has the device interrupt when half of the buffers that it has are back,
// and not for each: for a queue of which Next is waited for as for room, by one
// who may fill all at once. Without [EventIdx] it does nothing.
func (q *DriverQueue) Delay() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.delayed = true
}

// Size is the number of entries.
func (q *DriverQueue) Size() int { return len(q.slots) }

// Outstanding is how many buffers the device is not done with; 0, too, when the
// driver has ended.
func (q *DriverQueue) Outstanding() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.d.life.RLock()
	defer q.d.life.RUnlock()
	if q.d.err != nil {
		return 0
	}
	// What the device says is no more than a number here.
	return int(q.pending - min(q.pending, q.d.mem.load16(q.used+ringIndex)-q.taken))
}

// Add makes parts of a buffer available to the device: those to be read first,
// then those to be written, which are zeroed (but see [Segment]). The device hears of it by Kick,
// and may see it before. It fails with [ErrQueueFull], or with why the driver has
// ended. The buffer belongs to the device until Next returns it.
func (q *DriverQueue) Add(b *Buffer, segments ...Segment) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.d.life.RLock()
	defer q.d.life.RUnlock()
	writable, err := q.check(b, segments)
	if err != nil {
		return err
	}
	m := q.d.mem
	for _, s := range segments {
		if s.Write && !s.Same {
			m.zero(b.at+uint64(s.Offset), uint64(s.Length))
		}
	}
	var head uint16
	if len(segments) > 1 && len(segments) <= b.tableSize() {
		for i, s := range segments {
			b.describe(b.table+descriptorSize*uint64(i), s, i+1 < len(segments), uint16(i+1))
		}
		head = q.takeDescriptor()
		q.slots[head].more = false
		q.d.describe(q.desc+descriptorSize*uint64(head), b.table, uint32(descriptorSize*len(segments)), flagIndirect, 0)
	} else {
		// From the last to the first: each knows its successor then.
		for i := len(segments) - 1; i >= 0; i-- {
			id, more := q.takeDescriptor(), i+1 < len(segments)
			b.describe(q.desc+descriptorSize*uint64(id), segments[i], more, head)
			q.slots[id] = slot{next: head, more: more}
			head = id
		}
	}
	b.busy = true
	q.slots[head].buffer, q.slots[head].writable = b, writable
	m.Store16(q.head(q.next), head)
	q.next++
	q.pending++
	m.Store16(q.avail+ringIndex, q.next)
	return nil
}

// check checks what is to be added. The caller holds mu and life.
func (q *DriverQueue) check(b *Buffer, segments []Segment) (writable uint32, err error) {
	need := len(segments)
	if need > 1 && need <= b.tableSize() {
		need = 1
	}
	switch {
	case q.d.err != nil:
		return 0, q.d.err
	case b.busy || b.d != q.d:
		return 0, fmt.Errorf("virtqueue %d: expected a buffer of this driver that no queue has", q.index)
	case len(segments) == 0 || len(segments) > len(q.slots):
		return 0, fmt.Errorf("virtqueue %d: expected 1 to %d segments, found %d", q.index, len(q.slots), len(segments))
	case need > len(q.free):
		return 0, ErrQueueFull
	}
	for i, s := range segments {
		if s.Offset < 0 || s.Length < 1 || uint64(s.Offset) > b.n || uint64(s.Length) > b.n-uint64(s.Offset) {
			return 0, fmt.Errorf("virtqueue %d: buffer of %d bytes: expected a segment inside, found %d bytes at %d", q.index, b.n, s.Length, s.Offset)
		}
		if s.Write {
			writable += uint32(s.Length)
		} else if i > 0 && segments[i-1].Write {
			return 0, fmt.Errorf("virtqueue %d: expected segments to be read before those to be written", q.index)
		}
	}
	return writable, nil
}

func (q *DriverQueue) takeDescriptor() uint16 {
	id := q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	return id
}

// describe writes a descriptor of a part of the buffer.
func (b *Buffer) describe(at uint64, s Segment, more bool, next uint16) {
	var flags uint16
	if s.Write {
		flags = flagWrite
	}
	if more {
		flags |= flagNext
	} else {
		next = 0
	}
	b.d.describe(at, b.at+uint64(s.Offset), uint32(s.Length), flags, next)
}

func (d *Driver) describe(at, address uint64, n uint32, flags, next uint16) {
	d.mem.Store64(at, address)
	d.mem.Store64(at+8, uint64(n)|uint64(flags)<<32|uint64(next)<<48)
}

// Kick tells the device of what was added, if it wants to be told.
func (q *DriverQueue) Kick() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.d.life.RLock()
	defer q.d.life.RUnlock()
	if q.d.err != nil {
		return q.d.err
	}
	from := q.told
	if from == q.next {
		return nil
	}
	q.told = q.next
	m := q.d.mem
	// The index is there already. Stored in this way it is a full barrier
	// between it and the look at what the device asks for.
	m.Store32(q.avail, uint32(q.quiet)|uint32(q.next)<<16)
	if q.eventIdx {
		if !passed(m.load16(q.availEvent()), from, q.next) {
			return nil
		}
	} else if m.load16(q.used)&noNotify != 0 {
		return nil
	}
	return q.d.dev.Ring(q.d.peer, q.kick)
}

// Next returns the next buffer that the device is done with, and how many bytes
// it wrote to the parts to be written; it waits for one. It fails with the
// context's error, [ErrBackEndGone], [ErrNeedsReset], a *[ViolationError], or
// [os.ErrClosed].
func (q *DriverQueue) Next(ctx context.Context) (b *Buffer, written int, err error) {
	for {
		if q.d.spin > 0 {
			q.look(ctx)
		}
		if b, written, err = q.TryNext(); b != nil || err != nil {
			return b, written, err
		}
		if err := q.d.wait(ctx, q.vectors, q.ready); err != nil {
			return nil, 0, err
		}
		if q.d.look() {
			return nil, 0, q.d.ended()
		}
	}
}

// look looks for a buffer, but not for long, and asks for no interrupt meanwhile.
func (q *DriverQueue) look(ctx context.Context) {
	q.mu.Lock()
	taken, warm := q.taken, q.warm
	q.mu.Unlock()
	if !warm {
		return
	}
	warm = spin(ctx, q.d.spin, func() bool {
		q.d.life.RLock()
		defer q.d.life.RUnlock()
		return q.d.err != nil || q.d.mem.load16(q.used+ringIndex) != taken
	})
	q.mu.Lock()
	q.warm = warm
	q.mu.Unlock()
}

// TryNext is Next without waiting: it returns nil where there is no buffer.
func (q *DriverQueue) TryNext() (b *Buffer, written int, err error) {
	q.mu.Lock()
	b, written, err = q.pop()
	q.warm = q.warm || b != nil
	q.mu.Unlock()
	switch v, ok := err.(*ViolationError); {
	case err == errEmpty:
		return nil, 0, nil
	case ok:
		err = q.d.fail(v)
		q.d.dev.Recheck()
	}
	return b, written, err
}

// pop takes the next used buffer, or arranges for an interrupt when there is
// one. The caller holds mu.
func (q *DriverQueue) pop() (*Buffer, int, error) {
	q.d.life.RLock()
	defer q.d.life.RUnlock()
	if q.d.err != nil {
		return nil, 0, q.d.err
	}
	m := q.d.mem
	index := m.load16(q.used + ringIndex)
	if index == q.taken {
		if q.eventIdx {
			m.Store16(q.usedEvent(), q.taken+q.delay(q.pending))
		}
		q.quiet = 0
		m.Store32(q.avail, uint32(q.next)<<16) // a full barrier
		if index = m.load16(q.used + ringIndex); index == q.taken {
			return nil, 0, errEmpty
		}
	}
	violation := func(field string, v uint64, bound string, args ...any) error {
		return &ViolationError{q.index, field, v, fmt.Sprintf(bound, args...)}
	}
	if index-q.taken > q.pending {
		return nil, 0, violation("index of used buffers", uint64(index), "%d to %d, as many as were added", q.taken, q.taken+q.pending)
	}
	if !q.eventIdx && q.quiet == 0 {
		q.quiet = noInterrupt
		m.Store32(q.avail, noInterrupt|uint32(q.next)<<16)
	}
	at := q.done(q.taken)
	id := m.load32(at)
	if uint64(id) >= uint64(len(q.slots)) || q.slots[id].buffer == nil {
		return nil, 0, violation("used buffer", uint64(id), "the head of a buffer that was added")
	}
	s := &q.slots[id]
	written := m.load32(at + 4)
	if written > s.writable {
		return nil, 0, violation("length of a used buffer", uint64(written), "at most %d, as many as may be written", s.writable)
	}
	b := s.buffer
	b.busy, s.buffer = false, nil
	for d := uint16(id); ; d = q.slots[d].next {
		q.free = append(q.free, d)
		if !q.slots[d].more {
			break
		}
	}
	q.taken++
	q.pending--
	return b, int(written), nil
}
