package shmem

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"
)

// Memory is a piece of mapped shared memory. Views keep it reachable, and
// check on each access that it was not closed: whoever maps memory hands out
// views of it and calls Close before the mapping ends.
type Memory struct {
	base   unsafe.Pointer
	size   uint64
	closed atomic.Bool
}

// NewMemory wraps b, which has to be aligned to 8 bytes (mappings are aligned
// to pages) and stay in place until no view refers to the Memory any more.
func NewMemory(b []byte) (*Memory, error) {
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%8 != 0 {
		return nil, fmt.Errorf("shared memory: expected an address aligned to 8 bytes, found %p", p)
	}
	return &Memory{base: p, size: uint64(len(b))}, nil
}

// Size is the size in bytes.
func (m *Memory) Size() uint64 { return m.size }

// Close ends all views: from now on each access fails with [os.ErrClosed].
func (m *Memory) Close() { m.closed.Store(true) }

// ReadOnly returns a view of n bytes at offset, a multiple of 8, that cannot
// store. The name appears in errors.
func (m *Memory) ReadOnly(name string, offset, n uint64) (*ReadOnly, error) {
	all := ReadOnly{mem: m, base: m.base, size: m.size, name: name}
	return all.View(offset, n)
}

// ReadWrite returns a view of n bytes at offset that can store.
func (m *Memory) ReadWrite(name string, offset, n uint64) (*ReadWrite, error) {
	v, err := m.ReadOnly(name, offset, n)
	if err != nil {
		return nil, err
	}
	return &ReadWrite{*v}, nil
}

// BoundsError is an access outside a section.
type BoundsError struct {
	Section string
	Offset  uint64 // bytes
	Width   uint64 // bytes
	Size    uint64 // of the section, bytes
}

func (e *BoundsError) Error() string {
	return fmt.Sprintf("%s: access to %d bytes at offset %#x, expected to stay inside %#x bytes", e.Section, e.Width, e.Offset, e.Size)
}

// AlignmentError is an atomic access whose offset is not a multiple of its
// width.
type AlignmentError struct {
	Section string
	Offset  uint64 // bytes
	Width   uint64 // bytes
}

func (e *AlignmentError) Error() string {
	return fmt.Sprintf("%s: access of %d bytes at offset %#x, expected a multiple of %d", e.Section, e.Width, e.Offset, e.Width)
}

// ReadOnly is a view of a section, or of a part of one, without a way to
// store. It implements [io.ReaderAt]. Safe for concurrent use.
type ReadOnly struct {
	mem  *Memory
	base unsafe.Pointer
	size uint64
	name string
}

// Name is the name of the section, as the specification has it.
func (v *ReadOnly) Name() string { return v.name }

// Size is the size of the view in bytes.
func (v *ReadOnly) Size() uint64 { return v.size }

// View returns a view of n bytes at offset of this one. The offset has to be
// a multiple of 8.
func (v *ReadOnly) View(offset, n uint64) (*ReadOnly, error) {
	if !v.allows(offset, n, 8) {
		return nil, v.refuse(offset, n, 8)
	}
	w := *v
	w.size = n
	if n > 0 { // the end of the memory may be the start of something else
		w.base = unsafe.Add(v.base, offset)
	}
	return &w, nil
}

// allows checks an access: in 64-bit arithmetic that cannot overflow, and
// small enough to be inlined. Whoever goes on keeps v.mem alive until the
// access is over.
func (v *ReadOnly) allows(offset, width, align uint64) bool {
	return offset <= v.size && width <= v.size-offset && offset&(align-1) == 0 && !v.mem.closed.Load()
}

// refuse says why an access is not allowed.
func (v *ReadOnly) refuse(offset, width, align uint64) error {
	switch {
	case v.mem.closed.Load():
		return fmt.Errorf("%s: %w", v.name, os.ErrClosed)
	case offset > v.size || width > v.size-offset:
		return &BoundsError{Section: v.name, Offset: offset, Width: width, Size: v.size}
	default:
		return &AlignmentError{Section: v.name, Offset: offset, Width: align}
	}
}

// Load8 loads the byte at offset, with acquire ordering.
func (v *ReadOnly) Load8(offset uint64) (uint8, error) {
	if !v.allows(offset, 1, 1) {
		return 0, v.refuse(offset, 1, 1)
	}
	x := load8(unsafe.Add(v.base, offset))
	runtime.KeepAlive(v.mem)
	return x, nil
}

// Load16 loads the 16-bit value at offset, a multiple of 2, with acquire
// ordering.
func (v *ReadOnly) Load16(offset uint64) (uint16, error) {
	if !v.allows(offset, 2, 2) {
		return 0, v.refuse(offset, 2, 2)
	}
	x := load16(unsafe.Add(v.base, offset))
	runtime.KeepAlive(v.mem)
	return x, nil
}

// Load32 loads the 32-bit value at offset, a multiple of 4, with acquire
// ordering.
func (v *ReadOnly) Load32(offset uint64) (uint32, error) {
	if !v.allows(offset, 4, 4) {
		return 0, v.refuse(offset, 4, 4)
	}
	x := atomic.LoadUint32((*uint32)(unsafe.Add(v.base, offset)))
	runtime.KeepAlive(v.mem)
	return x, nil
}

// Load64 loads the 64-bit value at offset, a multiple of 8, with acquire
// ordering.
func (v *ReadOnly) Load64(offset uint64) (uint64, error) {
	if !v.allows(offset, 8, 8) {
		return 0, v.refuse(offset, 8, 8)
	}
	x := atomic.LoadUint64((*uint64)(unsafe.Add(v.base, offset)))
	runtime.KeepAlive(v.mem)
	return x, nil
}

// ReadAt copies len(p) bytes at offset into p. The copy is not atomic: a peer
// may change the bytes under it. Unlike most readers it copies all or, with
// an error, nothing. Offset and length may be unaligned; the section itself
// is accessed aligned only, which memory mapped as device memory needs.
func (v *ReadOnly) ReadAt(p []byte, offset int64) (int, error) {
	if !v.allows(uint64(offset), uint64(len(p)), 1) {
		return 0, v.refuse(uint64(offset), uint64(len(p)), 1)
	}
	if len(p) > 0 {
		copyFrom(p, unsafe.Add(v.base, offset))
	}
	runtime.KeepAlive(v.mem)
	return len(p), nil
}

// ReadWrite is a view that can store: of the R/W section or of the own output
// section. It implements [io.ReaderAt] and [io.WriterAt].
type ReadWrite struct{ readOnly }

// readOnly embeds without a name that others could set: nobody can make a
// view that stores out of one that does not.
type readOnly = ReadOnly

// ReadOnly returns the view without the ability to store.
func (v *ReadWrite) ReadOnly() *ReadOnly { return &v.readOnly }

// View returns a view of n bytes at offset of this one. The offset has to be
// a multiple of 8.
func (v *ReadWrite) View(offset, n uint64) (*ReadWrite, error) {
	r, err := v.readOnly.View(offset, n)
	if err != nil {
		return nil, err
	}
	return &ReadWrite{*r}, nil
}

// Store8 stores the byte at offset, with release ordering.
func (v *ReadWrite) Store8(offset uint64, x uint8) error {
	if !v.allows(offset, 1, 1) {
		return v.refuse(offset, 1, 1)
	}
	store8(unsafe.Add(v.base, offset), x)
	runtime.KeepAlive(v.mem)
	return nil
}

// Store16 stores the 16-bit value at offset, a multiple of 2, with release
// ordering.
func (v *ReadWrite) Store16(offset uint64, x uint16) error {
	if !v.allows(offset, 2, 2) {
		return v.refuse(offset, 2, 2)
	}
	store16(unsafe.Add(v.base, offset), x)
	runtime.KeepAlive(v.mem)
	return nil
}

// Store32 stores the 32-bit value at offset, a multiple of 4, with release
// ordering. Beyond that, 32-bit and 64-bit loads and stores are sequentially
// consistent: a later Load32 or Load64 does not overtake it.
func (v *ReadWrite) Store32(offset uint64, x uint32) error {
	if !v.allows(offset, 4, 4) {
		return v.refuse(offset, 4, 4)
	}
	atomic.StoreUint32((*uint32)(unsafe.Add(v.base, offset)), x)
	runtime.KeepAlive(v.mem)
	return nil
}

// Store64 stores the 64-bit value at offset, a multiple of 8, like Store32.
func (v *ReadWrite) Store64(offset uint64, x uint64) error {
	if !v.allows(offset, 8, 8) {
		return v.refuse(offset, 8, 8)
	}
	atomic.StoreUint64((*uint64)(unsafe.Add(v.base, offset)), x)
	runtime.KeepAlive(v.mem)
	return nil
}

// WriteAt copies p to offset, all of it or, with an error, nothing. See
// ReadAt for alignment and atomicity.
func (v *ReadWrite) WriteAt(p []byte, offset int64) (int, error) {
	if !v.allows(uint64(offset), uint64(len(p)), 1) {
		return 0, v.refuse(uint64(offset), uint64(len(p)), 1)
	}
	if len(p) > 0 {
		copyTo(unsafe.Add(v.base, offset), p)
	}
	runtime.KeepAlive(v.mem)
	return len(p), nil
}
