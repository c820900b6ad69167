package ports

import (
	"context"
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// client is the way to a program: a connection, or the master of a PTY.
type client interface {
	io.ReadWriter
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SyscallConn() (syscall.RawConn, error)
}

var (
	past = time.Unix(1, 0)

	// errHangUp says that the other side has closed the port, and that the
	// program has everything.
	errHangUp = errors.New("the other side closed the port")
	// errLeft says that the program is gone.
	errLeft = errors.New("the program left")
)

const pieceSize = 32 << 10

// visit is a program's time on a port.
type visit struct {
	port   *console.Port
	client client
	raw    syscall.RawConn
	ctx    context.Context
	// kept is what was read from the port, and the last program did not take.
	kept *[]byte
	// stay reports whether the program wants to stay when the other side closes.
	stay func() bool
}

// join opens the port for a program and carries bytes both ways, no more at a
// time than the slower side takes. It returns errLeft when the program left,
// errHangUp when the other side closed the port, what became of the port, or
// why the context ended; the port is closed then.
func (v visit) join(ctx context.Context) (err error) {
	if v.raw, err = v.client.SyscallConn(); err != nil {
		return err
	}
	if err := v.port.Open(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	closed := make(chan struct{})
	context.AfterFunc(ctx, func() {
		defer close(closed)
		v.port.Close()
		v.client.SetDeadline(past)
	})
	v.ctx = ctx
	toClient := make(chan struct{})
	go func() {
		defer close(toClient)
		if err := v.toClient(); err != errLeft {
			cancel(err)
		} // else there may be something from it yet
	}()
	cancel(v.fromClient())
	<-toClient
	<-closed
	v.client.SetDeadline(time.Time{})
	return context.Cause(ctx)
}

// toClient carries what arrives on the port.
func (v visit) toClient() error {
	if err := v.write(*v.kept); err != nil {
		return err
	}
	buf := make([]byte, pieceSize)
	for {
		if err := v.begin(); err != nil {
			return err
		}
		for {
			n, err := v.port.Read(buf)
			if err := v.write(buf[:n]); err != nil {
				return err
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
		}
		if v.stay == nil || !v.stay() {
			return errHangUp
		}
	}
}

// begin waits for the other side, or for what it left.
func (v visit) begin() error {
	for {
		changed := v.port.Changes()
		if v.port.PeerOpen() || v.port.Unread() > 0 {
			return nil
		}
		select {
		case <-changed:
		case <-v.ctx.Done():
			return v.ctx.Err()
		}
	}
}

// write writes to the program. What it does not take is kept.
func (v visit) write(b []byte) error {
	n := 0
	for n < len(b) {
		m, err := v.client.Write(b[n:])
		n += m
		if err != nil {
			*v.kept = append([]byte(nil), b[n:]...)
			if v.ctx.Err() != nil {
				return v.ctx.Err()
			}
			return errLeft
		}
	}
	*v.kept = nil
	return nil
}

// fromClient carries what the program says. It returns errLeft when all that it
// said is in the port, or nobody is there to hear it.
func (v visit) fromClient() error {
	buf := make([]byte, pieceSize)
	for {
		if err := v.out(); err != nil {
			return err
		}
		n, err := v.client.Read(buf)
		if n > 0 {
			if _, err := v.port.WriteAll(v.ctx, buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == nil:
		case v.ctx.Err() != nil:
			return v.ctx.Err()
		case err == io.EOF:
			// It has nothing more to say, but may listen.
			if err := v.raw.Read(hungUp); err != nil {
				return err
			}
			return errLeft
		default:
			if left, _ := poll(v.raw); left || !errors.Is(err, unix.EIO) {
				return errLeft
			}
			// It left a terminal, but now there is another one.
		}
	}
}

// out waits until the port takes something. That the program leaves with
// nothing said, or that nobody will hear, ends it.
func (v visit) out() error {
	for {
		changed := v.port.Changes()
		if v.port.Ready()&console.Out != 0 {
			return nil
		}
		left, pending := poll(v.raw)
		if left && (!pending || !v.port.PeerOpen()) {
			return errLeft
		}
		if left {
			select {
			case <-changed:
			case <-v.ctx.Done():
				return v.ctx.Err()
			}
			continue
		}
		err := v.leftOr(changed)
		if v.ctx.Err() != nil {
			return v.ctx.Err()
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
}

// leftOr waits until the program leaves, or something changes.
func (v visit) leftOr(changed <-chan struct{}) error {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-changed:
			v.client.SetReadDeadline(past)
		case <-stop:
		}
	}()
	err := v.raw.Read(hungUp)
	close(stop)
	<-stopped
	if v.ctx.Err() == nil {
		v.client.SetReadDeadline(time.Time{})
	}
	return err
}

// hungUp reports whether nobody is at the other end of a descriptor.
func hungUp(fd uintptr) bool {
	left, _ := pollFD(fd)
	return left
}

// poll reports whether nobody is at the other end, and whether something it
// said is to be read.
func poll(c syscall.RawConn) (left, pending bool) {
	c.Control(func(fd uintptr) { left, pending = pollFD(fd) })
	return left, pending
}

func pollFD(fd uintptr) (left, pending bool) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(p, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return true, false
		}
		break
	}
	if p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) == 0 {
		return false, p[0].Revents&unix.POLLIN != 0
	}
	// At the end of a connection there is always something to read: nothing.
	n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
	return true, err == nil && n > 0
}
