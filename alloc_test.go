//go:build !race

// With the race detector golang.org/x/sys/unix tells it about the buffer of
// each read, which moves the buffer to the heap.

package ivshmem_test

import (
	"context"
	"testing"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
)

func TestWaitAllocates(t *testing.T) {
	for name, opts := range ways {
		p := ivshmemtest.Peers(t, pair, opts...)
		var due uint64
		ready := func() bool { return p[0].Interrupts(1) >= due }
		wait := func() {
			due++
			if err := p[1].Ring(0, 1); err != nil {
				t.Fatal(err)
			}
			if err := p[0].Wait(context.Background(), nil, ready); err != nil {
				t.Fatal(err)
			}
		}
		// In one-shot mode arming is a message to the service, which is not
		// counted here.
		if p[0].OneShot() {
			continue
		}
		if n := testing.AllocsPerRun(200, wait); n >= 1 {
			t.Errorf("%s: %v allocations per wait, want 0", name, n)
		}
	}
}
