package shmem

import (
	"bytes"
	"testing"
	"unsafe"
)

// aligned returns n bytes at an address that is a multiple of 8.
func aligned(n int) []byte {
	words := make([]uint64, (n+7)/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), n)
}

// pattern fills b with bytes that differ from their neighbours.
func pattern(b []byte, seed byte) {
	for i := range b {
		b[i] = byte(i)*7 + seed
	}
}

// Both ways to copy, at every alignment and length, change the bytes that are
// meant and no neighbour.
func TestCopy(t *testing.T) {
	for _, c := range []struct {
		name string
		from func([]byte, unsafe.Pointer)
		to   func(unsafe.Pointer, []byte)
	}{
		{"native", copyFrom, copyTo},
		{"aligned only", copyFromAligned, copyToAligned},
	} {
		t.Run(c.name, func(t *testing.T) {
			for offset := range 17 {
				for private := range 8 { // alignment of the private side
					for n := range 65 {
						shared, other := aligned(96), aligned(96)
						pattern(shared, 1)
						pattern(other, 100)
						want := bytes.Clone(other)
						copy(want[private:private+n], shared[offset:])
						c.from(other[private:private+n], unsafe.Pointer(&shared[offset]))
						if !bytes.Equal(other, want) {
							t.Fatalf("copy of %d bytes from offset %d to %d: % x", n, offset, private, other)
						}

						pattern(other, 100)
						want = bytes.Clone(shared)
						copy(want[offset:offset+n], other[private:])
						c.to(unsafe.Pointer(&shared[offset]), other[private:private+n])
						if !bytes.Equal(shared, want) {
							t.Fatalf("copy of %d bytes from %d to offset %d: % x", n, private, offset, shared)
						}
					}
				}
			}
		})
	}
}

func TestSmallAtomics(t *testing.T) {
	for i := range 8 {
		b := aligned(8)
		pattern(b, 9)
		want := bytes.Clone(b)
		if got := load8(unsafe.Pointer(&b[i])); got != want[i] {
			t.Errorf("load8 at %d: %02x, want %02x", i, got, want[i])
		}
		want[i] = 0xee
		store8(unsafe.Pointer(&b[i]), 0xee)
		if !bytes.Equal(b, want) {
			t.Errorf("store8 at %d: % x, want % x", i, b, want)
		}
		if i%2 == 1 {
			continue
		}
		if got := load16(unsafe.Pointer(&b[i])); got != uint16(want[i])|uint16(want[i+1])<<8 {
			t.Errorf("load16 at %d: %04x of % x", i, got, want)
		}
		want[i], want[i+1] = 0xcd, 0xab
		store16(unsafe.Pointer(&b[i]), 0xabcd)
		if !bytes.Equal(b, want) {
			t.Errorf("store16 at %d: % x, want % x", i, b, want)
		}
	}
}
