package stream

import (
	"errors"
	"fmt"
	"net"
	"strconv"
)

var (
	// ErrProtocol says that a peer, or the link, speaks something else.
	ErrProtocol = errors.New("not the stream protocol")
	// ErrTooMany says that the own area, or the peer's, has no slot left for a
	// connection.
	ErrTooMany = errors.New("too many connections")
)

// ViolationError says that a peer wrote what it must not write. Whatever
// it concerned has ended.
type ViolationError struct {
	Peer  uint32
	Field string
	Value uint64
	Bound string // what was expected
}

func (e *ViolationError) Error() string {
	return fmt.Sprintf("peer %d violates the protocol: %s: expected %s, found %#x", e.Peer, e.Field, e.Bound, e.Value)
}

// Addr is an end of a connection. It implements [net.Addr].
type Addr struct {
	Peer uint32 // peer ID
	Port uint32
}

var _ net.Addr = Addr{}

// Network is "ivshmem".
func (Addr) Network() string { return "ivshmem" }

// String is the peer ID and the port, such as "1:80".
func (a Addr) String() string {
	return strconv.FormatUint(uint64(a.Peer), 10) + ":" + strconv.FormatUint(uint64(a.Port), 10)
}

// ParseAddr reads what String writes.
func ParseAddr(s string) (Addr, error) {
	host, port, err := net.SplitHostPort(s)
	if err == nil {
		var a, b uint64
		if a, err = strconv.ParseUint(host, 10, 16); err == nil {
			if b, err = strconv.ParseUint(port, 10, 32); err == nil {
				return Addr{uint32(a), uint32(b)}, nil
			}
		}
	}
	return Addr{}, fmt.Errorf("address %q: expected a peer ID and a port, such as 1:80", s)
}
