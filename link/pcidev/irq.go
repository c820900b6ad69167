package pcidev

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// vectors are the MSI-X vectors of a function: the eventfds that the client
// gave for them. Its lock is taken inside the link's; nothing else is taken
// inside it.
type vectors struct {
	mu      sync.Mutex
	slots   []slot
	enabled bool // MSI-X Enable of the guest
}

// slot is one vector. QEMU withdraws eventfds for a moment when the guest
// changes its set of vectors; what is raised meanwhile is remembered and
// delivered when the eventfd comes back. A vector that never had an eventfd
// is not in use, and what is raised on it is lost.
type slot struct {
	out       *signaller
	withdrawn bool
	pending   bool
}

// Raise implements link.Interrupter.
func (v *vectors) Raise(vector uint16) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s := &v.slots[vector]; s.out != nil {
		s.out.signal()
	} else if s.withdrawn && v.enabled {
		s.pending = true
	}
}

// setEnabled follows the MSI-X Enable bit. Disabling forgets what is pending.
func (v *vectors) setEnabled(on bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.enabled = on
	if !on {
		v.forget()
	}
}

func (v *vectors) forget() {
	for i := range v.slots {
		v.slots[i].withdrawn, v.slots[i].pending = false, false
	}
}

// assign sets the eventfds of the vectors from start on; the descriptors
// belong to it from now on.
func (v *vectors) assign(start uint32, fds []int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i, fd := range fds {
		s := &v.slots[start+uint32(i)]
		old, pending := s.out, s.pending
		*s = slot{out: newSignaller(fd)}
		if old != nil {
			old.close()
		}
		if pending {
			s.out.signal()
		}
	}
}

// withdraw takes the eventfds of count vectors away.
func (v *vectors) withdraw(start, count uint32) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range v.slots[start : start+count] {
		s := &v.slots[start+uint32(i)]
		if s.out == nil {
			continue
		}
		s.out.close()
		s.out, s.withdrawn = nil, v.enabled
	}
}

// trigger raises vectors on the client's own request.
func (v *vectors) trigger(set vfiouser.IRQSet) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range set.Count {
		if set.Bools != nil && set.Bools[i] == 0 {
			continue
		}
		if s := v.slots[set.Start+i]; s.out != nil {
			s.out.signal()
		}
	}
}

// reset forgets what is pending; the eventfds stay, as the wire demands.
func (v *vectors) reset() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.enabled = false
	v.forget()
}

func (v *vectors) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range v.slots {
		if s := &v.slots[i]; s.out != nil {
			s.out.close()
			s.out = nil
		}
	}
}

// signaller writes an eventfd that came from a client. One that is
// non-blocking is written at once. A blocking one could be filled by the
// client to stop whoever raises, so it is written by a goroutine that can
// stop nobody else; events coalesce, as they do in an eventfd.
type signaller struct {
	fd   int
	kick chan struct{} // nil for a non-blocking eventfd
}

func newSignaller(fd int) *signaller {
	s := &signaller{fd: fd}
	if evfd.NonBlocking(fd) {
		return s
	}
	s.kick = make(chan struct{}, 1)
	go func() {
		defer unix.Close(fd)
		for range s.kick {
			evfd.Signal(fd)
		}
	}()
	return s
}

// signal never blocks. An error means that the client gave no eventfd, or one
// that it broke: its own interrupts are lost, nothing else.
func (s *signaller) signal() {
	if s.kick == nil {
		evfd.Signal(s.fd)
		return
	}
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (s *signaller) close() {
	if s.kick == nil {
		unix.Close(s.fd)
		return
	}
	// A full counter may hold the goroutine in its write: make room. The
	// goroutine closes the descriptor, but not before kick is closed.
	p := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN | unix.POLLOUT}}
	if n, _ := unix.Poll(p, 0); n == 1 && p[0].Revents&(unix.POLLIN|unix.POLLOUT) == unix.POLLIN {
		var b [8]byte
		unix.Read(s.fd, b[:])
	}
	close(s.kick)
}
