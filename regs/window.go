package regs

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
)

// ErrGone says that the device no longer answers: it was unplugged, unbound,
// or the service behind it ended.
var ErrGone = errors.New("the device is gone")

// Window is a mapped register region (BAR0). The mapping never leaves this
// type: hypervisors emulate register accesses by decoding the instruction, and
// Jailhouse stops the CPU at anything but a plain 32-bit move. So the two
// assembly functions behind Load and Store are the only code that touches it,
// and Window keeps the address as an integer: without package unsafe, which
// this package does not import, no compiled Go code can access what is there.
//
// A Window is safe for concurrent use; after Close every access fails with
// [os.ErrClosed].
type Window struct {
	mu   sync.RWMutex
	base uintptr // 0 once closed
	size int
}

// MapWindow maps size bytes of the register region from a file: the sysfs
// file resource0 at offset 0, a UIO file, or a VFIO device file at its region
// offset. The descriptor can be closed afterwards.
func MapWindow(fd uintptr, offset int64, size int) (*Window, error) {
	if size < int(State)+4 {
		return nil, fmt.Errorf("register region: expected at least %d bytes, found %d", int(State)+4, size)
	}
	// Behind the end of a regular file (sysfs has such, too) an access would
	// end the process.
	var st syscall.Stat_t
	if err := syscall.Fstat(int(fd), &st); err != nil {
		return nil, fmt.Errorf("map register region: %w", err)
	}
	if st.Mode&syscall.S_IFMT == syscall.S_IFREG && (offset < 0 || offset > st.Size-int64(size)) {
		return nil, fmt.Errorf("map register region: expected a file of at least %d bytes behind offset %#x, found one of %d in all", size, offset, st.Size)
	}
	base, _, errno := syscall.Syscall6(syscall.SYS_MMAP, 0, uintptr(size), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED, fd, uintptr(offset))
	if errno != 0 {
		return nil, fmt.Errorf("map register region: %w", errno)
	}
	return &Window{base: base, size: size}, nil
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

func (w *Window) at(r Register) (uintptr, error) {
	if w.base == 0 {
		return 0, fmt.Errorf("register %v: %w", r, os.ErrClosed)
	}
	if r%4 != 0 || int(r)+4 > w.size {
		return 0, fmt.Errorf("register %v: expected an aligned offset below %02Xh", r, w.size)
	}
	return w.base + uintptr(r), nil
}

// Close unmaps the region once no access is under way.
func (w *Window) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.base == 0 {
		return nil
	}
	_, _, errno := syscall.Syscall(syscall.SYS_MUNMAP, w.base, uintptr(w.size), 0)
	w.base = 0
	if errno != 0 {
		return fmt.Errorf("unmap register region: %w", errno)
	}
	return nil
}
