package regs

import (
	"encoding/binary"
	"fmt"
	"os"
	"syscall"
)

// File is a register region that cannot be mapped, behind a file that carries
// out each access: the sysfs file resource0 of a BAR in I/O space, or a VFIO
// device file. An access is one call of 4 bytes at the register's place.
//
// A File is safe for concurrent use; after Close every access fails with
// [os.ErrClosed].
type File struct {
	file *os.File
	base int64
	size int
}

// OpenFile takes a register region of size bytes at offset in a file. The
// descriptor can be closed afterwards.
func OpenFile(fd uintptr, offset int64, size int) (*File, error) {
	if size < int(State)+4 {
		return nil, fmt.Errorf("register region: expected at least %d bytes, found %d", int(State)+4, size)
	}
	own, _, errno := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
	if errno != 0 {
		return nil, fmt.Errorf("open register region: %w", errno)
	}
	return &File{os.NewFile(own, "registers"), offset, size}, nil
}

// Load reads the register r.
func (f *File) Load(r Register) (uint32, error) {
	var b [4]byte
	if err := f.access(r, b[:], f.file.ReadAt); err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint32(b[:]), nil
}

// Store writes the register r, in a system call: what the caller stored to
// shared memory before is visible before the device sees the access.
func (f *File) Store(r Register, v uint32) error {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], v)
	return f.access(r, b[:], f.file.WriteAt)
}

func (f *File) access(r Register, b []byte, do func([]byte, int64) (int, error)) error {
	if r%4 != 0 || int(r)+4 > f.size {
		return fmt.Errorf("register %v: expected an aligned offset below %02Xh", r, f.size)
	}
	if _, err := do(b, f.base+int64(r)); err != nil {
		return fmt.Errorf("register %v: %w", r, err)
	}
	return nil
}

// Close closes the file.
func (f *File) Close() error { return f.file.Close() }
