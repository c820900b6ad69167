package compare

import (
	"encoding/binary"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// futex wakes by FUTEX_WAKE on a word of memory.
type futex struct{ out, in *atomic.Uint32 }

// Operations of futex(2), on memory of several processes.
const (
	futexWait = 0
	futexWake = 1
)

func futexes(_ *Side, out, in []byte) bell { return futex{word32(out, futexAt), word32(in, futexAt)} }

func (f futex) ring() error {
	f.out.Add(1)
	_, _, errno := unix.Syscall6(unix.SYS_FUTEX, address(f.out), futexWake, 1, 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("futex", errno)
	}
	return nil
}

func (f futex) wait(w *atomic.Uint64, value uint64) error {
	for {
		rung := f.in.Load()
		if w.Load() == value {
			return nil
		}
		_, _, errno := unix.Syscall6(unix.SYS_FUTEX, address(f.in), futexWait, uintptr(rung), 0, 0, 0)
		if errno != 0 && errno != unix.EAGAIN && errno != unix.EINTR {
			return os.NewSyscallError("futex", errno)
		}
	}
}

func (futex) close() error { return nil }

// eventfd blocks the thread in a read.
type eventfd struct{ out, in int }

// eventfds takes the second and third descriptor: side 0 writes the second.
func eventfds(s *Side, _, _ []byte) bell {
	b := eventfd{s.take(1), s.take(2)}
	if s.Index == 1 {
		b.out, b.in = b.in, b.out
	}
	return b
}

// one is what is added to an eventfd.
var one = binary.NativeEndian.AppendUint64(nil, 1)

func (b eventfd) ring() error { return writeAll(b.out, one) }

func (b eventfd) wait(w *atomic.Uint64, value uint64) error {
	var count [8]byte
	for w.Load() != value {
		if err := readAll(b.in, count[:]); err != nil {
			return err
		}
	}
	return nil
}

func (b eventfd) close() error {
	err := unix.Close(b.out)
	if ierr := unix.Close(b.in); err == nil {
		err = ierr
	}
	return err
}

// pollerEventfd parks the goroutine in Go's poller.
type pollerEventfd struct{ out, in *os.File }

func pollerEventfds(s *Side, out, in []byte) bell {
	b := eventfds(s, out, in).(eventfd)
	// The poller takes descriptors that do not block only.
	unix.SetNonblock(b.out, true)
	unix.SetNonblock(b.in, true)
	return pollerEventfd{os.NewFile(uintptr(b.out), "eventfd"), os.NewFile(uintptr(b.in), "eventfd")}
}

func (b pollerEventfd) ring() error {
	_, err := b.out.Write(one)
	return err
}

func (b pollerEventfd) wait(w *atomic.Uint64, value uint64) error {
	var count [8]byte
	for w.Load() != value {
		if _, err := b.in.Read(count[:]); err != nil {
			return err
		}
	}
	return nil
}

func (b pollerEventfd) close() error {
	err := b.out.Close()
	if ierr := b.in.Close(); err == nil {
		err = ierr
	}
	return err
}
