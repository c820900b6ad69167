//go:build !amd64

package fdpass

import "golang.org/x/sys/unix"

var pollSyscalls = []int{unix.SYS_PPOLL}
