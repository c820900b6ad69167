package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/ivshmem-go/ivshmem/shmem"
)

// An area is what one peer writes and all others read: its output section, or
// its share of the R/W section. docs/stream.md is the page of its format. All
// integers are little-endian.
const (
	magic   = 0x6d61657274737669 // "ivstream"
	version = 1

	lineSize = 64

	// Header, in words of 8 bytes.
	wordMagic    = 0
	wordVersion  = 1 // version, epoch << 32
	wordGeometry = 2 // slots, log2 of the ring size << 32, log2 of the events << 40
	wordVector   = 3 // the vector to ring this peer on, or noVector
	wordCounter  = 8 // events that were ever written: a line of its own

	headerSize = 2 * lineSize

	// A slot's control block, in words: the connection's descriptor and what
	// its owner waits for in the first line, how far it has read in the second.
	slotSize       = 2 * lineSize
	slotWords      = slotSize / 8
	slotID         = 0 // connection ID, 0: the slot is free
	slotState      = 1 // state, other peer's ID << 32
	slotOther      = 2 // other peer's slot (while dialing: the own port), port << 32
	slotEpoch      = 3 // other peer's epoch
	slotDataEvent  = 4 // 1 + position of the record that is waited for
	slotSpaceEvent = 5 // position that has to be read up to
	slotHead       = 8 // position that was read up to

	// noVector says that a peer cannot be rung.
	noVector = 1<<32 - 1

	minRing, maxRing = 1 << 9, 1 << 24
	defaultRing      = 256 << 10
	maxSlots         = 1 << 16
	minEvents        = 1 << 4
	maxEvents        = 1 << 10
)

// States of a slot. A connection whose ID is in the slot no more was reset.
const (
	slotDialing = 1
	slotOpen    = 2
	slotRefused = 3 // an answer to a dialing peer
	slotClosed  = 4 // reads and writes no more: what it wrote is still there
)

// geometry is how an area is divided: header, ring of events, control blocks,
// rings.
type geometry struct {
	slots  uint32
	ring   uint64 // bytes of each ring
	events uint64 // entries
}

func (g geometry) blocksOffset() uint64 { return headerSize + g.events*8 }

func (g geometry) ringsOffset() uint64 { return g.blocksOffset() + uint64(g.slots)*slotSize }

func (g geometry) size() uint64 { return g.ringsOffset() + uint64(g.slots)*g.ring }

func (g geometry) word() uint64 {
	return uint64(g.slots) | uint64(bits.TrailingZeros64(g.ring))<<32 | uint64(bits.TrailingZeros64(g.events))<<40
}

// ErrTooSmall says that the sections of a link have no room for streams.
var ErrTooSmall = errors.New("shared memory too small for streams")

// divide divides an area of size bytes. A ring of 0 bytes is the default: the
// largest that leaves room for some 32 connections.
func divide(size, ring uint64) (geometry, error) {
	g := geometry{events: minEvents}
	for g.events < maxEvents && g.events*8*64 < size {
		g.events *= 2
	}
	if ring == 0 {
		ring = defaultRing
		for ring > minRing && ring*32 > size {
			ring /= 2
		}
	}
	if bits.OnesCount64(ring) != 1 || ring < minRing || ring > maxRing {
		return g, fmt.Errorf("ring of %d bytes: expected a power of two from %d to %d", ring, minRing, maxRing)
	}
	g.ring = ring
	if fixed := headerSize + g.events*8; size >= fixed {
		g.slots = uint32(min((size-fixed)/(slotSize+ring), maxSlots))
	}
	if g.slots == 0 {
		return g, fmt.Errorf("%w: an area of %d bytes has no room for a connection (%d bytes, and a ring of %d)",
			ErrTooSmall, size, headerSize+g.events*8+slotSize, ring)
	}
	return g, nil
}

// parseGeometry checks what a peer says of its area.
func parseGeometry(w, size uint64) (geometry, error) {
	g := geometry{slots: uint32(w)}
	ringLog, eventsLog := w>>32&0xff, w>>40&0xff
	if ringLog < 9 || ringLog > 24 || eventsLog < 4 || eventsLog > 10 || g.slots == 0 || g.slots > maxSlots || w>>48 != 0 {
		return g, &ViolationError{Field: "geometry", Value: w, Bound: "ring 2^9..2^24, events 2^4..2^10, 1..65536 slots"}
	}
	g.ring, g.events = 1<<ringLog, 1<<eventsLog
	if g.size() > size {
		return g, &ViolationError{Field: "size of the area", Value: g.size(), Bound: fmt.Sprintf("at most %d", size)}
	}
	return g, nil
}

// areas are the areas of all peers as one of them sees them.
type areas struct {
	size   uint64 // of each
	own    *shmem.ReadWrite
	others func(peer uint32) (*shmem.ReadOnly, error)
}

// findAreas takes the output sections, or shares of the R/W section where the
// link has none, or has them trap.
func findAreas(s *shmem.Sections, id uint32, inputsTrap bool) (areas, error) {
	if s.Output != nil && s.Inputs != nil && !inputsTrap {
		return areas{s.Output.Size(), s.Output, s.Input}, nil
	}
	switch {
	case s.ReadWrite == nil && inputsTrap:
		return areas{}, fmt.Errorf("%w: the link is strict, so its guests read output sections by messages, and it has no R/W section: serve it with --rw, or without --mode strict", ErrTooSmall)
	case s.ReadWrite == nil:
		return areas{}, fmt.Errorf("%w: the link has neither output sections nor an R/W section", ErrTooSmall)
	}
	share := s.ReadWrite.Size() / uint64(s.Layout.Peers) &^ (lineSize - 1)
	view := func(peer uint32) (*shmem.ReadWrite, error) {
		return s.ReadWrite.View(uint64(peer)*share, share)
	}
	own, err := view(id)
	if err != nil {
		return areas{}, err
	}
	return areas{share, own, func(peer uint32) (*shmem.ReadOnly, error) {
		v, err := view(peer)
		if err != nil {
			return nil, err
		}
		return v.ReadOnly(), nil
	}}, nil
}

// Records are what a ring carries: a word of header, and the bytes, padded to
// words. A record never goes around the end of the ring. The word behind the
// last record is 0.
const (
	recordValid   = 1 << 32 // every header has it, so that none is 0
	recordEnd     = 1 << 33 // of a message
	recordPadding = 1 << 34 // nothing but room up to the end of the ring
	recordFin     = 1 << 35 // the last one
	recordPacked  = 1 << 36 // whole messages: of each its length in a word, and its bytes, padded
	recordFlags   = recordValid | recordEnd | recordPadding | recordFin | recordPacked

	lengthMask   = 1<<32 - 1
	recordHeader = 8
	// maxPacked is the most bytes of a packed record: the reader copies it in
	// one piece.
	maxPacked = 16 << 10
)

func pad(n uint64) uint64 { return (n + 7) &^ 7 }

// checkRecord checks a header that a peer wrote at a position of a ring.
func checkRecord(header, position, ring uint64) error {
	n := header & lengthMask
	room := ring - position&(ring-1) - recordHeader
	switch {
	case header&^(recordFlags|lengthMask) != 0 || header&recordValid == 0:
		return &ViolationError{Field: "record flags", Value: header >> 32, Bound: "known flags"}
	case n > room:
		return &ViolationError{Field: "record length", Value: n, Bound: fmt.Sprintf("at most %d", room)}
	case header&recordPadding != 0 && n != room:
		return &ViolationError{Field: "padding", Value: n, Bound: fmt.Sprintf("exactly %d", room)}
	case header&recordPacked != 0 && (n == 0 || n > maxPacked):
		return &ViolationError{Field: "packed record length", Value: n, Bound: fmt.Sprintf("1 to %d", maxPacked)}
	}
	return nil
}

// descriptor says whose connection has a slot.
type descriptor struct {
	id          uint64
	state, peer uint32
	slot, port  uint32
	epoch       uint32
}

func (d *descriptor) words() [4]uint64 {
	return [4]uint64{
		slotID:    d.id,
		slotState: uint64(d.state) | uint64(d.peer)<<32,
		slotOther: uint64(d.slot) | uint64(d.port)<<32,
		slotEpoch: uint64(d.epoch),
	}
}

func (d *descriptor) parse(w [4]uint64) {
	d.id = w[slotID]
	d.state, d.peer = uint32(w[slotState]), uint32(w[slotState]>>32)
	d.slot, d.port = uint32(w[slotOther]), uint32(w[slotOther]>>32)
	d.epoch = uint32(w[slotEpoch])
}

// The format is little-endian, and accessed by the machine's own words.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1
