package vnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/ivshmem-go/ivshmem/shmem"
)

var (
	// errEmpty says that there is no frame yet.
	errEmpty = errors.New("no frame")
	// errBudget says that a call dropped so many frames that it should see
	// whether it is still wanted.
	errBudget = errors.New("too many frames without meaning")
)

// budget is how many frames are dropped in one go.
const budget = 64

// receiver is the peer's queue.
type receiver struct {
	queue
	observer    observer
	own         *shmem.ReadWrite
	descriptors shmem.ReadWords // of peer
	peer        *shmem.ReadOnly
	header      uint64
	output      uint64 // size of the section
	ring        func() // the peer's doorbell

	mu sync.Mutex
	// Below: with mu held.
	err     error // why nothing works any more
	running bool
	session uint32  // how often the queue was made empty
	next    uint16  // index of the frame whose turn it is; those before were returned
	limit   uint16  // the peer's index, as last seen
	held    bool    // by the caller of UnsafePeek
	frame   frame   // what is held
	waiting uint32  // session in which the caller of UnsafePeek got it
	ahead   []frame // held besides, behind it
	stats   ReceiveStats
}

// frame is where a frame is in the peer's section.
type frame struct {
	id     uint16 // as the peer wrote it
	at     uint64
	length uint64
}

// empty makes the queue empty. The caller holds mu.
func (r *receiver) empty() {
	r.session++
	r.next, r.limit = 0, 0
}

// peek finds the next frame, or arranges for the peer to ring when there is
// one, and returns errEmpty.
func (r *receiver) peek() (frame, error) {
	for range budget {
		if r.err != nil {
			return frame{}, r.err
		}
		if !r.running {
			return frame{}, errEmpty
		}
		if r.next == r.limit {
			if err := r.look(); err != nil {
				return frame{}, err
			}
		}
		if r.next == r.limit {
			// A full barrier. Who waits now looks again first: see ready.
			r.own.Store32(r.availEvent, uint32(r.next))
			return frame{}, errEmpty
		}
		f, cause := r.read()
		if cause == nil {
			return f, nil
		}
		*cause++
		r.observer.dropped(false, nil, r.stats.reason(cause))
		r.finish(f)
	}
	return frame{}, errBudget
}

// look takes the peer's index.
func (r *receiver) look() error {
	limit, err := loadIndex(r.peer, r.avail)
	if err != nil {
		return err
	}
	if limit-r.next > r.mask+1 {
		return &ViolationError{Field: fieldAvailIndex, Value: uint64(limit), Bound: fmt.Sprintf("%d to %d, no more than the queue has entries", r.next, r.next+r.mask+1)}
	}
	r.limit = limit
	return nil
}

// read reads the descriptor whose turn it is: once, since the peer may change
// it. Where the frame has to be dropped, cause counts why.
func (r *receiver) read() (f frame, cause *uint64) {
	f.id, _ = r.peer.Load16(r.avail + ringOffset + 2*uint64(r.next&r.mask))
	if f.id > r.mask {
		return f, &r.stats.Index
	}
	f.at = r.descriptors.Load(2 * uint64(f.id))
	word := r.descriptors.Load(2*uint64(f.id) + 1)
	f.length = word & (1<<32 - 1)
	switch {
	case word>>32&0xffff != 0:
		return f, &r.stats.Flags
	case f.at < r.header || f.at >= r.output:
		return f, &r.stats.Address
	case f.length > r.output-f.at || f.length > MaxFrame:
		return f, &r.stats.Length
	case f.length < headerLength:
		return f, &r.stats.Short
	}
	return f, nil
}

// finish returns a frame to the peer.
func (r *receiver) finish(f frame) {
	// An entry is a 32-bit descriptor number and a length, which is 1. Their
	// upper halves are 0 since the section was cleared. Plain moves are enough:
	// nobody looks before the index.
	entry := r.used + ringOffset + 8*uint64(r.next&r.mask)
	r.own.Store16(entry, f.id)
	r.own.Store16(entry+4, 1)
	r.next++
	r.own.Store32(r.used, uint32(r.next)<<16) // a full barrier
	event, err := r.peer.Load32(r.usedEvent)
	if err == nil && passed(uint16(event), r.next-1, r.next) {
		r.stats.Doorbells++
		r.ring()
	}
}

// ready reports whether who waits for a frame has to look again.
func (r *receiver) ready() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil || !r.running {
		return r.err != nil
	}
	limit, err := loadIndex(r.peer, r.avail)
	return err != nil || limit != r.next
}

// UnsafePeek returns the next frame in the peer's output section itself, which
// is read-only. It waits for one, and fails with a *[ViolationError], the
// context's error, or [os.ErrClosed]. A context that has ended keeps it from
// waiting, not from returning a frame that is there.
//
// The peer can change the bytes at any time: whoever looks at one twice may
// see two. The frame stays the next one until UnsafeRelease; the slice must not
// be used after that, or after Close.
func (l *Link) UnsafePeek(ctx context.Context) ([]byte, error) {
	r := &l.rx
	for {
		r.mu.Lock()
		var err error
		if !r.held || r.waiting != r.session {
			r.held = false
			r.frame, err = r.peek()
		}
		if err == nil {
			var p []byte
			if p, err = r.peer.UnsafeBytes(r.frame.at, r.frame.length); err == nil {
				r.held, r.waiting = true, r.session
				r.mu.Unlock()
				return p, nil
			}
		}
		session := r.session
		r.mu.Unlock()
		if err = l.wait(ctx, err, session, l.rxReady); err != nil {
			return nil, err
		}
	}
}

// UnsafeRelease returns the frame that UnsafePeek gave to the peer. [ErrReset]
// says that its bytes may have been anything.
func (l *Link) UnsafeRelease() error { return l.UnsafeReleaseAll(1) }

func (r *receiver) count() {
	r.stats.Frames++
	r.stats.Bytes += r.frame.length
	r.observer.frame(r.peer, r.frame.at, r.frame.length, Frame{})
}

// Receive copies the next frame into p and returns its length. It waits as
// UnsafePeek does, and fails as it does. A frame that is longer than p is
// dropped, with [io.ErrShortBuffer]; none is longer than [MaxFrame].
func (l *Link) Receive(ctx context.Context, p []byte) (int, error) {
	r := &l.rx
	for {
		r.mu.Lock()
		var err error
		r.held = false
		if r.frame, err = r.peek(); err == nil {
			n, err := r.copy(p)
			r.mu.Unlock()
			return n, err
		}
		session := r.session
		r.mu.Unlock()
		if err = l.wait(ctx, err, session, l.rxReady); err != nil {
			return 0, err
		}
	}
}

func (r *receiver) copy(p []byte) (int, error) {
	n := int(r.frame.length)
	if n > len(p) {
		r.stats.ShortBuffer++
		r.observer.frame(r.peer, r.frame.at, r.frame.length, Frame{Dropped: "longer than the receiver's buffer"})
		r.finish(r.frame)
		return 0, io.ErrShortBuffer
	}
	if _, err := r.peer.ReadAt(p[:n], int64(r.frame.at)); err != nil {
		return 0, err
	}
	r.count()
	r.finish(r.frame)
	return n, nil
}
