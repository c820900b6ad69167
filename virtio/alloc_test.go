//go:build !race

// With the race detector golang.org/x/sys/unix tells it about the buffer of
// each read, which moves the buffer to the heap.

package virtio_test

import (
	"context"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio"
)

// TestAllocations sends requests and waits for the answers, and neither side
// allocates anything.
func TestAllocations(t *testing.T) {
	d, q := over(t, echo(8), 8)
	buf := alloc(t, d, 128)
	ctx := context.Background()
	if n := testing.AllocsPerRun(500, func() { roundTrip(t, ctx, q, buf) }); n >= 1 {
		t.Errorf("%v allocations", n)
	}
	many := []*virtio.Buffer{alloc(t, d, 64), alloc(t, d, 64), alloc(t, d, 64), alloc(t, d, 64)}
	if n := testing.AllocsPerRun(500, func() {
		for _, b := range many {
			if err := q.Add(b, virtio.Out(0, 32), virtio.In(32, 32)); err != nil {
				t.Fatal(err)
			}
		}
		q.Kick()
		for range many {
			if _, _, err := q.Next(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}); n >= 1 {
		t.Errorf("%v allocations", n)
	}
}
