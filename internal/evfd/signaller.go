package evfd

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Signaller signals eventfds that others have as well, and never blocks.
//
// A write could: whoever has a descriptor of the eventfd can fill its counter
// and take O_NONBLOCK away at any time, as that flag belongs to the eventfd
// and not to a descriptor. The kernel's own signal never blocks, and
// asynchronous I/O (io_submit(2), IOCB_FLAG_RESFD) is the way to have it
// given: the eventfd is signalled at the end of a read, here one of 0 bytes,
// which ends before io_submit returns. What is no eventfd is refused.
//
// It is for one goroutine at a time.
type Signaller struct {
	context uintptr // aio_context_t, 0 once closed
	request iocb
	list    [1]*iocb
	ended   [8]ioEvent
}

// iocb is struct iocb of a little-endian machine (Linux,
// include/uapi/linux/aio_abi.h), and ioEvent is struct io_event.
type iocb struct {
	data     uint64
	key      uint32
	rwFlags  int32
	opcode   uint16
	priority int16
	file     uint32
	buffer   uint64
	size     uint64
	offset   int64
	_        uint64
	flags    uint32
	eventfd  uint32
}

type ioEvent [32]byte

const (
	iocbRead          = 0 // IOCB_CMD_PREAD
	iocbSignalEventFD = 1 // IOCB_FLAG_RESFD
)

// NewSignaller takes the descriptor of a file to read nothing from. It stays
// the caller's, and has to be open as long as the signaller is in use.
func NewSignaller(file int) (*Signaller, error) {
	s := &Signaller{request: iocb{opcode: iocbRead, file: uint32(file), flags: iocbSignalEventFD}}
	s.list[0] = &s.request
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, uintptr(len(s.ended)), uintptr(unsafe.Pointer(&s.context)), 0); errno != 0 {
		return nil, fmt.Errorf("asynchronous I/O, which interrupts are signalled by (raise the sysctl fs.aio-max-nr if there is too little): %w", os.NewSyscallError("io_setup", errno))
	}
	return s, nil
}

// Signal adds 1 to the counter of an eventfd, up to the largest 64-bit number.
// After Close it fails with os.ErrClosed.
func (s *Signaller) Signal(eventfd int) error {
	if s.context == 0 {
		return os.ErrClosed
	}
	s.request.eventfd = uint32(eventfd)
	for {
		_, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, s.context, 1, uintptr(unsafe.Pointer(&s.list)))
		switch errno {
		case 0:
			return nil
		default:
			return os.NewSyscallError("io_submit", errno)
		case unix.EAGAIN: // its records of ended reads want to be fetched
		}
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, s.context, 0, uintptr(len(s.ended)), uintptr(unsafe.Pointer(&s.ended)), 0, 0)
		if errno != 0 {
			return os.NewSyscallError("io_getevents", errno)
		}
		if n == 0 { // cannot happen: reads of nothing have all ended
			return os.NewSyscallError("io_submit", unix.EAGAIN)
		}
	}
}

// Close gives the kernel's part back.
func (s *Signaller) Close() {
	if s.context != 0 {
		unix.Syscall(unix.SYS_IO_DESTROY, s.context, 0, 0)
		s.context = 0
	}
}
