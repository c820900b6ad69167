//go:build !race

// With the race detector golang.org/x/sys/unix tells it about the buffer of
// each read, which moves the buffer to the heap.

package vnet_test

import (
	"context"
	"testing"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// TestAllocations sends and receives, with sleeps and without, and allocates
// nothing.
func TestAllocations(t *testing.T) {
	l := pair(t, 0x10000, vnet.Config{})
	ctx := context.Background()
	f, p := make([]byte, 1000), make([]byte, vnet.MaxFrame)
	list := [][]byte{f, f, f}
	check := func(what string, f func()) {
		t.Helper()
		if n := testing.AllocsPerRun(500, f); n >= 1 {
			t.Errorf("%s: %v allocations", what, n)
		}
	}
	fail := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check("copies", func() {
		fail(l[0].Send(ctx, f))
		_, err := l[1].Receive(ctx, p)
		fail(err)
	})
	check("many", func() {
		_, err := l[0].SendAll(ctx, list)
		fail(err)
		for range list {
			_, err := l[1].Receive(ctx, p)
			fail(err)
		}
	})
	check("no copies", func() {
		p, err := l[0].UnsafeReserve(ctx)
		fail(err)
		fail(l[0].UnsafeCommit(len(p)))
		l[0].Flush()
		_, err = l[1].UnsafePeek(ctx)
		fail(err)
		fail(l[1].UnsafeRelease())
	})
	go func() {
		for {
			n, err := l[1].Receive(ctx, p)
			if err == nil {
				err = l[1].Send(ctx, p[:n])
			}
			if err != nil {
				return
			}
		}
	}()
	q := make([]byte, vnet.MaxFrame)
	check("round trips", func() {
		fail(l[0].Send(ctx, f))
		_, err := l[0].Receive(ctx, q)
		fail(err)
	})
}
