package fdpass

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var (
	// ErrTooManyFDs means that a message carried more descriptors than the
	// receiver allows. All have been closed.
	ErrTooManyFDs = errors.New("more file descriptors in one message than announced")
	// ErrFDsLost means that descriptors could not be received, mostly because
	// this process is at its limit of open files (MSG_CTRUNC). Those that
	// arrived have been closed.
	ErrFDsLost = errors.New("file descriptors were lost in reception: raise the limit of open files (ulimit -n)")
)

// ReceiveFull reads exactly len(buf) bytes. Descriptors that come with them
// are appended to fds, close-on-exec, at most up to its capacity; the result
// is the extended slice and owned by the caller.
//
// When it fails, all descriptors, those in fds included, are closed and the
// result is nil. The error is [io.EOF] if the peer closed before the first
// byte, [io.ErrUnexpectedEOF] after it, [net.ErrClosed] after Close or
// Shutdown here, [os.ErrDeadlineExceeded] when a deadline that is not zero has
// passed (see SetReceiveTick), ErrTooManyFDs, ErrFDsLost or an
// [os.SyscallError]. The stream is unusable after any of them.
func (c *Conn) ReceiveFull(buf []byte, fds []int, deadline time.Time) ([]int, error) {
	if !c.enter() {
		CloseAll(fds)
		return nil, net.ErrClosed
	}
	defer c.leave()
	for done := 0; done < len(buf); {
		n, more, err := c.receive(buf[done:], fds)
		fds = more
		if err == nil && n == 0 {
			if err = io.EOF; done > 0 {
				err = io.ErrUnexpectedEOF
			}
		}
		done += n
		again := err == unix.EINTR || err == unix.EAGAIN
		if (again || done < len(buf)) && !deadline.IsZero() && !time.Now().Before(deadline) {
			err, again = os.ErrDeadlineExceeded, false
		}
		if err != nil && !again {
			CloseAll(fds)
			return nil, c.explain("recvmsg", err)
		}
	}
	return fds, nil
}

// receive is one recvmsg. Whatever it returns, the descriptors that arrived
// are in the slice, or closed where they exceed its capacity.
func (c *Conn) receive(buf []byte, fds []int) (int, []int, error) {
	c.riov.Base = &buf[0]
	c.riov.SetLen(len(buf))
	c.rmsg.SetControllen(len(c.rcontrol) * 8)
	n, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(c.fd),
		uintptr(unsafe.Pointer(&c.rmsg)), unix.MSG_CMSG_CLOEXEC)
	c.riov.Base = nil
	if errno != 0 {
		return 0, fds, errno
	}
	if c.rmsg.Controllen == 0 && c.rmsg.Flags&unix.MSG_CTRUNC == 0 {
		return int(n), fds, nil
	}
	var err error
	control := unsafe.Slice((*byte)(unsafe.Pointer(&c.rcontrol)), int(c.rmsg.Controllen))
	for len(control) > 0 {
		h, data, rest, parseErr := unix.ParseOneSocketControlMessage(control)
		if parseErr != nil {
			break // cannot happen: the kernel wrote it
		}
		control = rest
		if h.Level != unix.SOL_SOCKET || h.Type != unix.SCM_RIGHTS {
			continue
		}
		for ; len(data) >= 4; data = data[4:] {
			fd := int(*(*int32)(unsafe.Pointer(&data[0])))
			if len(fds) == cap(fds) {
				unix.Close(fd)
				err = ErrTooManyFDs
				continue
			}
			fds = append(fds, fd)
		}
	}
	if c.rmsg.Flags&unix.MSG_CTRUNC != 0 {
		err = ErrFDsLost
	}
	return int(n), fds, err
}

// explain turns what a system call said into what ReceiveFull and Send
// promise.
func (c *Conn) explain(call string, err error) error {
	if c.isClosing() {
		return net.ErrClosed
	}
	if errno, ok := err.(unix.Errno); ok {
		return fmt.Errorf("fdpass: %w", os.NewSyscallError(call, errno))
	}
	return err
}
