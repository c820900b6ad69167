// Package fault has the error types that several rooms of the toolkit need.
// The root package aliases them for users.
package fault

import (
	"errors"
	"fmt"
)

var (
	// ErrNotFound says that there is no such device.
	ErrNotFound = errors.New("no such device")
	// ErrBusy says that somebody else holds what is needed.
	ErrBusy = errors.New("in use")
	// ErrNotSupported says that a back end or device cannot do what was asked.
	ErrNotSupported = errors.New("not supported")
)

// DeviceError is an error about one device: what was tried with it, why it
// failed, and what the user can do.
type DeviceError struct {
	Device string // PCI address or socket path
	Op     string // "open", "map registers", …
	Err    error
	Remedy string // "", or a full sentence without its period
}

func (e *DeviceError) Error() string {
	s := fmt.Sprintf("device %s: %s: %v", e.Device, e.Op, e.Err)
	if e.Remedy != "" {
		s += " (" + e.Remedy + ")"
	}
	return s
}

func (e *DeviceError) Unwrap() error { return e.Err }

// Reason is the rest of a DeviceError, for those who know which device is
// meant.
type Reason struct {
	Err    error
	Remedy string
}

func (r *Reason) Error() string {
	if r.Remedy == "" {
		return r.Err.Error()
	}
	return r.Err.Error() + " (" + r.Remedy + ")"
}

func (r *Reason) Unwrap() error { return r.Err }
