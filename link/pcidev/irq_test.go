package pcidev

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// irqRig is a function whose interrupts are enabled, and a peer that rings it.
type irqRig struct {
	t      *testing.T
	f, far *Function
	fds    [5]int // our ends of the vectors
}

func newRig(t *testing.T) *irqRig {
	l := newLink(t, smallLink)
	r := &irqRig{t: t, f: newFunction(t, l, Options{}), far: newFunction(t, l, Options{})}
	for i := range r.fds {
		r.fds[i] = eventfd(t, 0, unix.EFD_NONBLOCK)
	}
	return r
}

func eventfd(t *testing.T, initial uint, flags int) int {
	t.Helper()
	fd, err := unix.Eventfd(initial, flags|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func (r *irqRig) setIRQs(s vfiouser.IRQSet) {
	r.t.Helper()
	s.Index = 2
	if err := r.f.SetIRQs(s); err != nil {
		r.t.Fatal(err)
	}
}

// give hands the eventfds of some vectors over, as QEMU does.
func (r *irqRig) give(start, count int) {
	r.t.Helper()
	var fds []int
	for _, fd := range r.fds[start : start+count] {
		d, err := unix.Dup(fd)
		if err != nil {
			r.t.Fatal(err)
		}
		fds = append(fds, d)
	}
	r.setIRQs(vfiouser.IRQSet{Action: vfiouser.IRQTrigger, EventFD: true, Start: uint32(start), Count: uint32(count), FDs: fds})
}

func (r *irqRig) withdrawAll() {
	r.t.Helper()
	r.setIRQs(vfiouser.IRQSet{Action: vfiouser.IRQTrigger})
}

func (r *irqRig) msix(control byte)  { r.f.write(r.t, config, 0x63, control) }
func (r *irqRig) enable(v uint32)    { r.f.set(r.t, regControl, v) }
func (r *irqRig) oneShot(on byte)    { r.f.write(r.t, config, 0x43, on) }
func (r *irqRig) ring(vector uint32) { r.far.set(r.t, regDoorbell, vector) }
func (r *irqRig) counter(v int) uint64 {
	var b [8]byte
	if _, err := unix.Read(r.fds[v], b[:]); err == unix.EAGAIN {
		return 0
	} else if err != nil {
		r.t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(b[:])
}

// expect checks, and clears, the counters of all vectors.
func (r *irqRig) expect(what string, want ...uint64) {
	r.t.Helper()
	for v := range r.fds {
		var w uint64
		if v < len(want) {
			w = want[v]
		}
		if got := r.counter(v); got != w {
			r.t.Errorf("%s: vector %d was raised %d times, want %d", what, v, got, w)
		}
	}
}

func TestIRQDelivery(t *testing.T) {
	r := newRig(t)
	r.msix(0x80)
	r.give(0, 5)
	r.ring(1)
	r.expect("Interrupt Control off")
	r.enable(1)
	r.ring(1)
	r.ring(4)
	r.ring(4)
	r.expect("delivery", 0, 1, 0, 0, 2)
	r.far.set(t, regState, 1)
	r.expect("state change", 1)

	if got := r.f.IRQ(2); got.Count != 5 || got.Flags != vfiouser.IRQEventFD {
		t.Errorf("MSI-X: %+v, want 5 vectors without NORESIZE", got)
	}
	for _, i := range []uint32{0, 1, 3, 4} {
		if got := r.f.IRQ(i); got.Count != 0 {
			t.Errorf("interrupt type %d: %+v, want none", i, got)
		}
	}
}

func TestIRQTriggerByClient(t *testing.T) {
	r := newRig(t)
	r.give(0, 3)
	r.setIRQs(vfiouser.IRQSet{Action: vfiouser.IRQTrigger, Start: 1, Count: 1})
	r.expect("trigger", 0, 1)
	r.setIRQs(vfiouser.IRQSet{Action: vfiouser.IRQTrigger, Start: 0, Count: 3, Bools: []byte{1, 0, 1}})
	r.expect("trigger by booleans", 1, 0, 1)
}

// TestIRQWithdrawn raises while QEMU has the eventfds withdrawn.
func TestIRQWithdrawn(t *testing.T) {
	t.Run("delivered on return", func(t *testing.T) {
		r := newRig(t)
		r.msix(0x80)
		r.enable(1)
		r.give(0, 3)
		r.withdrawAll()
		r.ring(1)
		r.ring(1)
		r.ring(3) // never had an eventfd: lost
		r.expect("while withdrawn")
		r.give(0, 5)
		r.expect("on return", 0, 1)
		r.give(0, 5)
		r.expect("a second return")
	})
	t.Run("a single vector", func(t *testing.T) {
		r := newRig(t)
		r.msix(0x80)
		r.enable(1)
		r.give(0, 3)
		r.setIRQs(vfiouser.IRQSet{Action: vfiouser.IRQTrigger, EventFD: true, Start: 1, Count: 1})
		r.ring(1)
		r.ring(2)
		r.expect("others go on", 0, 0, 1)
		r.give(1, 1)
		r.expect("on return", 0, 1)
	})
	t.Run("not with Interrupt Control off", func(t *testing.T) {
		r := newRig(t)
		r.msix(0x80)
		r.give(0, 3)
		r.withdrawAll()
		r.ring(1)
		r.enable(1)
		r.give(0, 3)
		r.expect("on return")
	})
	t.Run("not with MSI-X disabled", func(t *testing.T) {
		r := newRig(t)
		r.enable(1)
		r.msix(0x80)
		r.give(0, 3)
		r.msix(0)
		r.withdrawAll()
		r.ring(1)
		r.msix(0x80)
		r.give(0, 3)
		r.expect("on return")
	})
	t.Run("forgotten on disable", func(t *testing.T) {
		r := newRig(t)
		r.enable(1)
		r.msix(0x80)
		r.give(0, 3)
		r.withdrawAll()
		r.ring(1)
		r.msix(0)
		r.msix(0x80)
		r.give(0, 3)
		r.expect("on return")
	})
	t.Run("forgotten on reset", func(t *testing.T) {
		r := newRig(t)
		r.enable(1)
		r.msix(0x80)
		r.give(0, 3)
		r.withdrawAll()
		r.ring(1)
		r.f.Reset()
		r.msix(0x80)
		r.enable(1)
		r.give(0, 3)
		r.expect("on return")
	})
	t.Run("counts as the delivery of one-shot", func(t *testing.T) {
		r := newRig(t)
		r.msix(0x80)
		r.oneShot(1)
		r.enable(1)
		r.give(0, 3)
		r.withdrawAll()
		r.ring(1)
		r.ring(2)
		if got := r.f.get(t, regControl); got != 0 {
			t.Errorf("Interrupt Control: got %d, want 0", got)
		}
		r.give(0, 3)
		r.expect("on return", 0, 1)
	})
}

// TestIRQBlockingEventFD gives an eventfd in blocking mode whose counter is
// full: whoever raises must not be stopped by it.
func TestIRQBlockingEventFD(t *testing.T) {
	r := newRig(t)
	r.msix(0x80)
	r.enable(1)
	full := eventfd(t, 0, 0)
	b := binary.NativeEndian.AppendUint64(nil, 1<<64-2)
	if _, err := unix.Write(full, b); err != nil {
		t.Fatal(err)
	}
	d, err := unix.Dup(full)
	if err != nil {
		t.Fatal(err)
	}
	r.setIRQs(vfiouser.IRQSet{Action: vfiouser.IRQTrigger, EventFD: true, Count: 1, FDs: []int{d}})
	for range 10 {
		r.ring(0)
	}
	// An empty one in blocking mode is signalled.
	empty := eventfd(t, 0, 0)
	if d, err = unix.Dup(empty); err != nil {
		t.Fatal(err)
	}
	r.setIRQs(vfiouser.IRQSet{Action: vfiouser.IRQTrigger, EventFD: true, Count: 1, FDs: []int{d}})
	r.ring(0)
	if _, err := unix.Read(empty, b); err != nil { // blocks until it is
		t.Fatal(err)
	}
	if got := binary.NativeEndian.Uint64(b); got != 1 {
		t.Errorf("counter: got %d, want 1", got)
	}
}

func TestIRQWrongIndex(t *testing.T) {
	r := newRig(t)
	for _, i := range []uint32{0, 1, 3, 4} {
		if err := r.f.SetIRQs(vfiouser.IRQSet{Index: i, Action: vfiouser.IRQTrigger, Count: 1}); err == nil {
			t.Errorf("interrupt type %d accepted", i)
		}
	}
}

// TestIRQEventFDTurnsBlocking gives an eventfd that is non-blocking, and takes
// that back when it is full. The flag is the eventfd's, not the descriptor's,
// so a client can do that at any time; whoever raises must not be stopped.
func TestIRQEventFDTurnsBlocking(t *testing.T) {
	r := newRig(t)
	r.msix(0x80)
	r.enable(1)
	r.give(0, 1)
	if _, err := unix.Write(r.fds[0], binary.NativeEndian.AppendUint64(nil, 1<<64-2)); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(r.fds[0], false); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		r.ring(0)
	}
	r.withdrawAll()
	if got := r.counter(0); got != 1<<64-1 {
		t.Errorf("counter: got %#x", got)
	}
}

// TestIRQManyRaised raises more often than the kernel keeps records of.
func TestIRQManyRaised(t *testing.T) {
	r := newRig(t)
	r.enable(1)
	r.give(0, 2)
	const n = 10000
	for range n {
		r.ring(1)
	}
	r.expect("many", 0, n)
}

// TestIRQNoEventFD gives descriptors that are no eventfds: what they are
// written, or closed, may take for ever.
func TestIRQNoEventFD(t *testing.T) {
	r := newRig(t)
	r.enable(1)
	r.give(0, 2)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(socket)
	memfd, err := unix.MemfdCreate("eventfd-id: 1", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(memfd)
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(epoll)
	timer, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(timer)
	for name, fd := range map[string]int{"pipe": pipe[1], "socket": socket, "memfd": memfd, "epoll": epoll, "timerfd": timer} {
		good := eventfd(t, 0, unix.EFD_NONBLOCK)
		err := r.f.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger, EventFD: true, Count: 2, FDs: []int{good, fd}})
		if !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: got %v, want EINVAL", name, err)
		}
	}
	// The refusal changed nothing.
	r.ring(0)
	r.ring(1)
	r.expect("after the refusals", 1, 1)
}
