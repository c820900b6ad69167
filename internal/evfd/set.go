package evfd

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Interrupts is how a back end's interrupts reach the process. The
// descriptors stay the back end's.
type Interrupts struct {
	// FDs has a descriptor for each vector from 0 on. Where it has fewer than
	// the device has vectors, the others' interrupts are lost. Empty: the
	// back end has no interrupts, it can only be polled.
	FDs []int
	// UIO says that FDs are UIO device files, of which a read returns a
	// 32-bit total; otherwise they are non-blocking eventfds.
	UIO bool
	// Shared says that the one descriptor in FDs counts the interrupts of all
	// vectors, and that the driver behind it has switched one-shot mode on.
	Shared bool
	// Rearm lets the next interrupt through, where each masks its descriptor:
	// INTx. It follows a write to Interrupt Control, never precedes it: an
	// emulator may hold the line until a register is accessed, and a line
	// that is let through before that ends in a storm. nil: nothing to do.
	Rearm func() error
	// Vectors is the number of the device's vectors, where the driver knows
	// it; 0: the configuration space tells.
	Vectors int
	// Gone tells when the device goes away.
	Gone Source
}

// OneShot reports whether one-shot mode has to be on, so that every interrupt
// is followed by a write to Interrupt Control.
func (i Interrupts) OneShot() bool { return i.Shared || i.Rearm != nil }

// Source is a descriptor, and the events of epoll(7) to look for: EPOLLRDHUP of
// a socket, EPOLLIN of an eventfd. Without events there is none.
type Source struct {
	FD     int
	Events uint32
}

// Sleep is a way to sleep until a descriptor is ready.
type Sleep int

const (
	// SleepThread blocks the calling thread in the kernel. Waking up is
	// about twice as fast as through Go's poller.
	SleepThread Sleep = iota
	// SleepPoller parks the goroutine in Go's poller and costs no thread.
	SleepPoller
)

// Set is a set of descriptors to sleep on, for one sleeper at a time.
type Set struct {
	epfd int
	how  Sleep
	file *os.File // SleepPoller: the same epoll instance in Go's poller
	raw  syscall.RawConn
	ev   [16]unix.EpollEvent
	n    int
	err  error
	soon bool                  // the last sleep of SleepThread was brief
	poll func(fd uintptr) bool // bound once, so that sleeping does not allocate

	closed atomic.Bool
}

// NewSet returns an empty set to sleep on in a way.
func NewSet(how Sleep) (*Set, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	procs.Store(int32(runtime.GOMAXPROCS(0)))
	s := &Set{epfd: epfd, how: how}
	if how == SleepThread {
		// Not in Go's poller: it would wake a thread for each event besides.
		return s, nil
	}
	// An epoll descriptor is pollable itself, which is how the whole set
	// gets into Go's poller as one descriptor.
	if err := unix.SetNonblock(epfd, true); err != nil {
		unix.Close(epfd)
		return nil, err
	}
	s.file = os.NewFile(uintptr(epfd), "epoll")
	if s.raw, err = s.file.SyscallConn(); err != nil {
		s.file.Close()
		return nil, err
	}
	s.poll = func(fd uintptr) bool {
		s.n, s.err = Wait(int(fd), s.ev[:], 0)
		return s.n != 0 || s.err != nil
	}
	return s, nil
}

// Add adds a descriptor; tag names it in the result of Wait. Events are those
// of epoll; errors and hang-up are always reported.
func (s *Set) Add(fd int, events uint32, tag int32) error {
	ev := unix.EpollEvent{Events: events, Fd: tag}
	if err := unix.EpollCtl(s.epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("watch descriptor: %w", err)
	}
	return nil
}

// Wait sleeps until a descriptor is ready and returns what is. The result is
// valid until the next call. After Close, and when Close ends the sleep, it
// fails with os.ErrClosed.
func (s *Set) Wait() ([]unix.EpollEvent, error) {
	if s.closed.Load() {
		return nil, os.ErrClosed
	}
	if s.how == SleepThread {
		return s.block()
	}
	if err := s.raw.Read(s.poll); err != nil {
		// The poller's own error for this is none that others can name.
		if s.closed.Load() {
			return nil, os.ErrClosed
		}
		return nil, err
	}
	return s.ev[:max(s.n, 0)], s.err
}

// block sleeps in the kernel. While interrupts come soon after one another it
// does so behind the scheduler's back at first: as in a loop that looks, the
// thread keeps what it needs to run Go code, but leaves the CPU to others.
// Otherwise the scheduler takes that away after 20 us, in a thread of its own
// that has to be woken each time: half the time of a round trip, where the
// process has one CPU.
// It does so only while something is left for others to run Go code with.
func (s *Set) block() ([]unix.EpollEvent, error) {
	if s.soon {
		var n int
		var err error
		tried := keeping.Add(1) < procs.Load()
		if tried {
			n, err = waitBriefly(s.epfd, s.ev[:])
		}
		keeping.Add(-1)
		if n != 0 || err != nil {
			return s.ev[:max(n, 0)], err
		}
		s.soon = !tried
	}
	start := time.Now()
	n, err := Wait(s.epfd, s.ev[:], -1)
	s.soon = time.Since(start) < brief
	return s.ev[:max(n, 0)], err
}

// brief is how long that may take: others who want to run Go code may have to
// wait as long.
const brief = 200 * time.Microsecond

var (
	keeping atomic.Int32 // threads that sleep so
	procs   atomic.Int32 // GOMAXPROCS, when the last set was made
)

// waitBriefly is Wait for at most that long. A signal ends it: the runtime
// stops threads by one, which may then stop at the return.
func waitBriefly(epfd int, ev []unix.EpollEvent) (int, error) {
	timeout := unix.NsecToTimespec(int64(brief))
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT2, uintptr(epfd), uintptr(unsafe.Pointer(&ev[0])), uintptr(len(ev)),
		uintptr(unsafe.Pointer(&timeout)), 0, 0)
	switch errno {
	case 0:
		return int(n), nil
	case unix.EINTR, unix.ENOSYS: // ENOSYS: before Linux 5.11
		return 0, nil
	}
	return 0, errno
}

// Close closes the set, not its descriptors. Nobody may be sleeping in it by
// SleepThread.
func (s *Set) Close() error {
	s.closed.Store(true)
	if s.how == SleepThread {
		return unix.Close(s.epfd)
	}
	return s.file.Close()
}
