package vfiouser

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/fdpass"
	"github.com/ivshmem-go/ivshmem/vfiouser/internal/wire"
	"golang.org/x/sys/unix"
)

// DefaultTimeout is the time limit where none is set.
const DefaultTimeout = 5 * time.Second

// The largest max_msg_fds that QEMU 10.1 to 11.1 accept from a server, and
// announce themselves.
const qemuMaxFDs = 16

// ServerOptions of the server half. The zero value is right for QEMU.
type ServerOptions struct {
	// VersionTimeout is the time a client has for its first message, and
	// SendTimeout the time it may let a reply wait because it does not read.
	// 0 means DefaultTimeout.
	VersionTimeout time.Duration
	SendTimeout    time.Duration
}

// Server is the server half of one connection.
type Server struct {
	conn           *fdpass.Conn
	open           func() (Device, error)
	dev            Device
	versionTimeout time.Duration
	regions        [NumRegions]Region

	maxFDs       int // descriptors we take per message, announced
	clientMaxFDs int // descriptors the client takes per message

	in    []byte // the request's payload
	out   []byte // the reply, header included
	fds   []int  // of the request, until a handler takes them
	inFDs [fdpass.MaxFDs]int
	// outFDs go with the reply; they are the device's.
	outFDs []int
}

// Serve serves dev to the client on conn until the client goes away or breaks
// the protocol. It is [NewServer] and [Server.Run].
func Serve(conn *net.UnixConn, dev Device, opts ServerOptions) error {
	s, err := NewServer(conn, func() (Device, error) { return dev, nil }, opts)
	if err != nil {
		return err
	}
	return s.Run()
}

// NewServer prepares the server half on conn, which it takes over in any case.
// The caller must call Run, or Close.
//
// Run calls open for the device when the client has sent a good VERSION
// message: one that says nothing takes nothing. Where open fails the client is
// refused with that error, which goes out as those of [Device] do. EBUSY is the
// usual answer to one client too many, EACCES to one that may not connect.
func NewServer(conn *net.UnixConn, open func() (Device, error), opts ServerOptions) (*Server, error) {
	c, err := fdpass.FromUnixConn(conn)
	if err != nil {
		return nil, err
	}
	if opts.SendTimeout > 0 {
		c.SetSendTimeout(opts.SendTimeout)
	}
	if opts.VersionTimeout <= 0 {
		opts.VersionTimeout = DefaultTimeout
	}
	s := &Server{conn: c, open: open, versionTimeout: opts.VersionTimeout, maxFDs: qemuMaxFDs}
	s.in = make([]byte, 4096)
	s.out = make([]byte, wire.HeaderSize, wire.HeaderSize+wire.AccessSize+4096)
	return s, nil
}

// Close ends the connection from any goroutine: Run returns [net.ErrClosed]
// after the request it is at. It does not wait for that.
func (s *Server) Close() error { return s.conn.Close() }

// Run is the request loop. While it waits for the client it blocks a thread.
// It calls the device from the calling goroutine only, which should not be
// locked to a thread: of a thousand that are, each step, also that from one
// holder of a mutex to the next, is a switch between threads of the kernel.
// When it returns the connection is closed and every descriptor that the device
// did not take is too.
//
// It returns nil when the client closed between two messages. Otherwise the
// error is [net.ErrClosed] (Close), [os.ErrDeadlineExceeded] (no VERSION in
// time, or the client does not read its replies), [io.ErrUnexpectedEOF] (the
// client went away inside a message), a [*ProtocolError], an error of the
// socket, or that of open.
func (s *Server) Run() error {
	defer s.conn.Close()
	err := s.negotiate()
	for err == nil {
		err = s.serveOne()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// negotiate handles the first message.
func (s *Server) negotiate() error {
	// The tick makes the deadline hold within an eighth of it.
	if err := s.conn.SetReceiveTick(max(s.versionTimeout/8, time.Millisecond)); err != nil {
		return err
	}
	h, err := s.receive(time.Now().Add(s.versionTimeout), wire.MaxVersionMessage)
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("vfio-user client sent no complete VERSION message within %v: %w", s.versionTimeout, err)
		}
		return err
	}
	if err := s.version(h); err != nil {
		return err
	}
	return s.conn.SetReceiveTick(0)
}

// version answers the VERSION request h, whose payload has been received.
func (s *Server) version(h wire.Header) error {
	if h.Command != wire.Version {
		return s.reject(h, "VERSION as the first message", h.Command.String())
	}
	if len(s.fds) > 0 {
		return s.reject(h, "no descriptors", fmt.Sprintf("%d", len(s.fds)))
	}
	v, err := wire.DecodeVersion(s.in[:h.Size-wire.HeaderSize])
	if err != nil {
		return s.reject(h, "well-formed version data", err.Error())
	}
	if v.Major != 0 {
		return s.reject(h, "major version 0", fmt.Sprintf("version %d.%d", v.Major, v.Minor))
	}
	if s.dev, err = s.open(); err != nil {
		_ = s.reply(h, err) // the reason is worth more than a failure to tell it
		return fmt.Errorf("vfio-user client refused: %w", err)
	}
	for i := range s.regions {
		s.regions[i] = s.dev.Region(uint32(i))
	}
	s.clientMaxFDs = min(v.MaxFDs, fdpass.MaxFDs)
	// QEMU refuses a server that takes more descriptors than QEMU knows of,
	// so more than that is only for clients that announce more themselves.
	s.maxFDs = max(qemuMaxFDs, s.clientMaxFDs)
	s.out = wire.VersionInfo{
		Major: 0, Minor: min(v.Minor, 1),
		MaxFDs: s.maxFDs, MaxTransfer: wire.MaxTransfer,
	}.Append(s.out[:wire.HeaderSize])
	return s.reply(h, nil)
}

// serveOne receives, carries out and answers one message.
func (s *Server) serveOne() error {
	h, err := s.receive(time.Time{}, wire.MaxMessage)
	if err != nil {
		return err
	}
	err = s.handle(h.Command, s.in[:h.Size-wire.HeaderSize])
	s.dropFDs()
	return s.reply(h, err)
}

// receive reads one message: its payload to s.in, its descriptors to s.fds. A
// header that makes no sense is answered with EINVAL, and ends the connection,
// as nothing says where the next message begins.
func (s *Server) receive(deadline time.Time, limit uint32) (wire.Header, error) {
	fds, err := s.conn.ReceiveFull(s.in[:wire.HeaderSize], s.inFDs[:0:s.maxFDs], deadline)
	if err != nil {
		return wire.Header{}, s.broken("a message header", err)
	}
	s.fds = fds
	h, _ := wire.DecodeHeader(s.in)
	switch {
	case h.Flags&wire.TypeMask != wire.TypeCommand:
		return h, s.reject(h, "message type 0 (command)", fmt.Sprintf("type %d", h.Flags&wire.TypeMask))
	case h.Size < wire.HeaderSize || h.Size > limit:
		return h, s.reject(h, fmt.Sprintf("a size of %d to %d bytes", wire.HeaderSize, limit), fmt.Sprintf("%d", h.Size))
	}
	n := int(h.Size) - wire.HeaderSize
	if n > len(s.in) {
		s.in = make([]byte, n)
	}
	if s.fds, err = s.conn.ReceiveFull(s.in[:n], s.fds, deadline); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return h, s.broken("the payload of "+h.Command.String(), err)
	}
	return h, nil
}

// broken puts the message into an error of reception. [io.EOF] stays as it is.
func (s *Server) broken(message string, err error) error {
	if errors.Is(err, fdpass.ErrTooManyFDs) {
		return &ProtocolError{"client", message, fmt.Sprintf("at most %d descriptors", s.maxFDs), "more"}
	}
	if err == io.EOF || err == net.ErrClosed {
		return err
	}
	return fmt.Errorf("vfio-user client: %s: %w", message, err)
}

// reject answers a message after which the connection cannot go on, and
// returns the reason.
func (s *Server) reject(h wire.Header, expected, found string) error {
	s.dropFDs()
	reason := &ProtocolError{"client", h.Command.String(), expected, found}
	_ = s.reply(h, unix.EINVAL) // the reason is worth more than a failure to tell it
	return reason
}

// reply sends s.out and s.outFDs, or an error reply for err, unless the client
// wants none.
func (s *Server) reply(h wire.Header, err error) error {
	r := wire.Header{ID: h.ID, Command: h.Command, Flags: wire.TypeReply}
	if err != nil {
		s.out, s.outFDs = s.out[:wire.HeaderSize], s.outFDs[:0]
		r.Flags |= wire.Error
		r.Errno = uint32(errnoOf(err))
	}
	if h.Flags&wire.NoReply != 0 {
		return nil
	}
	r.Size = uint32(len(s.out))
	r.Put(s.out)
	if err := s.conn.Send(s.out, s.outFDs); err != nil {
		if err == net.ErrClosed {
			return err
		}
		return fmt.Errorf("vfio-user client: reply to %v: %w", h.Command, err)
	}
	return nil
}

// dropFDs closes the descriptors of the request that nobody took.
func (s *Server) dropFDs() {
	fdpass.CloseAll(s.fds)
	s.fds = nil
}

// handle carries out one command with payload p. It leaves the reply's payload
// behind the header in s.out, and its descriptors in s.outFDs.
func (s *Server) handle(cmd wire.Command, p []byte) error {
	s.out, s.outFDs = s.out[:wire.HeaderSize], s.outFDs[:0]
	switch cmd {
	case wire.RegionRead:
		return s.regionRead(p)
	case wire.RegionWrite:
		return s.regionWrite(p)
	case wire.DMAMap:
		return s.dmaMap(p)
	case wire.DMAUnmap:
		return s.dmaUnmap(p)
	case wire.DeviceGetInfo:
		return s.deviceInfo(p)
	case wire.RegionGetInfo:
		return s.regionInfo(p)
	case wire.RegionGetIOFDs:
		return s.regionIOFDs(p)
	case wire.IRQGetInfo:
		return s.irqInfo(p)
	case wire.DeviceSetIRQs:
		return s.setIRQs(p)
	case wire.DeviceReset:
		s.dev.Reset()
		return nil
	}
	// VERSION a second time, REGION_WRITE_MULTI (never announced), migration,
	// commands for the other direction, and numbers nobody knows.
	return unix.EINVAL
}

// grow makes room for n more bytes in s.out and returns them.
func (s *Server) grow(n int) []byte {
	have := len(s.out)
	s.out = slices.Grow(s.out, n)[:have+n]
	return s.out[have:]
}
