// Package evfd has eventfds, and the set of descriptors that one waiter
// sleeps on.
package evfd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// New creates an eventfd with counter 0. It is non-blocking and close-on-exec.
func New() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("create eventfd: %w", err)
	}
	return fd, nil
}

var one = binary.NativeEndian.AppendUint64(nil, 1)

// Signal adds 1 to the counter. A full counter is not an error: the event it
// stands for has been signalled.
func Signal(fd int) error {
	for {
		_, err := unix.Write(fd, one)
		switch err {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return nil
		}
		return err
	}
}

// Drain sets the counter of an eventfd to 0 and reports whether it was above
// 0.
func Drain(fd int) bool { return Take(fd) > 0 }

// Take sets the counter of an eventfd to 0 and returns what it was. It does not
// block, whatever others who have the eventfd made of its O_NONBLOCK
// (preadv2(2), RWF_NOWAIT; for eventfds since Linux 5.8).
func Take(fd int) uint64 {
	var n uint64
	v := unix.Iovec{Base: (*byte)(unsafe.Pointer(&n))}
	v.SetLen(8)
	for {
		// Offset -1 is the place where read(2) would read, in two halves.
		got, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&v)), 1, ^uintptr(0), ^uintptr(0), unix.RWF_NOWAIT)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || got != 8 {
			return 0
		}
		return n
	}
}

// Wait blocks the calling thread until one of the sources of an epoll
// descriptor is ready, and returns how many events it wrote to ev. A negative
// timeout waits for ever, 0 does not wait.
func Wait(epfd int, ev []unix.EpollEvent, timeoutMillis int) (int, error) {
	for {
		n, err := unix.EpollWait(epfd, ev, timeoutMillis)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n, err
	}
}

// Number is the number by which the kernel knows an eventfd: two descriptors
// of the same eventfd have the same. It is not ok for what is no eventfd, and
// where /proc does not tell.
func Number(fd int) (n uint64, ok bool) {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(info)) {
		if v, found := strings.CutPrefix(line, "eventfd-id:"); found {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

// NonBlocking reports whether a descriptor is in non-blocking mode, so that
// writing it cannot stop the writer.
func NonBlocking(fd int) bool {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_NONBLOCK != 0
}
