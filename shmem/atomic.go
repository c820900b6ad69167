package shmem

import "unsafe"

// The standard library has no atomic accesses below 32 bits. These load with
// acquire and store with release ordering.

//go:noescape
func load8(p unsafe.Pointer) uint8

//go:noescape
func load16(p unsafe.Pointer) uint16

//go:noescape
func store8(p unsafe.Pointer, v uint8)

//go:noescape
func store16(p unsafe.Pointer, v uint16)
