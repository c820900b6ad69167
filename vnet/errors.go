package vnet

import (
	"errors"
	"fmt"
)

var (
	// ErrUnsuitable says that the device, or its link, is not one for virtual
	// Ethernet.
	ErrUnsuitable = errors.New("not a link for virtual Ethernet")
	// ErrNoCarrier says that a frame was not sent because the peer does not
	// run, or the own interface is down.
	ErrNoCarrier = errors.New("no carrier")
	// ErrReset says that the link was reset while a frame was in the caller's
	// hands: one to send is lost, and the bytes of one that was received may
	// have been anything.
	ErrReset = errors.New("the link was reset")
)

// SizeError says that output sections are too small for virtual Ethernet.
type SizeError struct {
	Output uint64 // size of one output section in bytes
	Header uint64 // bytes that its queue needs
}

func (e *SizeError) Error() string {
	return fmt.Sprintf("output sections of %d bytes are too small for virtual Ethernet: expected at least %d, %d for the smallest queue and %d for data",
		e.Output, e.Header+minData, e.Header, minData)
}

// Is makes errors.Is(err, [ErrUnsuitable]) hold.
func (e *SizeError) Is(target error) bool { return target == ErrUnsuitable }

// MTUError says that an MTU does not fit the link.
type MTUError struct {
	MTU  int
	Max  int
	Data uint64 // bytes of each output section that frames have
}

func (e *MTUError) Error() string {
	return fmt.Sprintf("MTU %d: expected %d to %d: at most 65535, and a quarter of the %d bytes that an output section of this link has for frames", e.MTU, MinMTU, e.Max, e.Data)
}

// FrameSizeError says that a frame to send is too short or too long.
type FrameSizeError struct {
	Length int
	Max    int // MTU + 18
}

func (e *FrameSizeError) Error() string {
	return fmt.Sprintf("frame of %d bytes: expected %d to %d, the MTU and 18 for addresses, type and a VLAN tag", e.Length, headerLength, e.Max)
}

// ViolationError says that the peer wrote what it must not write. The link was
// reset, and can be used on: it has carrier again when both have walked through
// their states.
type ViolationError struct {
	Peer  uint32
	Field string
	Value uint64
	Bound string // what was expected
}

func (e *ViolationError) Error() string {
	return fmt.Sprintf("peer %d violates the protocol: %s: expected %s, found %#x", e.Peer, e.Field, e.Bound, e.Value)
}
