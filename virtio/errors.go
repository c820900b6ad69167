package virtio

import (
	"errors"
	"fmt"
)

var (
	// ErrUnsuitable says that the device, or its link, is not one for this
	// virtio device, or for its driver.
	ErrUnsuitable = errors.New("not a link for this virtio device")
	// ErrReset says that a session is over: the device was reset, or the
	// driver left. What belongs to it can no longer be used.
	ErrReset = errors.New("the virtio device was reset")
	// ErrBackEndGone says that the back-end left: the driver has to be opened
	// again, when there is a back-end again.
	ErrBackEndGone = errors.New("the virtio back-end is gone")
	// ErrNeedsReset says that the device asks its driver for a reset
	// (DEVICE_NEEDS_RESET): close the driver and open it again.
	ErrNeedsReset = errors.New("the virtio device needs a reset")
	// ErrQueueFull says that a queue has no descriptors left for a buffer: take
	// used ones with Next first.
	ErrQueueFull = errors.New("the virtqueue is full")
)

// ViolationError says that the other side wrote what it must not write. The
// session has ended.
type ViolationError struct {
	Queue int // -1: not of a queue
	Field string
	Value uint64
	Bound string // what was expected
}

func (e *ViolationError) Error() string {
	if e.Queue < 0 {
		return fmt.Sprintf("the virtio peer violates the protocol: %s: expected %s, found %#x", e.Field, e.Bound, e.Value)
	}
	return fmt.Sprintf("the virtio peer violates the protocol: queue %d: %s: expected %s, found %#x", e.Queue, e.Field, e.Bound, e.Value)
}

// SpaceError says that the R/W section has no room for a buffer of the driver.
type SpaceError struct {
	Need, Free uint64 // bytes; what is free may be in pieces
}

func (e *SpaceError) Error() string {
	return fmt.Sprintf("R/W section: expected %d bytes in one piece, found %d bytes free: use fewer or smaller buffers, or serve the link with a larger --rw", e.Need, e.Free)
}
