package console

import (
	"fmt"
	"syscall"
)

// Errors of ports. Each wraps the error number that a driver in the kernel
// would return.
var (
	// ErrThrottled says that the other side asked for no more data, or takes
	// none: ENOSPC.
	ErrThrottled = fmt.Errorf("the other side has throttled the port: %w", syscall.ENOSPC)
	// ErrStalled is ErrThrottled without a message that says so: there is no room,
	// and the other side does not take what it was sent. Write waits then.
	ErrStalled = fmt.Errorf("the other side takes nothing: %w", ErrThrottled)
	// ErrWouldBlock says that TryRead or TryWrite would have to wait: EAGAIN.
	ErrWouldBlock = fmt.Errorf("the port is not ready: %w", syscall.EAGAIN)
	// ErrRemoved says that the port is not there any more: ENODEV.
	ErrRemoved = fmt.Errorf("the port was removed: %w", syscall.ENODEV)
	// ErrBusy says that the port is open already: EBUSY.
	ErrBusy = fmt.Errorf("the port is open already: %w", syscall.EBUSY)
	// ErrNotCarried says that the wire has no message for this: EOPNOTSUPP.
	ErrNotCarried = fmt.Errorf("the wire cannot carry this to the other side: %w", syscall.EOPNOTSUPP)
	// ErrTooMany says that the device has as many ports as it can have: ENOSPC.
	ErrTooMany = fmt.Errorf("no port number is free: %w", syscall.ENOSPC)
)

// MessageError is a message of the other side that means nothing. It is
// counted and dropped.
type MessageError struct {
	Field string
	Value uint64
	Bound string // what was expected
}

func (e *MessageError) Error() string {
	return fmt.Sprintf("console message: %s: expected %s, found %d", e.Field, e.Bound, e.Value)
}
