// Package fdpass is a blocking AF_UNIX stream socket that passes file
// descriptors along with bytes (SCM_RIGHTS, unix(7)).
//
// It blocks a thread in recvmsg instead of parking a goroutine in Go's
// network poller: a thread that sleeps in the kernel wakes in about half the
// time. A goroutine that serves such a connection should lock itself to its
// thread. Nothing is allocated per message.
package fdpass

import (
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxFDs is the largest number of descriptors in one message (the kernel's
// SCM_MAX_FD).
const MaxFDs = 253

// DefaultSendTimeout bounds [Conn.Send] unless [Conn.SetSendTimeout] says
// otherwise.
const DefaultSendTimeout = 5 * time.Second

// Room for one control message with MaxFDs descriptors, in 8-byte words so
// that it is aligned: 16 bytes of header, 4 bytes per descriptor.
const controlWords = (16 + 4*MaxFDs + 7) / 8

// closing is the bit of Conn.state that says no call may begin any more.
const closing = 1 << 31

// Conn is one end of a connection. One goroutine may receive while another
// sends; Shutdown, Close and FD may be called from anywhere at any time.
type Conn struct {
	fd          int
	sendTimeout time.Duration

	// state counts the calls that use fd, plus one for the owner, who gives
	// it up in Close; the last to leave closes fd. So no call ever uses the
	// number after the kernel has given it to another file.
	state  atomic.Uint32
	closed atomic.Bool

	rmsg, smsg         unix.Msghdr
	riov, siov         unix.Iovec
	rcontrol, scontrol [controlWords]uint64
}

// FromUnixConn takes over conn, which must be a stream connection: it is
// closed whether the call succeeds or not.
func FromUnixConn(conn *net.UnixConn) (*Conn, error) {
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, dupErr := -1, error(nil)
	if err := raw.Control(func(s uintptr) {
		fd, dupErr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("fcntl", dupErr)
	}
	return FromFD(fd)
}

// FromFD takes over fd, which must be a connected AF_UNIX stream socket, and
// makes it blocking and close-on-exec. When the call fails, fd is closed.
func FromFD(fd int) (*Conn, error) {
	if err := prepare(fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	c := &Conn{fd: fd, sendTimeout: DefaultSendTimeout}
	c.state.Store(1)
	for _, m := range []struct {
		msg     *unix.Msghdr
		iov     *unix.Iovec
		control *[controlWords]uint64
	}{{&c.rmsg, &c.riov, &c.rcontrol}, {&c.smsg, &c.siov, &c.scontrol}} {
		m.msg.Iov = m.iov
		m.msg.SetIovlen(1)
		m.msg.Control = (*byte)(unsafe.Pointer(m.control))
	}
	return c, nil
}

func prepare(fd int) error {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if domain != unix.AF_UNIX || kind != unix.SOCK_STREAM {
		return fmt.Errorf("fdpass: descriptor %d is a socket of domain %d and type %d, need AF_UNIX (%d) and SOCK_STREAM (%d): %w",
			fd, domain, kind, unix.AF_UNIX, unix.SOCK_STREAM, unix.EPROTOTYPE)
	}
	unix.CloseOnExec(fd)
	return os.NewSyscallError("fcntl", unix.SetNonblock(fd, false))
}

// SetSendTimeout bounds the time that one Send may take because the peer does
// not read. It must not run while a Send does.
func (c *Conn) SetSendTimeout(d time.Duration) { c.sendTimeout = d }

// SetReceiveTick makes a waiting ReceiveFull look at its deadline every d; 0,
// the initial state, means never, so that deadlines have no effect. It is one
// system call here instead of one per message.
func (c *Conn) SetReceiveTick(d time.Duration) error {
	if !c.enter() {
		return net.ErrClosed
	}
	defer c.leave()
	tv := unix.NsecToTimeval(int64(d))
	return os.NewSyscallError("setsockopt",
		unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
}

// FD is the socket's descriptor, for watching it (poll, epoll) only; -1 after
// Close. After Shutdown, by this end or the peer, it is ready with EPOLLHUP or
// EPOLLRDHUP.
func (c *Conn) FD() int {
	if c.closed.Load() {
		return -1
	}
	return c.fd
}

// Shutdown ends the connection in both directions and wakes every blocked
// call of this end; they and all later ones return [net.ErrClosed]. The
// descriptor stays valid until Close.
func (c *Conn) Shutdown() {
	if !c.enter() {
		return
	}
	defer c.leave()
	c.state.Or(closing)
	unix.Shutdown(c.fd, unix.SHUT_RDWR)
}

// Close is Shutdown, after which the descriptor is closed as soon as no call
// uses it. It does not wait for that. It always returns nil.
func (c *Conn) Close() error {
	c.Shutdown()
	if !c.closed.Swap(true) {
		c.leave()
	}
	return nil
}

func (c *Conn) enter() bool {
	for {
		s := c.state.Load()
		if s&closing != 0 {
			return false
		}
		if c.state.CompareAndSwap(s, s+1) {
			return true
		}
	}
}

func (c *Conn) leave() {
	if c.state.Add(^uint32(0)) == closing {
		unix.Close(c.fd)
	}
}

func (c *Conn) isClosing() bool { return c.state.Load()&closing != 0 }

// PeerCredentials returns process, user and group of the peer at the time it
// connected (SO_PEERCRED, unix(7)).
func PeerCredentials(conn syscall.Conn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		cred, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, os.NewSyscallError("getsockopt", optErr)
}

// CloseAll closes every descriptor in fds.
func CloseAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
