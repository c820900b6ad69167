package shmem

import (
	"fmt"
	"math/bits"
	"runtime"
	"sync/atomic"
	"unsafe"
)

// ReadWords is a view as a ring of 64-bit words, for code whose speed is that
// of single accesses. An index counts words and wraps at the end of the view,
// so no access can miss it, and none fails. After Close of the memory words
// read as 0.
type ReadWords struct {
	mem  *Memory
	base unsafe.Pointer
	mask uint64 // number of words - 1
}

// Words returns the view as words. Its size has to be a power of two of at
// least 8 bytes.
func (v *ReadOnly) Words() (ReadWords, error) {
	if v.size < 8 || bits.OnesCount64(v.size) != 1 {
		return ReadWords{}, fmt.Errorf("%s: expected a power of two of at least 8 bytes to use as words, found %#x", v.name, v.size)
	}
	return ReadWords{mem: v.mem, base: v.base, mask: v.size/8 - 1}, nil
}

// Load loads word i, with acquire ordering.
func (w *ReadWords) Load(i uint64) uint64 {
	x := atomic.LoadUint64((*uint64)(unsafe.Add(w.base, i&w.mask<<3)))
	runtime.KeepAlive(w.mem)
	return x
}

// Copy copies bytes into p from a byte position, which wraps like an index, up
// to the end of the view, and returns how many. See ReadAt for alignment and
// atomicity.
func (w *ReadWords) Copy(p []byte, position uint64) int {
	size := (w.mask + 1) << 3
	position &= size - 1
	p = p[:min(uint64(len(p)), size-position)]
	if len(p) > 0 {
		copyFrom(p, unsafe.Add(w.base, position))
	}
	runtime.KeepAlive(w.mem)
	return len(p)
}

// Words is ReadWords of a view that can store. After Close of the memory what
// is stored goes nowhere.
type Words struct{ readWords }

type readWords = ReadWords

// Words returns the view as words. Its size has to be a power of two of at
// least 8 bytes.
func (v *ReadWrite) Words() (Words, error) {
	w, err := v.readOnly.Words()
	return Words{w}, err
}

// Store stores word i. The store and a later Load are sequentially consistent,
// like Store64 and Load64.
func (w *Words) Store(i, x uint64) {
	atomic.StoreUint64((*uint64)(unsafe.Add(w.base, i&w.mask<<3)), x)
	runtime.KeepAlive(w.mem)
}

// StoreRelaxed stores word i by a plain store: peers see it before what a
// later Store stores, and nothing else is said about when.
func (w *Words) StoreRelaxed(i, x uint64) {
	*(*uint64)(unsafe.Add(w.base, i&w.mask<<3)) = x
	runtime.KeepAlive(w.mem)
}

// Write copies p to a byte position, which wraps like an index, as far as it
// fits before the end of the view, and returns how much that is. See WriteAt
// for alignment and atomicity.
func (w *Words) Write(p []byte, position uint64) int {
	size := (w.mask + 1) << 3
	position &= size - 1
	p = p[:min(uint64(len(p)), size-position)]
	if len(p) > 0 {
		copyTo(unsafe.Add(w.base, position), p)
	}
	runtime.KeepAlive(w.mem)
	return len(p)
}

// UnsafeBytes is n bytes at offset of the view themselves. What the slice can
// do is no longer checked: a peer may change the bytes under the reader's
// hands, a store to a section that is mapped read-only ends the process, an
// unaligned access to device memory does so on arm64, and the slice must not
// be used once the view, which keeps the mapping, is unreachable.
func (v *ReadOnly) UnsafeBytes(offset, n uint64) ([]byte, error) {
	if !v.allows(offset, n, 1) {
		return nil, v.refuse(offset, n, 1)
	}
	if n == 0 {
		return nil, nil
	}
	return unsafe.Slice((*byte)(unsafe.Add(v.base, offset)), n), nil
}
