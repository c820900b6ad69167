package pcidev

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// vectors are the interrupts of a function: MSI-X vectors, or INTx as the only
// one. It holds the eventfds that the client gave for them. Its lock is taken
// inside the link's; nothing else is taken inside it.
type vectors struct {
	mu      sync.Mutex
	slots   []slot
	enabled bool // MSI-X Enable of the guest
	out     *evfd.Signaller

	// INTx only. A level needs a reason to stay asserted, which the kernel
	// and QEMU look for in Interrupt Status; the specification has none.
	intx     bool
	disabled bool // Command, Interrupt Disable
	status   bool // Status, Interrupt Status
	// credit is how often an interrupt is raised again that was unmasked
	// without having been acknowledged: QEMU takes any access to a BAR for
	// its end, also one that came before the guest took the interrupt. A
	// driver that never acknowledges has none: it would be stormed.
	credit int
}

func newVectors(n uint16, intx bool, file int) (*vectors, error) {
	out, err := evfd.NewSignaller(file)
	if err != nil {
		return nil, err
	}
	v := &vectors{slots: make([]slot, n), out: out, intx: intx}
	for i := range v.slots {
		v.slots[i].fd = -1
	}
	return v, nil
}

// index is the interrupt index of the vectors on the wire.
func (v *vectors) index() uint32 {
	if v.intx {
		return vfiouser.IRQINTx
	}
	return vfiouser.IRQMSIX
}

// slot is one vector. QEMU withdraws eventfds for a moment when the guest
// changes its set of vectors; what is raised meanwhile is remembered and
// delivered when the eventfd comes back. A vector that never had an eventfd
// is not in use, and what is raised on it is lost.
//
// INTx is masked by being delivered, until the client unmasks it. What is
// raised while it is masked, or disabled in Command, is remembered, too.
type slot struct {
	fd        int // the eventfd, -1: none
	withdrawn bool
	masked    bool
	pending   bool
}

// Raise implements link.Interrupter.
func (v *vectors) Raise(vector uint16) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch s := &v.slots[vector]; {
	case s.fd >= 0 && !s.masked && !v.disabled:
		v.signal(s)
	case s.fd >= 0, s.withdrawn && v.enabled:
		s.pending = true
	}
}

// signal raises a vector that has an eventfd. An error means that the client
// broke it: its own interrupts are lost, nothing else. v.mu is held.
func (v *vectors) signal(s *slot) {
	if v.intx {
		s.masked, v.status = true, true
	}
	_ = v.out.Signal(s.fd)
}

// deliver raises what was remembered, if nothing holds it back any more. v.mu
// is held.
func (v *vectors) deliver(s *slot) {
	if s.pending && s.fd >= 0 && !s.masked && !v.disabled {
		s.pending = false
		v.signal(s)
	}
}

// setDisabled follows Interrupt Disable of INTx: that is how a driver
// acknowledges an interrupt, so it ends Interrupt Status. Clearing it lets
// through what came meanwhile.
func (v *vectors) setDisabled(on bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.disabled = on
	if on {
		if v.status {
			v.status, v.credit = false, raisedAgain
		}
		return
	}
	v.deliver(&v.slots[0])
}

// raisedAgain is how often one interrupt is raised again.
const raisedAgain = 16

// interruptStatus is Interrupt Status.
func (v *vectors) interruptStatus() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.status
}

// mask masks or unmasks vectors on the client's request.
func (v *vectors) mask(set vfiouser.IRQSet, on bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range set.Count {
		if set.Bools != nil && set.Bools[i] == 0 {
			continue
		}
		s := &v.slots[set.Start+i]
		s.masked = on
		if !on && v.status && v.credit > 0 {
			v.credit--
			s.pending = true
		}
		v.deliver(s)
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
		v.slots[i].withdrawn, v.slots[i].pending, v.slots[i].masked = false, false, false
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
		*s = slot{fd: fd, pending: old.pending}
		if old.fd >= 0 {
			unix.Close(old.fd)
		}
		v.deliver(s)
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
	v.enabled, v.disabled, v.status, v.credit = false, false, false, 0
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
	v.out.Close()
}
