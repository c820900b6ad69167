package ivshsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/link"
)

// Limits of the wire, and of the clients that exist (protocol page,
// "Limits").
const (
	StateTable = 4096           // size of the State Table in bytes, fixed
	MaxPeers   = StateTable / 4 // as many as its entries
	MaxVectors = 1024           // that the device of 2020 takes

	protocolVersion = 2
)

// Message types.
const (
	typeInit     = 0
	typeEventFD  = 1
	typePeerGone = 2
)

// appendInit is the INIT message; the shared memory goes with it.
func appendInit(b []byte, c link.Config, id uint32) []byte {
	for _, v := range []uint32{
		typeInit, 40, protocolVersion, protocolVersion,
		id, c.Peers, uint32(c.Vectors), uint32(c.Protocol.ForPeer(id)),
	} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return binary.LittleEndian.AppendUint64(b, c.Output)
}

// appendEventFD is the EVENT_FD message; the eventfd goes with it.
func appendEventFD(b []byte, id, vector uint32) []byte {
	for _, v := range []uint32{typeEventFD, 16, id, vector} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// appendPeerGone is the PEER_GONE message; nothing goes with it.
func appendPeerGone(b []byte, id uint32) []byte {
	for _, v := range []uint32{typePeerGone, 12, id} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// Check says whether the clients of this wire can use a link. They are not
// told where its sections are: the State Table is fixed, and the R/W section
// is what the size of the file leaves beside the output sections. That size
// has to be one that a PCI BAR can have.
func Check(c link.Config) error {
	l, err := c.Layout()
	if err != nil {
		return err
	}
	switch {
	case c.Peers > MaxPeers:
		return fmt.Errorf("ivshmem2 socket: expected at most %d peers, as many as its State Table of %d bytes holds, found %d", MaxPeers, StateTable, c.Peers)
	case c.Vectors > MaxVectors:
		return fmt.Errorf("ivshmem2 socket: expected at most %d vectors, found %d", MaxVectors, c.Vectors)
	case l.StateTable != StateTable:
		return fmt.Errorf("ivshmem2 socket: expected a State Table of %d bytes, which its clients take for granted, found %d", StateTable, l.StateTable)
	}
	total := l.Total()
	if total&(total-1) == 0 && l.ReadWrite > 0 {
		return nil
	}
	outputs := uint64(l.Peers) * l.Output
	rw, err := ReadWrite(l.Peers, l.Output, l.ReadWrite)
	if err != nil {
		return err
	}
	return fmt.Errorf("ivshmem2 socket: expected a shared memory of a power of two with a R/W section, found %d bytes (State Table %d + R/W section %d + %d output sections x %d): make the R/W section %d = %d - %d - %d",
		total, l.StateTable, l.ReadWrite, l.Peers, l.Output, rw, StateTable+rw+outputs, StateTable, outputs)
}

// ReadWrite is the size of the smallest R/W section of at least the given size
// that makes the memory of a link a power of two, in bytes. It is never 0: the
// device of 2020 puts the output sections over the State Table where there is
// no R/W section.
func ReadWrite(peers uint32, output, atLeast uint64) (uint64, error) {
	const limit = 1 << 62
	high, outputs := bits.Mul64(uint64(peers), output)
	if high != 0 || outputs > limit || atLeast > limit || StateTable+outputs+atLeast > limit {
		return 0, fmt.Errorf("ivshmem2 socket: %d output sections of %d bytes and a R/W section of %d do not fit into 2^62 bytes", peers, output, atLeast)
	}
	fixed := StateTable + outputs
	total := uint64(1) << bits.Len64(fixed+max(atLeast, 1)-1)
	return total - fixed, nil
}

// messageWriter is what writes of a [net.UnixConn] need.
type messageWriter interface {
	WriteMsgUnix(b, oob []byte, addr *net.UnixAddr) (n, oobn int, err error)
}

// send writes one message, its descriptor attached to the first byte. Where the
// socket takes only a part, the rest follows. Until stop it waits for its turn
// where the kernel has too many descriptors on their way (unix(7)): those that
// other clients have not received yet count against the limit of this process.
func send(w messageWriter, b, oob []byte, stop <-chan struct{}) error {
	for len(b) > 0 {
		n, _, err := w.WriteMsgUnix(b, oob, nil)
		switch {
		case errors.Is(err, unix.ETOOMANYREFS):
			select {
			case <-stop:
				return err
			case <-time.After(10 * time.Millisecond):
			}
		case err != nil:
			return err
		case n > 0:
			b, oob = b[n:], nil
		}
	}
	return nil
}
