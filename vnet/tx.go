package vnet

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/ivshmem-go/ivshmem/shmem"
)

// errFull says that there is no room for a frame yet.
var errFull = errors.New("no room")

// lookEvery is how many frames are sent before the sender looks whether some
// came back, unless it needs their room: the index is in the peer's cache.
const lookEvery = 32

// sender is the own queue. Its descriptors are used in turn, so the number of a
// descriptor is that of its entry in the ring, and of its frame.
type sender struct {
	queue
	observer    observer
	own         *shmem.ReadWrite
	descriptors shmem.Words // of own
	peer        *shmem.ReadOnly
	header      uint64
	size        uint64 // of the data
	most        uint64 // length of a frame
	ring        func() // the peer's doorbell

	mu sync.Mutex
	// Below: with mu held.
	err      error // why nothing works any more
	carrier  bool
	session  uint32 // how often the queue was made empty
	next     uint16 // index of the next frame
	told     uint16 // index up to which the peer was told
	done     uint16 // index of the oldest frame that did not come back
	looked   uint16 // next, when the peer's index was last looked at
	head     uint64 // where the next frame goes, counted from header
	tail     uint64 // where the oldest one is
	at       []uint64
	reserved bool
	position uint64   // of what is reserved
	more     []uint64 // of all that is
	// What is waited for: an index to be passed, in a session.
	event, asleep uint16
	waiting       uint32
	stats         SendStats
}

// empty makes the queue empty, after the section was cleared. The caller holds
// mu.
func (t *sender) empty() {
	t.session++
	t.next, t.told, t.done, t.looked = 0, 0, 0, 0
	t.head, t.tail, t.reserved = 0, 0, false
}

// outstanding is the number of frames that did not come back.
func (t *sender) outstanding() uint16 { return t.next - t.done }

// place finds room for the longest frame.
func (t *sender) place() (position uint64, ok bool) {
	switch {
	case t.outstanding() == 0:
		// Not only where there is most room: if it went on from the middle of
		// a section that has room for few frames, nothing might ever fit.
		t.head, t.tail = 0, 0
		return 0, true
	case t.outstanding() > t.mask:
		return 0, false
	case t.head > t.tail && t.size-t.head >= t.most:
		return t.head, true
	case t.head > t.tail && t.tail >= t.most:
		return 0, true
	case t.head <= t.tail && t.tail-t.head >= t.most:
		return t.head, true
	}
	return 0, false
}

// reserve finds room, or arranges for the peer to ring when there is, and
// returns errFull.
func (t *sender) reserve() error {
	if t.err != nil {
		return t.err
	}
	if !t.carrier {
		return ErrNoCarrier
	}
	if t.next-t.looked >= lookEvery {
		if err := t.reclaim(); err != nil {
			return err
		}
	}
	var ok bool
	if t.position, ok = t.place(); ok {
		return nil
	}
	if err := t.reclaim(); err != nil {
		return err
	}
	if t.position, ok = t.place(); ok {
		return nil
	}
	t.flush()
	t.arm()
	return errFull
}

// arm asks for a doorbell when half of what is outstanding came back. Who waits
// now looks again first: see ready.
func (t *sender) arm() {
	t.event = t.done + (t.outstanding()-1)/2
	t.asleep, t.waiting = t.done, t.session
	t.own.Store32(t.usedEvent, uint32(t.event)) // a full barrier
	t.stats.Waits++
}

// ready reports whether who waits for room has to look again.
func (t *sender) ready() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil || !t.carrier || t.session != t.waiting {
		return true
	}
	used, err := loadIndex(t.peer, t.used)
	return err != nil || used-t.asleep > t.event-t.asleep
}

// reclaim takes the frames that came back. They do so in order.
func (t *sender) reclaim() error {
	t.looked = t.next
	used, err := loadIndex(t.peer, t.used)
	if err != nil {
		return err
	}
	if used-t.done > t.outstanding() {
		return &ViolationError{Field: fieldUsedIndex, Value: uint64(used), Bound: fmt.Sprintf("%d to %d, as many as were sent", t.done, t.next)}
	}
	for t.done != used {
		entry := t.used + ringOffset + 8*uint64(t.done&t.mask)
		id, _ := t.peer.Load32(entry)
		if id != uint32(t.done&t.mask) {
			return &ViolationError{Field: fieldUsedID, Value: uint64(id), Bound: fmt.Sprintf("%d, whose turn it is", t.done&t.mask)}
		}
		if n, _ := t.peer.Load32(entry + 4); n != 1 {
			return &ViolationError{Field: fieldUsedLength, Value: uint64(n), Bound: "1"}
		}
		t.done++
		t.tail = t.at[t.done&t.mask]
	}
	return nil
}

// check checks the length of a frame.
func (t *sender) check(n int) error {
	if n < headerLength || uint64(n) > t.most {
		t.stats.Size++
		return &FrameSizeError{Length: n, Max: int(t.most)}
	}
	return nil
}

// commit publishes the frame of n bytes that is in the reserved place.
func (t *sender) commit(n int) {
	id := t.next & t.mask
	t.at[id] = t.position
	if t.outstanding() == 0 {
		t.tail = t.position
	}
	t.head = t.position + align(uint64(n))
	t.descriptors.StoreRelaxed(2*uint64(id), t.header+t.position)
	t.descriptors.StoreRelaxed(2*uint64(id)+1, uint64(n)) // flags and next are 0
	t.own.Store16(t.avail+ringOffset+2*uint64(id), id)
	t.next++
	t.own.Store16(t.avail+indexOffset, t.next)
	t.reserved = false
	t.stats.Frames++
	t.stats.Bytes += uint64(n)
	t.observer.frame(t.own, t.header+t.position, uint64(n), Frame{Sent: true})
}

// flush rings the peer if it asked for that.
func (t *sender) flush() {
	if t.told == t.next {
		return
	}
	// The index is there already. Stored in this way it is a full barrier, which
	// has to be between it and the look at what the peer asks for.
	t.own.Store32(t.avail, uint32(t.next)<<16)
	event, err := t.peer.Load32(t.availEvent)
	if err == nil && passed(uint16(event), t.told, t.next) {
		t.stats.Doorbells++
		t.ring()
	}
	t.told = t.next
}

// UnsafeReserve returns room for a frame, MTU + 18 bytes in the own output section
// itself, so that it need not be copied: it is sent by UnsafeCommit. It waits
// for room, and fails with [ErrNoCarrier] where there is nobody to send to, a
// *[ViolationError], the context's error, or [os.ErrClosed]. A context that has
// ended keeps it from waiting, not from returning room that is there.
//
// The peer can see the bytes already, and where it is a host process change
// them. On arm64 they may be device memory, which unaligned accesses, and those
// that clear memory, fault on. Nobody else may send until UnsafeCommit; another
// UnsafeReserve returns the same room, and Send takes it. The slice
// must not be used after UnsafeCommit or Close.
func (l *Link) UnsafeReserve(ctx context.Context) ([]byte, error) {
	t := &l.tx
	for {
		t.mu.Lock()
		err := error(nil)
		if !t.reserved {
			err = t.reserve()
		}
		if err == nil {
			var p []byte
			if p, err = t.own.UnsafeBytes(t.header+t.position, t.most); err == nil {
				t.reserved = true
				t.more = append(t.more[:0], t.position)
				t.mu.Unlock()
				return p, nil
			}
		}
		session := t.session
		t.mu.Unlock()
		if err = l.wait(ctx, err, session, l.txReady); err != nil {
			return nil, err
		}
	}
}

// UnsafeCommit sends the first n bytes of what UnsafeReserve returned. The peer
// may see them at once, or after Flush. It fails with *[FrameSizeError], and
// what is reserved stays so, or with [ErrReset].
func (l *Link) UnsafeCommit(n int) error { return l.UnsafeCommitAll([]int{n}) }

// Flush rings the peer if it waits for what was committed. It has to follow the
// last frame of a batch.
func (l *Link) Flush() {
	l.tx.mu.Lock()
	defer l.tx.mu.Unlock()
	if l.tx.carrier {
		l.tx.flush()
	}
}

// Send sends a copy of a frame. It waits for room as UnsafeReserve does, and
// fails as it does, or with a *[FrameSizeError].
func (l *Link) Send(ctx context.Context, frame []byte) error {
	if err := l.put(ctx, frame); err != nil {
		return err
	}
	l.Flush()
	return nil
}

// SendAll sends copies of frames with one doorbell at most, unless it has to
// wait for room. It returns how many were sent.
func (l *Link) SendAll(ctx context.Context, frames [][]byte) (int, error) {
	defer l.Flush()
	for i, frame := range frames {
		if err := l.put(ctx, frame); err != nil {
			return i, err
		}
	}
	return len(frames), nil
}

func (l *Link) put(ctx context.Context, frame []byte) error {
	t := &l.tx
	for {
		t.mu.Lock()
		err := t.check(len(frame))
		if err != nil {
			t.observer.dropped(true, frame, "length")
			t.mu.Unlock()
			return err
		}
		if err = t.reserve(); err == nil {
			if _, err = t.own.WriteAt(frame, int64(t.header+t.position)); err == nil {
				t.commit(len(frame))
				t.mu.Unlock()
				return nil
			}
		}
		if err == ErrNoCarrier {
			t.stats.NoCarrier++
			t.observer.dropped(true, frame, "no carrier")
		}
		session := t.session
		t.mu.Unlock()
		if err = l.wait(ctx, err, session, l.txReady); err != nil {
			return err
		}
	}
}
