package vfiouser

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrRefused is what a [RemoteError] is, by errors.Is, when the server answered
// the first message of the connection with an error: it does not take this
// client, mostly because another one has the device.
var ErrRefused = errors.New("the vfio-user server refused the connection")

// ProtocolError says how the peer broke the vfio-user protocol. The connection
// has ended.
type ProtocolError struct {
	Peer     string // "client" or "server"
	Message  string // the message it concerns, by its name in the specification
	Expected string
	Found    string
}

func (e *ProtocolError) Error() string {
	return fmt.Sprintf("vfio-user %s broke the protocol: %s: expected %s, found %s",
		e.Peer, e.Message, e.Expected, e.Found)
}

// RemoteError is the server's error reply to a command. The connection stays
// usable. errors.Is finds Errno.
type RemoteError struct {
	Command string // its name in the specification
	Errno   unix.Errno

	refused bool
}

func (e *RemoteError) Error() string {
	if e.refused {
		reason := ""
		switch e.Errno {
		case unix.EBUSY:
			reason = ": it has no device left for another client"
		case unix.EACCES:
			reason = ": it does not take clients of this user"
		}
		return fmt.Sprintf("%v with %s (%v)%s", ErrRefused, errnoName(e.Errno), e.Errno, reason)
	}
	return fmt.Sprintf("vfio-user %s: the server answered %s (%v)", e.Command, errnoName(e.Errno), e.Errno)
}

// Unwrap returns Errno.
func (e *RemoteError) Unwrap() error { return e.Errno }

// Is says whether target is ErrRefused and e a refusal.
func (e *RemoteError) Is(target error) bool { return e.refused && target == ErrRefused }

// ConnectionError says why a client's connection is unusable. Every call after
// the one that met it first returns the same value. Err is or wraps
// [io.EOF] (the server closed), [os.ErrDeadlineExceeded] (it did not answer in
// time), [net.ErrClosed] (Close was called here), a [*ProtocolError], or a
// [unix.Errno].
type ConnectionError struct {
	Err error
}

func (e *ConnectionError) Error() string { return "vfio-user connection is dead: " + e.Err.Error() }

// Unwrap returns Err.
func (e *ConnectionError) Unwrap() error { return e.Err }

func errnoName(e unix.Errno) string {
	if name := unix.ErrnoName(e); name != "" {
		return name
	}
	return fmt.Sprintf("errno %d", int(e))
}

// maxErrno is Linux's largest error number.
const maxErrno = 4095

// errnoOf is the error number that goes out for err.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	if errors.As(err, &errno) && errno > 0 && errno <= maxErrno {
		return errno
	}
	return unix.EINVAL
}
