package stream

import (
	"runtime"
	"sync/atomic"

	"github.com/ivshmem-go/ivshmem/shmem"
)

// sender writes records into the own ring of a connection. Positions count
// bytes and never wrap; where in the ring they are is their remainder.
type sender struct {
	ring  *shmem.ReadWrite
	words shmem.Words
	size  uint64
	block shmem.Words     // own control block
	peer  shmem.ReadWords // the peer's
	tail  uint64          // where the next record goes
	head  uint64          // how far the peer has read, as last seen

	// staged is the header of the first record that is written but not yet to
	// be seen, 0 if there is none, and stagedAt its position.
	staged, stagedAt uint64
}

// refresh looks how far the peer has read.
func (s *sender) refresh() error {
	head := s.peer.Load(slotHead)
	if head < s.head || head > s.tail || head%8 != 0 {
		return &ViolationError{Field: "position read", Value: head, Bound: "from what it was to what was written"}
	}
	s.head = head
	return nil
}

// free is how many bytes can be written, headers included, and the word of 0
// behind them.
func (s *sender) free() uint64 { return s.size - (s.tail - s.head) }

// room is how many bytes there are up to the end of the ring. It is at least
// the size of a header.
func (s *sender) room() uint64 { return s.size - s.tail&(s.size-1) }

// stage writes a record, which the peer does not see before commit. The caller
// has looked for room and free space.
func (s *sender) stage(p []byte, flags uint64) {
	s.words.Write(p, s.tail+recordHeader)
	s.stageHeader(uint64(len(p)), flags)
}

func (s *sender) stageHeader(n, flags uint64) {
	header := n | flags | recordValid
	next := s.tail + recordHeader + pad(n)
	if flags&recordFin == 0 {
		s.words.StoreRelaxed(next/8, 0)
	}
	if s.staged == 0 {
		s.staged, s.stagedAt = header, s.tail
	} else {
		s.words.StoreRelaxed(s.tail/8, header)
	}
	s.tail = next
}

// commit makes what was staged visible, and reports whether the peer waits for
// it and has to be rung.
func (s *sender) commit() (ring bool) {
	if s.staged == 0 {
		return false
	}
	s.words.Store(s.stagedAt/8, s.staged)
	s.staged = 0
	return passed(s.peer.Load(slotDataEvent), s.stagedAt, s.tail)
}

// passed reports whether going from one position to another passes an event.
func passed(event, from, to uint64) bool { return from < event && event <= to }

// receiver reads records from the peer's ring of a connection.
type receiver struct {
	ring  *shmem.ReadOnly
	words shmem.ReadWords
	size  uint64
	block shmem.Words     // own control block
	peer  shmem.ReadWords // the peer's
	head  uint64          // position of the record that is being read
	told  uint64          // the position that the peer knows

	n, off uint64 // bytes in that record, and how many of them were read
	flags  uint64 // of that record, 0: it was not looked at yet
	empty  bool   // that record has no meaning
	fin    bool   // nothing comes any more
	limit  uint64 // nothing that a lost peer wrote is behind it, 0: not known
}

// ready reports whether there is a record to read.
func (r *receiver) ready() bool { return r.flags != 0 || r.words.Load(r.head/8) != 0 }

// remains reports whether there is something to read of a peer that is lost:
// no more than a ring holds.
func (r *receiver) remains() bool {
	if r.limit == 0 {
		r.limit = r.head + r.size
	}
	return r.head < r.limit && r.ready()
}

// glances looks a few times for a record, or for a reason to stop: the loop
// whose speed is the latency of polling.
func (r *receiver) glances(stop *atomic.Uint32) bool {
	words, at := r.words, r.head/8
	for range spinStride {
		if words.Load(at) != 0 || stop.Load() != 0 {
			return true
		}
		shmem.Pause()
	}
	return false
}

// next looks at the record, if there is one.
func (r *receiver) next() (ok bool, err error) {
	if r.flags != 0 {
		return true, nil
	}
	header := r.words.Load(r.head / 8)
	if header == 0 {
		return false, nil
	}
	if err := checkRecord(header, r.head, r.size); err != nil {
		return false, err
	}
	// One is what there may be at the end of the ring. A ring of nothing else
	// would keep a reader going in circles.
	empty := header&recordPadding != 0 || header&(lengthMask|recordEnd|recordFin) == 0
	if empty && r.empty {
		return false, &ViolationError{Field: "record", Value: header, Bound: "something behind a record without meaning"}
	}
	r.empty = empty
	r.n, r.off, r.flags = header&lengthMask, 0, header&recordFlags
	return true, nil
}

// copy reads bytes of the record.
func (r *receiver) copy(p []byte) int {
	p = p[:min(uint64(len(p)), r.n-r.off)]
	r.words.Copy(p, r.head+recordHeader+r.off)
	r.off += uint64(len(p))
	return len(p)
}

// done ends the record. The peer learns of it at once only where that is
// due: telling it costs as much as a small message.
func (r *receiver) done() (ring bool) {
	r.head += recordHeader + pad(r.n)
	r.flags, r.n, r.off = 0, 0, 0
	if !tellLate || r.head-r.told >= r.size/8 {
		return r.tell()
	}
	return false
}

// tellLate says that a load follows earlier loads on this machine without more
// ado. Elsewhere the store of the own position keeps the order between reading
// a record and looking whether the connection is still the same.
const tellLate = runtime.GOARCH == "amd64"

// tell publishes the own position, and reports whether the peer waits for it
// and has to be rung. It has to be called before the reader waits, so that
// a peer that waits for room gets all there is.
func (r *receiver) tell() (ring bool) {
	from := r.told
	if from == r.head {
		return false
	}
	r.told = r.head
	r.block.Store(slotHead, r.head)
	return passed(r.peer.Load(slotSpaceEvent), from, r.head)
}
