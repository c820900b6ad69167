package vfiouser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/fdpass"
	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/vfiouser/internal/wire"
	"golang.org/x/sys/unix"
)

// Client is the client half of one connection. Its methods may be called from
// many goroutines; requests go out one at a time, each waits for its reply.
//
// Errors: a [*RemoteError] is the server's refusal of one command. A
// [*ConnectionError] means that the connection has ended, or cannot be trusted
// any more, and stays the answer to every later call. Anything else is a
// mistake in the arguments, and nothing was sent.
//
// Commands of the server (DMA) are answered with an error while a request of
// this end waits.
type Client struct {
	conn *fdpass.Conn

	mu      sync.Mutex
	timeout time.Duration
	dead    *ConnectionError
	id      uint16
	in, out []byte
	inFDs   [fdpass.MaxFDs]int

	// What the server announced.
	maxFDs      int // descriptors it takes per message
	maxTransfer int // bytes per region access
}

// Dial connects to the socket at path and negotiates. The context bounds both;
// DefaultTimeout bounds the negotiation in any case. When the server turns the
// client away, the error is [ErrRefused].
func Dial(ctx context.Context, path string) (*Client, error) {
	if err := sockpath.Check(path); err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("vfio-user socket %s: %s: %w", path, dialRemedy(err), err)
	}
	c, err := newClient(conn.(*net.UnixConn))
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, c.conn.Shutdown)
	err = c.negotiate()
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("vfio-user socket %s: %w", path, err)
	}
	return c, nil
}

func dialRemedy(err error) string {
	switch {
	case errors.Is(err, unix.ENOENT):
		return "there is no such socket: start the server, or check the path"
	case errors.Is(err, unix.ECONNREFUSED):
		return "nobody listens there (a file left by a server that has ended?): start the server"
	case errors.Is(err, unix.EACCES):
		return "no permission: connecting needs write permission to the socket and search permission to its directories"
	case errors.Is(err, unix.EAGAIN):
		return "the server does not accept connections (its queue is full): try again, or look what it is doing"
	case errors.Is(err, unix.EPROTOTYPE):
		return "it is not a stream socket, so no vfio-user server"
	}
	return "cannot connect"
}

// NewClient negotiates on conn, a connection to a server, which it takes over
// in any case.
func NewClient(conn *net.UnixConn) (*Client, error) {
	c, err := newClient(conn)
	if err != nil {
		return nil, err
	}
	if err := c.negotiate(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func newClient(conn *net.UnixConn) (*Client, error) {
	fc, err := fdpass.FromUnixConn(conn)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: fc, maxFDs: wire.DefaultMaxFDs, maxTransfer: wire.MaxTransfer}
	c.in = make([]byte, 256)
	c.out = make([]byte, wire.HeaderSize, 256)
	if err := c.SetTimeout(DefaultTimeout); err != nil {
		fc.Close()
		return nil, err
	}
	return c, nil
}

// SetTimeout bounds the time that the server has to answer one request, from
// the next one on, initially DefaultTimeout. It holds within an eighth. A
// request that takes longer makes the connection unusable, as its reply might
// still come.
func (c *Client) SetTimeout(d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timeout = d
	c.conn.SetSendTimeout(d)
	return c.conn.SetReceiveTick(max(d/8, time.Millisecond))
}

// FD is the socket's descriptor, to be watched by the caller and nothing else:
// with poll or epoll it reports POLLRDHUP when the server has gone away, and
// POLLHUP when this end gave up the connection. It is -1 after Close.
func (c *Client) FD() int { return c.conn.FD() }

// Close ends the connection. A call that waits in another goroutine fails at
// once. What was mapped, and descriptors that were received, stay valid.
func (c *Client) Close() error { return c.conn.Close() }

func (c *Client) negotiate() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begin()
	c.out = wire.VersionInfo{Major: 0, Minor: 1, MaxFDs: fdpass.MaxFDs, MaxTransfer: wire.MaxTransfer}.Append(c.out)
	p, _, err := c.call(wire.Version, nil, wire.MaxVersionMessage-wire.HeaderSize, 0)
	if err != nil {
		var remote *RemoteError
		if errors.As(err, &remote) {
			remote.refused = true
		}
		return err
	}
	v, err := wire.DecodeVersion(p)
	if err != nil {
		return c.violation(wire.Version, "well-formed version data", err.Error())
	}
	if v.Major != 0 || v.Minor > 1 {
		return c.violation(wire.Version, "version 0.0 or 0.1", fmt.Sprintf("%d.%d", v.Major, v.Minor))
	}
	if v.TwinSocket {
		return c.violation(wire.Version, "no twin socket, as none was offered", "one")
	}
	if v.MaxTransfer < 8 {
		return c.violation(wire.Version, "a max_data_xfer_size of at least 8, the widest register access", fmt.Sprint(v.MaxTransfer))
	}
	c.maxFDs = min(v.MaxFDs, fdpass.MaxFDs)
	c.maxTransfer = int(min(v.MaxTransfer, wire.MaxTransfer))
	return nil
}

// begin starts a request in c.out, to which the caller appends the payload.
func (c *Client) begin() { c.out = c.out[:wire.HeaderSize] }

// call sends the request in c.out with fds and returns the payload of its
// reply, at most maxPayload bytes, and its descriptors, at most maxFDs, which
// are then the caller's. The payload is valid until the next call. c.mu is
// held.
func (c *Client) call(cmd wire.Command, fds []int, maxPayload, maxFDs int) ([]byte, []int, error) {
	if c.dead != nil {
		return nil, nil, c.dead
	}
	c.id++
	wire.Header{ID: c.id, Command: cmd, Size: uint32(len(c.out))}.Put(c.out)
	deadline := time.Now().Add(c.timeout)
	if err := c.conn.Send(c.out, fds); err != nil {
		return nil, nil, c.lost(cmd, err)
	}
	for {
		got, err := c.conn.ReceiveFull(c.in[:wire.HeaderSize], c.inFDs[:0], deadline)
		if err != nil {
			return nil, nil, c.lost(cmd, err)
		}
		h, _ := wire.DecodeHeader(c.in)
		kind := h.Flags & wire.TypeMask
		var bad *ConnectionError
		limit := maxPayload
		switch {
		case kind == wire.TypeCommand, h.Flags&wire.Error != 0:
			// To be skipped, with whatever payload it has.
			limit = wire.MaxMessage - wire.HeaderSize
		case kind != wire.TypeReply:
			bad = c.violation(cmd, "message type 0 or 1", fmt.Sprint(uint32(kind)))
		}
		if kind == wire.TypeReply && (h.ID != c.id || h.Command != cmd) {
			bad = c.violation(cmd, fmt.Sprintf("the reply to request %d", c.id),
				fmt.Sprintf("one to request %d, %v", h.ID, h.Command))
		}
		if bad == nil && (h.Size < wire.HeaderSize || uint64(h.Size) > uint64(wire.HeaderSize+limit)) {
			bad = c.violation(cmd, fmt.Sprintf("a size of %d to %d bytes", wire.HeaderSize, wire.HeaderSize+limit), fmt.Sprint(h.Size))
		}
		if bad != nil {
			fdpass.CloseAll(got)
			return nil, nil, bad
		}
		n := int(h.Size) - wire.HeaderSize
		if n > len(c.in) {
			c.in = make([]byte, n)
		}
		if got, err = c.conn.ReceiveFull(c.in[:n], got, deadline); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, nil, c.lost(cmd, err)
		}
		if kind == wire.TypeCommand {
			fdpass.CloseAll(got)
			if err := c.decline(h); err != nil {
				return nil, nil, c.lost(h.Command, err)
			}
			// A server that never stops must not keep the caller for ever.
			if !time.Now().Before(deadline) {
				return nil, nil, c.lost(cmd, os.ErrDeadlineExceeded)
			}
			continue
		}
		if h.Flags&wire.Error != 0 {
			fdpass.CloseAll(got)
			errno := unix.Errno(h.Errno)
			if errno == 0 || errno > maxErrno {
				errno = unix.EINVAL
			}
			return nil, nil, &RemoteError{Command: cmd.String(), Errno: errno}
		}
		if len(got) > maxFDs {
			fdpass.CloseAll(got)
			return nil, nil, c.violation(cmd, fmt.Sprintf("at most %d descriptors", maxFDs), fmt.Sprint(len(got)))
		}
		return c.in[:n], got, nil
	}
}

// decline answers a command of the server. Its only commands are for DMA, and
// this end has mapped nothing that it may reach that way.
func (c *Client) decline(h wire.Header) error {
	if h.Flags&wire.NoReply != 0 {
		return nil
	}
	var b [wire.HeaderSize]byte
	wire.Header{
		ID: h.ID, Command: h.Command, Size: wire.HeaderSize,
		Flags: wire.TypeReply | wire.Error, Errno: uint32(unix.EINVAL),
	}.Put(b[:])
	return c.conn.Send(b[:], nil)
}

// lost ends the connection because of an error of the socket.
func (c *Client) lost(cmd wire.Command, err error) error {
	switch {
	case err == net.ErrClosed:
		return c.fail(err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("%v: the server did not answer within %v: %w", cmd, c.timeout, err)
	case errors.Is(err, fdpass.ErrTooManyFDs):
		return c.violation(cmd, fmt.Sprintf("at most %d descriptors", fdpass.MaxFDs), "more")
	case err == io.EOF:
		err = fmt.Errorf("%v: the server closed the connection: %w", cmd, err)
	default:
		err = fmt.Errorf("%v: %w", cmd, err)
	}
	return c.fail(err)
}

// violation ends the connection because the server broke the protocol.
func (c *Client) violation(cmd wire.Command, expected, found string) *ConnectionError {
	return c.fail(&ProtocolError{"server", cmd.String(), expected, found})
}

// fail ends the connection. The descriptor stays open until Close, so that one
// who watches it sees the end and not another file.
func (c *Client) fail(err error) *ConnectionError {
	c.dead = &ConnectionError{err}
	c.conn.Shutdown()
	return c.dead
}

// room grows c.out by n bytes and returns them.
func (c *Client) room(n int) []byte {
	have := len(c.out)
	c.out = slices.Grow(c.out, n)[:have+n]
	return c.out[have:]
}
