package regs

import "unsafe"

// load32 is one plain 32-bit load, followed by a load barrier where the
// architecture needs one.
//
//go:noescape
func load32(p unsafe.Pointer) uint32

// store32 is one plain 32-bit store from a general register, preceded by a
// store barrier.
//
//go:noescape
func store32(p unsafe.Pointer, v uint32)
