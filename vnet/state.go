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

// readable reports whether a peer in this state lets its section be read. A
// state that nobody knows does not.
func (s State) readable() bool { return s == StateReady || s == StateRun }

// next is the state that follows while the peer's is what it is. A peer's
// unknown state is neither RESET nor READY.
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
