package vnet

import (
	"fmt"
	"strconv"
)

// State is what a peer says in its State register.
type State uint32

// The states.
const (
	StateReset State = 0 // does not take part; its section means nothing
	StateInit  State = 1 // has seen the other leave its section alone
	StateReady State = 2 // its section may be read
	StateRun   State = 3 // its interface is up
)

// String is "RESET", "INIT", "READY", "RUN", or the number.
func (s State) String() string {
	switch s {
	case StateReset:
		return "RESET"
	case StateInit:
		return "INIT"
	case StateReady:
		return "READY"
	case StateRun:
		return "RUN"
	}
	return fmt.Sprintf("%d", uint32(s))
}

// MarshalText makes JSON show the name.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// readable reports whether a peer in this state lets its section be read. A
// state that nobody knows does not.
func (s State) readable() bool { return s == StateReady || s == StateRun }

// next is the state that follows when the peer's was seen to change. It is one
// step for one change: the peer has to see each of them.
//
// A peer's unknown state is neither RESET nor READY.
func (s State) next(peer State, up bool) State {
	switch {
	case s == StateReset && peer <= StateInit:
		return StateInit
	case s == StateInit && peer != StateReset:
		return StateReady
	case s.readable() && peer == StateReset:
		return StateReset
	case s == StateReady && peer.readable() && up:
		return StateRun
	}
	return s
}

// machine is the own state, and what it follows from.
type machine struct {
	state State
	up    bool
	seen  uint64 // the peer's state when it was last looked at, or unseen
}

// unseen is no state.
const unseen = 1 << 32

// see takes over what the peer's state is, and reports whether the own one
// moved.
func (m *machine) see(peer State) bool {
	if m.seen == uint64(peer) {
		return false
	}
	m.seen = uint64(peer)
	return m.step()
}

func (m *machine) step() bool {
	before := m.state
	m.state = before.next(State(m.seen), m.up)
	return m.state != before
}

// raise brings the interface up, and reports whether the own state moved.
func (m *machine) raise() bool {
	m.up = true
	// A peer that is not READY yet may still clear what would be read. Its next
	// change starts the interface.
	return m.state == StateReady && m.step()
}

// reset goes to RESET without being asked to by the peer. The peer has to be
// looked at next, as for the first time: if it was last seen in INIT, and missed
// that the own state was READY, it does not change, and neither side would ever
// move again.
func (m *machine) reset() { m.state, m.seen = StateReset, unseen }

// UnmarshalText is the inverse of MarshalText.
func (s *State) UnmarshalText(text []byte) error {
	for known := StateReset; known <= StateRun; known++ {
		if known.String() == string(text) {
			*s = known
			return nil
		}
	}
	n, err := strconv.ParseUint(string(text), 10, 32)
	*s = State(n)
	return err
}
