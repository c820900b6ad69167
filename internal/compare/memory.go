package compare

import (
	"encoding/binary"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Memory: for each direction a futex, how many messages its reader has read,
// and a ring of slots. A slot has the number of its message, and the bytes.
const (
	lineSize   = 128 // two cache lines: processors fetch them in pairs
	futexAt    = 0
	readAt     = lineSize // written by the direction's reader, into its own half
	firstSlot  = 2 * lineSize
	dataAt     = 8         // in a slot
	ringBudget = 256 << 10 // bytes of a ring of more than minSlots
	minSlots   = 4
	maxSlots   = 64
)

func slotSize(size int) int { return (dataAt + size + lineSize - 1) &^ (lineSize - 1) }

func slots(size int) int { return min(max(ringBudget/slotSize(size), minSlots), maxSlots) }

func halfSize(size int) int { return (firstSlot + slots(size)*slotSize(size) + 4095) &^ 4095 }

func memory(size int) (p pair, err error) {
	for side := range p {
		fd := 0
		if side == 0 {
			if fd, err = unix.MemfdCreate("compare", unix.MFD_CLOEXEC); err == nil {
				err = unix.Ftruncate(fd, int64(2*halfSize(size)))
			}
		} else {
			fd, err = unix.FcntlInt(p[0][0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
		}
		if err != nil {
			return p, os.NewSyscallError("memory", err)
		}
		p.add(side, fd, "memory")
	}
	return p, nil
}

// memoryEventfds adds an eventfd for each direction, blocking.
func memoryEventfds(size int) (pair, error) {
	p, err := memory(size)
	if err != nil {
		return p, err
	}
	for range 2 {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return p, os.NewSyscallError("eventfd", err)
		}
		p.add(0, fd, "eventfd")
		other, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return p, os.NewSyscallError("fcntl", err)
		}
		p.add(1, other, "eventfd")
	}
	return p, nil
}

// mapMemory maps the first of a side's descriptors, and returns the half that
// it writes and the one that it reads.
func mapMemory(s *Side) (all, out, in []byte, err error) {
	half := halfSize(s.Size)
	all, err = unix.Mmap(s.Files[0], 0, 2*half, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, nil, nil, os.NewSyscallError("mmap", err)
	}
	unix.Close(s.take(0))
	out, in = all[:half:half], all[half:]
	if s.Index == 1 {
		out, in = in, out
	}
	return all, out, in, nil
}

// lineEnd is a word each way, and nothing else: the message is the word. Two
// messages in a row must differ.
type lineEnd struct {
	all     []byte
	out, in *atomic.Uint64
	last    uint64
	yield   bool
}

func attachLine(s *Side) (End, error) {
	all, out, in, err := mapMemory(s)
	if err != nil {
		return nil, err
	}
	return &lineEnd{all: all, out: word64(out, firstSlot), in: word64(in, firstSlot), yield: s.Yield}, nil
}

func (e *lineEnd) Send(p []byte) error {
	e.out.Store(binary.LittleEndian.Uint64(p))
	return nil
}

func (e *lineEnd) Receive(p []byte) error {
	last := e.last
	for e.last = e.in.Load(); e.last == last; e.last = e.in.Load() {
		if e.yield {
			yield()
		}
	}
	binary.LittleEndian.PutUint64(p, e.last)
	return nil
}

func (e *lineEnd) Close() error { return unix.Munmap(e.all) }

// yield lets the other process have the CPU. Yielding to Go's scheduler would
// hand the thread over.
func yield() { unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// bell is how an end waits for the other to write.
type bell interface {
	// ring tells the other end that there is a message.
	ring() error
	// wait waits until the word has a value.
	wait(w *atomic.Uint64, value uint64) error
	close() error
}

// memoryEnd copies messages into slots and out of them. Each side reads the
// other's positions as rarely as it can, as each look may fetch a cache line.
type memoryEnd struct {
	all, out, in   []byte
	slots          uint64
	size           int // of a slot
	sent, received uint64
	seen           uint64 // what the other had read when it was looked at last
	bell           bell
	yield          bool
}

func attachMemory(newBell func(s *Side, out, in []byte) bell) func(*Side) (End, error) {
	return func(s *Side) (End, error) {
		all, out, in, err := mapMemory(s)
		if err != nil {
			return nil, err
		}
		return &memoryEnd{
			all: all, out: out, in: in, slots: uint64(slots(s.Size)), size: slotSize(s.Size),
			bell: newBell(s, out, in), yield: s.Yield,
		}, nil
	}
}

func (e *memoryEnd) Send(p []byte) error {
	for e.sent-e.seen == e.slots {
		if e.seen = word64(e.in, readAt).Load(); e.sent-e.seen == e.slots && e.yield {
			yield()
		}
	}
	at := firstSlot + int(e.sent%e.slots)*e.size
	e.sent++
	copy(e.out[at+dataAt:], p)
	word64(e.out, at).Store(e.sent)
	return e.bell.ring()
}

func (e *memoryEnd) Receive(p []byte) error {
	at := firstSlot + int(e.received%e.slots)*e.size
	e.received++
	if err := e.bell.wait(word64(e.in, at), e.received); err != nil {
		return err
	}
	copy(p, e.in[at+dataAt:])
	if e.received%(e.slots/minSlots) == 0 {
		word64(e.out, readAt).Store(e.received)
	}
	return nil
}

func (e *memoryEnd) Close() error {
	err := e.bell.close()
	if merr := unix.Munmap(e.all); err == nil {
		err = merr
	}
	return err
}

// look looks all the time.
type look struct{ yields bool }

func looks(s *Side, _, _ []byte) bell { return look{s.Yield} }

func (look) ring() error { return nil }

func (l look) wait(w *atomic.Uint64, value uint64) error {
	for w.Load() != value {
		if l.yields {
			yield()
		}
	}
	return nil
}

func (look) close() error { return nil }
