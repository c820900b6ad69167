package pcidev

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// vectors are the MSI-X vectors of a function: the eventfds that the client
// gave for them. Its lock is taken inside the link's; nothing else is taken
// inside it.
type vectors struct {
	mu      sync.Mutex
	slots   []slot
	enabled bool // MSI-X Enable of the guest
	out     *signaller
}

func newVectors(n uint16, file int) (*vectors, error) {
	out, err := newSignaller(file)
	if err != nil {
		return nil, err
	}
	v := &vectors{slots: make([]slot, n), out: out}
	for i := range v.slots {
		v.slots[i].fd = -1
	}
	return v, nil
}

// slot is one vector. QEMU withdraws eventfds for a moment when the guest
// changes its set of vectors; what is raised meanwhile is remembered and
// delivered when the eventfd comes back. A vector that never had an eventfd
// is not in use, and what is raised on it is lost.
type slot struct {
	fd        int // the eventfd, -1: none
	withdrawn bool
	pending   bool
}

// Raise implements link.Interrupter.
func (v *vectors) Raise(vector uint16) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s := &v.slots[vector]; s.fd >= 0 {
		v.signal(s)
	} else if s.withdrawn && v.enabled {
		s.pending = true
	}
}

// signal raises a vector that has an eventfd. An error means that the client
// broke it: its own interrupts are lost, nothing else. v.mu is held.
func (v *vectors) signal(s *slot) { _ = v.out.signal(s.fd) }

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
		old := *s
		*s = slot{fd: fd}
		if old.fd >= 0 {
			unix.Close(old.fd)
		}
		if old.pending {
			v.signal(s)
		}
	}
}

// withdraw takes the eventfds of count vectors away.
func (v *vectors) withdraw(start, count uint32) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range v.slots[start : start+count] {
		s := &v.slots[start+uint32(i)]
		if s.fd < 0 {
			continue
		}
		unix.Close(s.fd)
		s.fd, s.withdrawn = -1, v.enabled
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
		if s := &v.slots[set.Start+i]; s.fd >= 0 {
			v.signal(s)
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
		if s := &v.slots[i]; s.fd >= 0 {
			unix.Close(s.fd)
			s.fd = -1
		}
	}
	v.out.close()
}
