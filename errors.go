package ivshmem

import (
	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/regs"
)

// Classes of errors, for errors.Is. After Close everything fails with
// [os.ErrClosed].
var (
	// ErrGone says that the device no longer answers.
	ErrGone = regs.ErrGone
	// ErrNotFound says that there is no such device.
	ErrNotFound = fault.ErrNotFound
	// ErrBusy says that another process owns the device, or that all peer
	// IDs of a link are taken.
	ErrBusy = fault.ErrBusy
	// ErrNotSupported says that the way the device is held cannot do what
	// was asked: waiting without interrupts, writing as an observer.
	ErrNotSupported = fault.ErrNotSupported
	// ErrConfigShort says that the configuration space is cut short, as
	// Linux does for unprivileged processes.
	ErrConfigShort = regs.ErrConfigShort
)

// DeviceError is an error about one device, with the remedy where there is
// one.
type DeviceError = fault.DeviceError
