package shmem

import (
	"runtime"
	"unsafe"
)

// On arm64 a BAR mapped through sysfs or vfio is device memory, where an
// unaligned access is a fault, and the runtime's memmove uses unaligned
// accesses for heads and tails. There the shared side is accessed by aligned
// words, and by bytes at both ends.
const alignedOnly = runtime.GOARCH == "arm64"

func copyFrom(dst []byte, src unsafe.Pointer) {
	if !alignedOnly {
		copy(dst, unsafe.Slice((*byte)(src), len(dst)))
		return
	}
	copyFromAligned(dst, src)
}

func copyTo(dst unsafe.Pointer, src []byte) {
	if !alignedOnly {
		copy(unsafe.Slice((*byte)(dst), len(src)), src)
		return
	}
	copyToAligned(dst, src)
}

func copyFromAligned(dst []byte, src unsafe.Pointer) {
	i := 0
	for ; i < len(dst) && uintptr(src)%8 != 0; i++ {
		dst[i] = load8(src)
		src = unsafe.Add(src, 1)
	}
	for ; i+8 <= len(dst); i += 8 {
		*(*uint64)(unsafe.Pointer(&dst[i])) = *(*uint64)(src)
		src = unsafe.Add(src, 8)
	}
	for ; i < len(dst); i++ {
		dst[i] = load8(src)
		src = unsafe.Add(src, 1)
	}
}

func copyToAligned(dst unsafe.Pointer, src []byte) {
	i := 0
	for ; i < len(src) && uintptr(dst)%8 != 0; i++ {
		store8(dst, src[i])
		dst = unsafe.Add(dst, 1)
	}
	for ; i+8 <= len(src); i += 8 {
		*(*uint64)(dst) = *(*uint64)(unsafe.Pointer(&src[i]))
		dst = unsafe.Add(dst, 8)
	}
	for ; i < len(src); i++ {
		store8(dst, src[i])
		dst = unsafe.Add(dst, 1)
	}
}
