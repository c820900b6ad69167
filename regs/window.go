package regs

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"unsafe"
)

// ErrGone says that the device no longer answers: it was unplugged, unbound,
// or the service behind it ended.
var ErrGone = errors.New("the device is gone")

// Window is a mapped register region (BAR0). The mapping never leaves this
// type: hypervisors emulate register accesses by decoding the instruction, and
// Jailhouse stops the CPU at anything but a plain 32-bit move, so the two
// assembly functions behind Load and Store are the only code that touches it.
//
// A Window is safe for concurrent use; after Close every access fails with
// [os.ErrClosed].
type Window struct {
	mu  sync.RWMutex
	mem []byte
}

// MapWindow maps size bytes of the register region from a file: the sysfs
// file resource0 at offset 0, a UIO file, or a VFIO device file at its region
// offset. The descriptor can be closed afterwards.
func MapWindow(fd uintptr, offset int64, size int) (*Window, error) {
	if size < int(State)+4 {
		return nil, fmt.Errorf("register region: expected at least %d bytes, found %d", int(State)+4, size)
	}
	mem, err := syscall.Mmap(int(fd), offset, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map register region: %w", err)
	}
	return &Window{mem: mem}, nil
}

// Load reads the register r.
func (w *Window) Load(r Register) (uint32, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	p, err := w.at(r)
	if err != nil {
		return 0, err
	}
	return load32(p), nil
}

// Store writes the register r, after a store barrier: what the caller stored
// to shared memory before is visible before the device sees the access.
func (w *Window) Store(r Register, v uint32) error {
	w.mu.RLock()
	defer w.mu.RUnlock()
	p, err := w.at(r)
	if err != nil {
		return err
	}
	store32(p, v)
	return nil
}

func (w *Window) at(r Register) (unsafe.Pointer, error) {
	if w.mem == nil {
		return nil, fmt.Errorf("register %v: %w", r, os.ErrClosed)
	}
	if r%4 != 0 || int(r)+4 > len(w.mem) {
		return nil, fmt.Errorf("register %v: expected an aligned offset below %#x", r, len(w.mem))
	}
	return unsafe.Pointer(&w.mem[r]), nil
}

// Close unmaps the region once no access is under way.
func (w *Window) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mem == nil {
		return nil
	}
	err := syscall.Munmap(w.mem)
	w.mem = nil
	return err
}
