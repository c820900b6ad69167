package compare

import (
	"sync/atomic"
	"unsafe"
)

// word64 is the word at a byte position of a mapping, which is a multiple of 8
// and inside.
func word64(b []byte, at int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&b[at : at+8][0]))
}

// word32 is the same for 4 bytes.
func word32(b []byte, at int) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&b[at : at+4][0]))
}

func address(w *atomic.Uint32) uintptr { return uintptr(unsafe.Pointer(w)) }
