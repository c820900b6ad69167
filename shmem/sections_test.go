package shmem_test

import (
	"errors"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/ivshmem-go/ivshmem/shmem"
)

func TestStateTable(t *testing.T) {
	m, b := memory(t, 32)
	copy(b[8:], []byte{1, 0, 0, 0, 0xef, 0xbe, 0xad, 0xde, 0xff, 0xff, 0xff, 0xff, 9})
	v, err := m.ReadOnly(shmem.NameStateTable, 8, 24)
	if err != nil {
		t.Fatal(err)
	}
	table, err := shmem.NewStateTable(v, 3) // room for 6
	if err != nil {
		t.Fatal(err)
	}
	for peer, want := range []uint32{1, 0xdeadbeef, 0xffffffff} {
		if got, err := table.Load(uint32(peer)); got != want || err != nil {
			t.Errorf("state of peer %d: %#x, %v, want %#x", peer, got, err, want)
		}
	}
	for _, peer := range []uint32{3, 5, 6, 1 << 30, 0xffffffff} {
		if got, err := table.Load(peer); err == nil {
			t.Errorf("state of peer %d: %#x, want an error", peer, got)
		}
	}
	if _, err := shmem.NewStateTable(v, 6); err != nil {
		t.Errorf("table of 6 peers in 24 bytes: %v", err)
	}
	for _, peers := range []uint32{7, 1 << 30, 0xffffffff} { // 4 × 2^30 is 0 in 32 bits
		_, err := shmem.NewStateTable(v, peers)
		if e, ok := errors.AsType[*shmem.BoundsError](err); !ok || e.Width != 4*uint64(peers) {
			t.Errorf("table of %d peers in 24 bytes: %v", peers, err)
		}
	}
}

func TestInput(t *testing.T) {
	m, b := memory(t, 3*4096)
	all, err := m.ReadOnly(shmem.NameInputs, 0, 3*4096)
	if err != nil {
		t.Fatal(err)
	}
	l, err := shmem.NewLayout(4096, 0, 4096, 3)
	if err != nil {
		t.Fatal(err)
	}
	s := shmem.Sections{Layout: l, Inputs: all}
	for peer := range uint32(3) {
		b[4096*peer] = byte(peer) + 1
		in, err := s.Input(peer)
		if err != nil {
			t.Fatal(err)
		}
		if x, err := in.Load8(0); x != byte(peer)+1 || err != nil || in.Size() != 4096 {
			t.Errorf("output section of peer %d: first byte %d, %v, size %d", peer, x, err, in.Size())
		}
	}
	for _, peer := range []uint32{3, 1 << 20, 0xffffffff} {
		if _, err := s.Input(peer); err == nil {
			t.Errorf("output section of peer %d: want an error", peer)
		}
	}
	s.Inputs = nil
	if _, err := s.Input(0); err == nil {
		t.Error("link without output sections: want an error")
	}
}

// The price of the checks: compare with the bare accesses of the same run.
func BenchmarkAccess(b *testing.B) {
	m, raw := memory(b, 4096)
	v := view(b, m, 0, 4096)
	word := (*uint32)(unsafe.Pointer(&raw[64]))
	var sum uint32
	b.Run("Load32", func(b *testing.B) {
		for b.Loop() {
			x, err := v.Load32(64)
			if err != nil {
				b.Fatal(err)
			}
			sum += x
		}
	})
	b.Run("bare load", func(b *testing.B) {
		for b.Loop() {
			sum += atomic.LoadUint32(word)
		}
	})
	b.Run("Load8", func(b *testing.B) {
		for b.Loop() {
			x, err := v.Load8(64)
			if err != nil {
				b.Fatal(err)
			}
			sum += uint32(x)
		}
	})
	b.Run("Store32", func(b *testing.B) {
		for b.Loop() {
			if err := v.Store32(64, sum); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("bare store", func(b *testing.B) {
		for b.Loop() {
			atomic.StoreUint32(word, sum)
		}
	})
}
