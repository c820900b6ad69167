package shmem

import "fmt"

// States reads the State Table: one state per peer, 0 meaning "not there".
type States interface {
	// Load returns the state of a peer. A peer at or above the number of
	// peers is an error.
	Load(peer uint32) (uint32, error)
}

// StateTable is a mapped State Table.
type StateTable struct {
	view  *ReadOnly
	peers uint32
}

// NewStateTable makes a State Table for a number of peers of a view that
// starts with it.
func NewStateTable(v *ReadOnly, peers uint32) (*StateTable, error) {
	if v.Size() < 4*uint64(peers) {
		return nil, &BoundsError{Section: v.Name(), Offset: 0, Width: 4 * uint64(peers), Size: v.Size()}
	}
	return &StateTable{v, peers}, nil
}

// Load returns the state of a peer by one aligned 32-bit load with acquire
// ordering.
func (t *StateTable) Load(peer uint32) (uint32, error) {
	if peer >= t.peers {
		return 0, fmt.Errorf("State Table: peer %d, expected a peer below %d", peer, t.peers)
	}
	return t.view.Load32(4 * uint64(peer))
}

// Names of the sections, for views and for display.
const (
	NameStateTable = "State Table"
	NameReadWrite  = "R/W section"
	NameOutput     = "output section"
	NameInputs     = "input sections"
)

// Sections is the shared memory of a link as one of its peers holds it. What
// the link does not have, or the holder cannot reach, is nil.
type Sections struct {
	Layout Layout
	States States
	// ReadWrite is the R/W section.
	ReadWrite *ReadWrite
	// Output is the own output section.
	Output *ReadWrite
	// Inputs are the output sections of all peers, own one included, one
	// after the other.
	Inputs *ReadOnly
}

// Input returns the output section of a peer, read-only.
func (s *Sections) Input(peer uint32) (*ReadOnly, error) {
	if peer >= s.Layout.Peers {
		return nil, fmt.Errorf("output section of peer %d: expected a peer below %d", peer, s.Layout.Peers)
	}
	if s.Inputs == nil {
		return nil, fmt.Errorf("output section of peer %d: this link has no output sections", peer)
	}
	return s.Inputs.View(uint64(peer)*s.Layout.Output, s.Layout.Output)
}
