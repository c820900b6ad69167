package shmem

import "fmt"

// PageSize is the granularity of sections in bytes: the smallest page of the
// machines that the device exists for (specification: section sizes are
// multiples of the mapping page).
const PageSize = 4096

// Peer counts of the specification.
const (
	minPeers = 2
	maxPeers = 65536
)

// Layout says where the sections of a link lie in its shared memory region.
// It is a pure value; sizes and offsets are in bytes. From low to high:
// State Table, R/W section, output section of peer 0, of peer 1, …
type Layout struct {
	StateTable uint64 // size, never 0
	ReadWrite  uint64 // size, 0 where there is no R/W section
	Output     uint64 // size of one output section, 0 where there are none
	Peers      uint32
}

// LayoutError says why sizes do not make a layout.
type LayoutError struct {
	Field    string // "State Table size", "R/W section size", …
	Value    uint64
	Expected string
}

func (e *LayoutError) Error() string {
	return fmt.Sprintf("shared memory layout: %s is %d (%#x), expected %s", e.Field, e.Value, e.Value, e.Expected)
}

// NewLayout checks section sizes and peer count and returns the layout. All
// errors are of type *[LayoutError].
func NewLayout(stateTable, readWrite, output uint64, peers uint32) (Layout, error) {
	l := Layout{StateTable: stateTable, ReadWrite: readWrite, Output: output, Peers: peers}
	if peers < minPeers || peers > maxPeers {
		return Layout{}, &LayoutError{"Maximum Peers", uint64(peers), "2 to 65536"}
	}
	if stateTable == 0 {
		return Layout{}, &LayoutError{"State Table size", 0, "at least 4 bytes for each peer"}
	}
	if stateTable < 4*uint64(peers) {
		return Layout{}, &LayoutError{"State Table size", stateTable, fmt.Sprintf("at least %d, 4 bytes for each of %d peers", 4*uint64(peers), peers)}
	}
	for _, s := range []struct {
		name string
		size uint64
	}{
		{"State Table size", stateTable},
		{"R/W section size", readWrite},
		{"output section size", output},
	} {
		if s.size%PageSize != 0 {
			return Layout{}, &LayoutError{s.name, s.size, fmt.Sprintf("a multiple of %d", PageSize)}
		}
	}
	// Offsets are handed to mmap, whose offsets are signed: the sum has to
	// stay below 2^63.
	const limit = 1<<63 - 1
	if stateTable > limit || readWrite > limit-stateTable {
		return Layout{}, &LayoutError{"R/W section size", readWrite, "a region that ends below 2^63"}
	}
	if output > (limit-stateTable-readWrite)/uint64(peers) {
		return Layout{}, &LayoutError{"output section size", output, fmt.Sprintf("a region that ends below 2^63 with %d output sections", peers)}
	}
	return l, nil
}

// Total is the size of the shared memory region in bytes.
func (l Layout) Total() uint64 { return l.OutputOffset(l.Peers) }

// ReadWriteOffset is the offset of the R/W section in the region.
func (l Layout) ReadWriteOffset() uint64 { return l.StateTable }

// OutputOffset is the offset of the output section of a peer in the region.
func (l Layout) OutputOffset(peer uint32) uint64 {
	return l.StateTable + l.ReadWrite + uint64(peer)*l.Output
}

// CheckRegion checks that the layout fits into a region of size bytes.
func (l Layout) CheckRegion(size uint64) error {
	if size < l.Total() {
		return &LayoutError{"shared memory region size", size, fmt.Sprintf("at least %d: State Table %d + R/W section %d + %d output sections of %d", l.Total(), l.StateTable, l.ReadWrite, l.Peers, l.Output)}
	}
	return nil
}
