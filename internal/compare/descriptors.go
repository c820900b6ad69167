package compare

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// pipes gives each end what it reads from and what it writes to, in that order.
func pipes(int) (p pair, err error) {
	var ends [2][2]int
	for i := range ends {
		if err := unix.Pipe2(ends[i][:], unix.O_CLOEXEC); err != nil {
			return p, os.NewSyscallError("pipe", err)
		}
		p.add(i, ends[i][0], "pipe")
		p.add(1-i, ends[i][1], "pipe")
	}
	// Side 0 got its reading end first, side 1 its writing end.
	p[1][0], p[1][1] = p[1][1], p[1][0]
	return p, nil
}

func sockets(kind int) func(int) (pair, error) {
	return func(int) (p pair, err error) {
		ends, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return p, os.NewSyscallError("socketpair", err)
		}
		p.add(0, ends[0], "socket")
		p.add(1, ends[1], "socket")
		return p, nil
	}
}

// tcp connects over the loopback interface, and sends small messages at once,
// as Go does by default.
func tcp(int) (p pair, err error) {
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return p, os.NewSyscallError("socket", err)
	}
	defer unix.Close(listener)
	if err := unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return p, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(listener, 1); err != nil {
		return p, os.NewSyscallError("listen", err)
	}
	address, err := unix.Getsockname(listener)
	if err != nil {
		return p, os.NewSyscallError("getsockname", err)
	}
	dialed, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return p, os.NewSyscallError("socket", err)
	}
	p.add(0, dialed, "tcp")
	if err := unix.Connect(dialed, address); err != nil {
		return p, os.NewSyscallError("connect", err)
	}
	accepted, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
	if err != nil {
		return p, os.NewSyscallError("accept", err)
	}
	p.add(1, accepted, "tcp")
	for _, fd := range []int{dialed, accepted} {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return p, os.NewSyscallError("setsockopt", err)
		}
	}
	return p, nil
}

// bytesEnd reads and writes descriptors that block.
type bytesEnd struct{ in, out int }

// attachBytes takes one descriptor for both directions, or one to read from
// and one to write to.
func attachBytes(s *Side) (End, error) {
	e := &bytesEnd{in: s.take(0)}
	e.out = e.in
	if len(s.Files) > 1 {
		e.out = s.take(1)
	}
	return e, nil
}

func (e *bytesEnd) Send(p []byte) error { return writeAll(e.out, p) }

func (e *bytesEnd) Receive(p []byte) error { return readAll(e.in, p) }

func (e *bytesEnd) Close() error {
	err := unix.Close(e.in)
	if e.out != e.in {
		if oerr := unix.Close(e.out); err == nil {
			err = oerr
		}
	}
	return err
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(fd, p)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return os.NewSyscallError("write", err)
		default:
			p = p[n:]
		}
	}
	return nil
}

func readAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Read(fd, p)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return os.NewSyscallError("read", err)
		case n == 0:
			return io.ErrUnexpectedEOF
		default:
			p = p[n:]
		}
	}
	return nil
}

// packetsEnd reads a message at a time.
type packetsEnd struct{ bytesEnd }

func attachPackets(s *Side) (End, error) {
	fd := s.take(0)
	return &packetsEnd{bytesEnd{fd, fd}}, nil
}

func (e *packetsEnd) Receive(p []byte) error {
	for {
		n, err := unix.Read(e.in, p)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return os.NewSyscallError("read", err)
		case n == 0:
			return io.ErrUnexpectedEOF
		case n != len(p):
			return fmt.Errorf("message of %d bytes: expected %d", n, len(p))
		}
		return nil
	}
}

// connEnd is a net.Conn.
type connEnd struct{ net.Conn }

func attachConn(s *Side) (End, error) {
	f := os.NewFile(uintptr(s.take(0)), "socket")
	c, err := net.FileConn(f) // a copy of the descriptor
	return connEnd{c}, errors.Join(err, f.Close())
}

func (e connEnd) Send(p []byte) error {
	_, err := e.Write(p)
	return err
}

func (e connEnd) Receive(p []byte) error {
	_, err := io.ReadFull(e.Conn, p)
	return err
}
