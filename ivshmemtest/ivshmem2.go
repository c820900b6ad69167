package ivshmemtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ivshmem2 is a client of an ivshmem2-server socket, for tests of the service
// and of other servers of that protocol: nothing of it is shared with our
// server. It is for one goroutine.
type Ivshmem2 struct {
	ID, MaxPeers, Vectors, Protocol uint32
	Output                          uint64 // size of one output section in bytes

	// Memory is the whole shared memory, MemoryFD its file.
	Memory   []byte
	MemoryFD int
	// Eventfds has those of each known peer, itself included, by vector.
	Eventfds map[uint32][]int
	// OwnOnly, set before Setup, closes the eventfds of others as they come:
	// many clients in one process would need the square of their number. Those
	// in Eventfds are -1 then.
	OwnOnly bool

	socket int
}

// Ivshmem2Message is one message of the server. Type is 0 INIT, 1 EVENT_FD or
// 2 PEER_GONE; FD is the descriptor that came with it, or -1.
type Ivshmem2Message struct {
	Type, ID, Vector uint32
	FD               int
}

// DialIvshmem2 connects and receives INIT. Where the server closes before that
// the error is or wraps [io.EOF] or [io.ErrUnexpectedEOF].
func DialIvshmem2(path string) (*Ivshmem2, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	c := &Ivshmem2{socket: fd, MemoryFD: -1, Eventfds: map[uint32][]int{}}
	if err := c.open(path); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Ivshmem2) open(path string) error {
	if err := unix.Connect(c.socket, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	m, err := c.Next(10 * time.Second)
	if err != nil {
		return err
	}
	if m.Type != 0 {
		return fmt.Errorf("expected INIT, found message type %d", m.Type)
	}
	return nil
}

// Setup receives messages until the last of the client's own eventfds.
func (c *Ivshmem2) Setup() error {
	for len(c.Eventfds[c.ID]) < int(c.Vectors) {
		if _, err := c.Next(10 * time.Second); err != nil {
			return err
		}
	}
	return nil
}

// Next receives one message and carries it out. Without one in time the error
// is EAGAIN; 0 is no time at all.
func (c *Ivshmem2) Next(patience time.Duration) (Ivshmem2Message, error) {
	m := Ivshmem2Message{FD: -1}
	p := []unix.PollFd{{Fd: int32(c.socket), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, int(patience.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return m, err
		}
		if n == 0 {
			return m, unix.EAGAIN
		}
		break
	}
	var head [8]byte
	fds, err := c.read(head[:], nil)
	if err != nil {
		return m, err
	}
	m.Type = binary.LittleEndian.Uint32(head[:])
	size := binary.LittleEndian.Uint32(head[4:])
	want := map[uint32]struct{ size, fds uint32 }{0: {40, 1}, 1: {16, 1}, 2: {12, 0}}[m.Type]
	if size != want.size {
		return m, fmt.Errorf("message type %d: expected %d bytes, found %d", m.Type, want.size, size)
	}
	body := make([]byte, size-8)
	if fds, err = c.read(body, fds); err != nil {
		return m, err
	}
	if len(fds) != int(want.fds) {
		return m, fmt.Errorf("message type %d: expected %d descriptors, found %d", m.Type, want.fds, len(fds))
	}
	if len(fds) == 1 {
		m.FD = fds[0]
	}
	word := func(offset int) uint32 { return binary.LittleEndian.Uint32(body[offset-8:]) }
	if m.Type == 0 {
		m.ID = word(16)
		return m, c.init(m.FD, word)
	}
	m.ID = word(8)
	if m.Type == 1 {
		m.Vector = word(12)
	}
	return m, c.apply(m)
}

func (c *Ivshmem2) init(fd int, word func(int) uint32) error {
	c.MemoryFD = fd
	if word(8) != 2 || word(12) != 2 {
		return fmt.Errorf("expected version 2, compatible with 2, found %d and %d", word(8), word(12))
	}
	c.ID, c.MaxPeers, c.Vectors, c.Protocol = word(16), word(20), word(24), word(28)
	c.Output = uint64(word(32)) | uint64(word(36))<<32
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	var err error
	c.Memory, err = unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return err
}

func (c *Ivshmem2) apply(m Ivshmem2Message) error {
	known := c.Eventfds[m.ID]
	if m.Type == 2 {
		if len(known) != int(c.Vectors) || m.ID == c.ID {
			return fmt.Errorf("PEER_GONE of peer %d, which has %d eventfds", m.ID, len(known))
		}
		closeAll(known)
		delete(c.Eventfds, m.ID)
		return nil
	}
	if int(m.Vector) != len(known) || m.Vector >= c.Vectors {
		unix.Close(m.FD)
		return fmt.Errorf("eventfd of peer %d: vector %d after %d others", m.ID, m.Vector, len(known))
	}
	if c.OwnOnly && m.ID != c.ID {
		unix.Close(m.FD)
		m.FD = -1
	}
	c.Eventfds[m.ID] = append(known, m.FD)
	return nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// read fills b, and adds the descriptors that come.
func (c *Ivshmem2) read(b []byte, fds []int) ([]int, error) {
	for first := true; len(b) > 0; first = false {
		var oob [64]byte
		n, oobn, _, _, err := unix.Recvmsg(c.socket, b, oob[:], unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fds, err
		}
		if n == 0 {
			if first {
				return fds, io.EOF
			}
			return fds, io.ErrUnexpectedEOF
		}
		list, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return fds, err
		}
		for _, m := range list {
			got, err := unix.ParseUnixRights(&m)
			if err != nil {
				return fds, err
			}
			fds = append(fds, got...)
		}
		b = b[n:]
	}
	return fds, nil
}

func (c *Ivshmem2) entry(peer uint32) *uint32 {
	return (*uint32)(unsafe.Pointer(&c.Memory[4*peer]))
}

// State is what a peer's entry of the State Table says.
func (c *Ivshmem2) State(peer uint32) uint32 { return atomic.LoadUint32(c.entry(peer)) }

// SetState writes the client's own entry, and rings vector 0 of every other
// known peer if it changed.
func (c *Ivshmem2) SetState(v uint32) error {
	if atomic.SwapUint32(c.entry(c.ID), v) == v {
		return nil
	}
	for id := range c.Eventfds {
		if id != c.ID {
			if err := c.Ring(id, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// Ring rings a vector of a peer.
func (c *Ivshmem2) Ring(peer, vector uint32) error {
	fds := c.Eventfds[peer]
	if int(vector) >= len(fds) {
		return fmt.Errorf("peer %d: vector %d of %d known", peer, vector, len(fds))
	}
	_, err := unix.Write(fds[vector], binary.NativeEndian.AppendUint64(nil, 1))
	return err
}

// Take returns how often a vector was rung since the last call.
func (c *Ivshmem2) Take(vector uint32) (uint64, error) {
	var b [8]byte
	switch _, err := unix.Read(c.Eventfds[c.ID][vector], b[:]); {
	case errors.Is(err, unix.EAGAIN):
		return 0, nil
	case err != nil:
		return 0, err
	}
	return binary.NativeEndian.Uint64(b[:]), nil
}

// Socket is the descriptor of the connection.
func (c *Ivshmem2) Socket() int { return c.socket }

// Close disconnects and gives everything back. The client must not be used
// afterwards.
func (c *Ivshmem2) Close() {
	unix.Close(c.socket)
	for _, fds := range c.Eventfds {
		closeAll(fds)
	}
	if c.Memory != nil {
		unix.Munmap(c.Memory)
	}
	if c.MemoryFD >= 0 {
		unix.Close(c.MemoryFD)
	}
}
