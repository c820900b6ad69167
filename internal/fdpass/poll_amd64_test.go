package fdpass

import "golang.org/x/sys/unix"

// Numbers of the system calls in which a sender waits.
var pollSyscalls = []int{unix.SYS_POLL, unix.SYS_PPOLL}
