package fdpass

import (
	"fmt"
	"net"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Send writes buf with one sendmsg, the descriptors attached to its first
// byte; they stay the caller's. Where the socket takes only a part, the rest
// follows without descriptors. It waits for a peer that does not read, but no
// longer than the send time limit in all.
//
// The error is [net.ErrClosed] after Close or Shutdown here,
// [os.ErrDeadlineExceeded] when the time is over, or an [os.SyscallError]
// (EPIPE or ECONNRESET: the peer is gone). The stream is unusable after any of
// them, as a part of buf may have gone out.
func (c *Conn) Send(buf []byte, fds []int) error {
	if len(fds) > MaxFDs || len(fds) > 0 && len(buf) == 0 {
		return fmt.Errorf("fdpass: %d descriptors with %d bytes, need at most %d and at least one byte: %w",
			len(fds), len(buf), MaxFDs, unix.EINVAL)
	}
	if !c.enter() {
		return net.ErrClosed
	}
	defer c.leave()
	var deadline time.Time
	for len(buf) > 0 {
		n, err := c.send(buf, fds)
		switch err {
		case nil:
			buf, fds = buf[n:], nil
			continue
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			// The quick way costs no look at the clock; only a full socket does.
			now := time.Now()
			if deadline.IsZero() {
				deadline = now.Add(c.sendTimeout)
			}
			if err := c.waitWritable(deadline.Sub(now)); err != nil {
				return c.explain("poll", err)
			}
			continue
		}
		return c.explain("sendmsg", err)
	}
	return nil
}

func (c *Conn) send(buf []byte, fds []int) (int, error) {
	c.siov.Base = &buf[0]
	c.siov.SetLen(len(buf))
	c.smsg.SetControllen(0)
	if len(fds) > 0 {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&c.scontrol))
		h.Level, h.Type = unix.SOL_SOCKET, unix.SCM_RIGHTS
		h.SetLen(unix.CmsgLen(4 * len(fds)))
		data := unsafe.Slice((*int32)(unsafe.Add(unsafe.Pointer(h), unix.CmsgLen(0))), len(fds))
		for i, fd := range fds {
			data[i] = int32(fd)
		}
		c.smsg.SetControllen(unix.CmsgSpace(4 * len(fds)))
	}
	n, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(c.fd),
		uintptr(unsafe.Pointer(&c.smsg)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	c.siov.Base = nil
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// waitWritable waits until the socket takes more. Shutdown wakes it too; the
// following sendmsg then fails.
func (c *Conn) waitWritable(left time.Duration) error {
	if left <= 0 {
		return os.ErrDeadlineExceeded
	}
	// Rounded up, so that the last wait does not become a busy loop.
	ms := int((left + time.Millisecond - 1) / time.Millisecond)
	p := [1]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLOUT}}
	if _, err := unix.Poll(p[:], ms); err != nil && err != unix.EINTR {
		return err
	}
	return nil
}
