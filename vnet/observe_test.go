package vnet_test

import (
	"bytes"
	"slices"
	"sync"
	"testing"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/vnet"
)

// TestObserve sees frames of both directions, those that were dropped too.
func TestObserve(t *testing.T) {
	devices := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Output: 64 << 10, Protocol: regs.ProtocolEthernet})
	var mu sync.Mutex
	var seen [2][]vnet.Frame
	var links [2]*vnet.Link
	for i, d := range devices {
		l, err := vnet.Open(d, vnet.Config{MTU: 1500})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		l.Observe(func(f vnet.Frame) {
			mu.Lock()
			defer mu.Unlock()
			f.Data = bytes.Clone(f.Data)
			seen[i] = append(seen[i], f)
		})
		links[i] = l
	}
	short, long, first, second := bytes.Repeat([]byte{1}, 13), bytes.Repeat([]byte{2}, 1519), bytes.Repeat([]byte{3}, 60), bytes.Repeat([]byte{4}, 1518)
	for _, l := range links {
		if err := l.WaitCarrier(t.Context(), true); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range [][]byte{short, long} {
		if err := links[0].Send(t.Context(), f); err == nil {
			t.Errorf("%d bytes were sent", len(f))
		}
	}
	if _, err := links[0].SendAll(t.Context(), [][]byte{first, second}); err != nil {
		t.Fatal(err)
	}
	if _, err := links[1].Receive(t.Context(), make([]byte, 59)); err == nil {
		t.Error("60 bytes fit into 59")
	}
	if _, err := links[1].UnsafePeek(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := links[1].UnsafeRelease(); err != nil {
		t.Fatal(err)
	}
	if err := links[1].Down(); err != nil {
		t.Fatal(err)
	}
	if err := links[0].WaitCarrier(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	links[0].Send(t.Context(), first)
	links[0].Observe(nil)
	links[0].Send(t.Context(), second)
	mu.Lock()
	defer mu.Unlock()
	same := func(a, b vnet.Frame) bool {
		return a.Sent == b.Sent && a.Dropped == b.Dropped && bytes.Equal(a.Data, b.Data)
	}
	for i, want := range [][]vnet.Frame{
		{{true, short, "length"}, {true, long, "length"}, {true, first, ""}, {true, second, ""}, {true, first, "no carrier"}},
		{{false, first, "longer than the receiver's buffer"}, {false, second, ""}},
	} {
		if !slices.EqualFunc(seen[i], want, same) {
			t.Errorf("peer %d saw %v, want %v", i, seen[i], want)
		}
	}
}
