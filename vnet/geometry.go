package vnet

import "github.com/ivshmem-go/ivshmem/shmem"

const (
	// MinMTU is the smallest MTU in bytes.
	MinMTU = 68
	// MaxFrame is the length of the longest frame that any peer may send: the
	// largest MTU, addresses and type, and a VLAN tag. A longer one is dropped.
	MaxFrame = 65535 + headerLength + tagLength

	headerLength = 14 // destination, source, type
	tagLength    = 4  // VLAN

	maxEntries = 4096
	minEntries = 32
	minData    = 4 * MinMTU
	lineSize   = 64
)

// Geometry is how each of the two output sections is divided. Both peers
// compute it from the size; nothing about it is exchanged. Sizes and offsets are
// in bytes, from the start of the section:
//
//	0            descriptors of the owner's queue, 16 each
//	16·Entries   ring of available frames: flags, index, entries, used_event
//	aligned 64   ring of used frames, those of the other peer's queue: flags,
//	             index, entries, avail_event
//	Header       frames of the owner's queue
type Geometry struct {
	Output  uint64 // size of the section
	Entries uint32 // of each queue: a power of two from 32 to 4096
	Header  uint64 // where frames begin
}

func align(x uint64) uint64 { return (x + lineSize - 1) &^ (lineSize - 1) }

func header(n uint64) uint64 { return align(usedOffset(n) + 6 + 8*n) }

func usedOffset(n uint64) uint64 { return align(16*n + 2*(3+n)) }

// NewGeometry divides output sections of a size. The error is a *[SizeError].
func NewGeometry(output uint64) (Geometry, error) {
	// A section that is too small for 64 entries gets 32, and the header of 64:
	// that is how all peers count.
	n, h := uint64(maxEntries), uint64(0)
	for ; n > minEntries; n /= 2 {
		if h = header(n); h < output/8 {
			break
		}
	}
	if output < h || output-h < minData {
		return Geometry{}, &SizeError{Output: output, Header: h}
	}
	return Geometry{Output: output, Entries: uint32(n), Header: h}, nil
}

// Data is the size of what frames have, in bytes.
func (g Geometry) Data() uint64 { return g.Output - g.Header }

// DefaultMTU is the MTU that Linux gives its interface, in bytes.
func (g Geometry) DefaultMTU() int { return int(max(MinMTU, min(16384, g.Data()/16))) }

// MaxMTU is the largest MTU in bytes. Linux has the same limit; but as a sender
// it may stop for ever with an MTU above about twice the default.
func (g Geometry) MaxMTU() int { return int(min(65535, g.Data()/4)) }

// queue is where the fields of a queue lie: those that its sender writes in the
// sender's output section, those that its receiver writes in the receiver's.
//
// The flags before an index and the two bytes behind an event index are always
// 0. So both can be accessed as 32 bits, and a 32-bit store is a full barrier
// between it and a 32-bit load: what is told to the peer, and what it wants to
// be told.
type queue struct {
	mask       uint16
	avail      uint64 // flags, index, ring: the sender's
	usedEvent  uint64 // the sender's
	used       uint64 // flags, index, ring: the receiver's
	availEvent uint64 // the receiver's
}

func (g Geometry) queue() queue {
	n := uint64(g.Entries)
	used := usedOffset(n)
	return queue{mask: uint16(n - 1), avail: 16 * n, usedEvent: 16*n + 4 + 2*n, used: used, availEvent: used + 4 + 8*n}
}

const (
	indexOffset = 2 // in a ring, behind flags
	ringOffset  = 4
)

func loadIndex(v *shmem.ReadOnly, ring uint64) (uint16, error) {
	x, err := v.Load32(ring)
	return uint16(x >> 16), err
}

// passed reports whether an index that goes from one value to another passes an
// event: whether who waits for the event has to be rung. All of them wrap.
func passed(event, from, to uint16) bool { return to-event-1 < to-from }
