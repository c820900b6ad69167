package shmem_test

import (
	"encoding/binary"
	"testing"

	"github.com/ivshmem-go/ivshmem/shmem"
)

func TestWords(t *testing.T) {
	b := make([]byte, 4096)
	m, err := shmem.NewMemory(b)
	if err != nil {
		t.Fatal(err)
	}
	v, err := m.ReadWrite("test", 64, 64)
	if err != nil {
		t.Fatal(err)
	}
	w, err := v.Words()
	if err != nil {
		t.Fatal(err)
	}
	r, err := v.ReadOnly().Words()
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(24) { // three times around
		w.Store(i, i+1)
		at := 64 + i%8*8
		if got := binary.NativeEndian.Uint64(b[at:]); got != i+1 {
			t.Errorf("word %d: %d at offset %d, want %d", i, got, at, i+1)
		}
		if got := r.Load(i); got != i+1 {
			t.Errorf("word %d loads %d, want %d", i, got, i+1)
		}
		if got := r.Load(i + 1<<61); got != i+1 {
			t.Errorf("word %d + 2^61 loads %d, want %d", i, got, i+1)
		}
	}
	w.Store(1<<64-1, 7) // the last one
	for i, x := range b {
		if x != 0 && (i < 64 || i >= 128) {
			t.Errorf("byte %d changed outside the view", i)
		}
	}
	for _, size := range []uint64{0, 4, 24, 4088} {
		odd, err := m.ReadWrite("test", 0, size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := odd.Words(); err == nil {
			t.Errorf("words of %d bytes: no error", size)
		}
	}
}

func TestUnsafeBytes(t *testing.T) {
	b := make([]byte, 4096)
	m, err := shmem.NewMemory(b)
	if err != nil {
		t.Fatal(err)
	}
	v, err := m.ReadOnly("test", 64, 64)
	if err != nil {
		t.Fatal(err)
	}
	s, err := v.UnsafeBytes(3, 61)
	if err != nil || len(s) != 61 || cap(s) != 61 || &s[0] != &b[67] {
		t.Errorf("%d bytes (capacity %d), %v", len(s), cap(s), err)
	}
	for _, x := range [][2]uint64{{4, 61}, {65, 0}, {1, 1<<64 - 1}} {
		if _, err := v.UnsafeBytes(x[0], x[1]); err == nil {
			t.Errorf("%d bytes at %d: no error", x[1], x[0])
		}
	}
	m.Close()
	if _, err := v.UnsafeBytes(0, 1); err == nil {
		t.Error("bytes of closed memory")
	}
}
