//go:build !race

// With the race detector golang.org/x/sys/unix tells it about the buffer of
// each read, which moves the buffer to the heap.

package evfd_test

import (
	"testing"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
)

func TestSignalAndTakeAllocate(t *testing.T) {
	fd := eventfd(t)
	if n := testing.AllocsPerRun(100, func() {
		evfd.Signal(fd)
		evfd.Take(fd)
	}); n != 0 {
		t.Errorf("%v allocations to signal and take, want 0", n)
	}
}

func TestSetAllocates(t *testing.T) {
	for name, how := range sleeps {
		fd := eventfd(t)
		s := set(t, how, fd)
		if n := testing.AllocsPerRun(100, func() {
			evfd.Signal(fd)
			s.Wait()
			evfd.Take(fd)
		}); n != 0 {
			t.Errorf("%s: %v allocations per wait, want 0", name, n)
		}
	}
}
