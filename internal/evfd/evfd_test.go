package evfd_test

import (
	"encoding/binary"
	"math"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
)

func eventfd(t testing.TB) int {
	t.Helper()
	fd, err := evfd.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestSignalAndTake(t *testing.T) {
	fd := eventfd(t)
	if evfd.Drain(fd) || evfd.Take(fd) != 0 {
		t.Error("a new eventfd has been signalled")
	}
	for n := range uint64(4) {
		for range n {
			if err := evfd.Signal(fd); err != nil {
				t.Fatal(err)
			}
		}
		if got := evfd.Take(fd); got != n {
			t.Errorf("%d taken of %d signals", got, n)
		}
	}
	evfd.Signal(fd)
	if !evfd.Drain(fd) || evfd.Drain(fd) {
		t.Error("one signal, not drained once")
	}
	// A counter that takes no more is signalled already.
	if _, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, math.MaxUint64-1)); err != nil {
		t.Fatal(err)
	}
	if err := evfd.Signal(fd); err != nil {
		t.Errorf("signal of a full counter: %v", err)
	}
	if got := evfd.Take(fd); got != math.MaxUint64-1 {
		t.Errorf("%#x taken of a full counter", got)
	}
	if err := evfd.Signal(1 << 20); err != unix.EBADF {
		t.Errorf("signal of no descriptor: %v, want EBADF", err)
	}
	if evfd.Take(1<<20) != 0 {
		t.Error("something taken of no descriptor")
	}
}

func TestFlags(t *testing.T) {
	fd := eventfd(t)
	if !evfd.NonBlocking(fd) {
		t.Error("a new eventfd blocks")
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("a new eventfd is inherited: flags %#x, %v", flags, err)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	if evfd.NonBlocking(fd) {
		t.Error("a blocking eventfd is called non-blocking")
	}
	if evfd.NonBlocking(1 << 20) {
		t.Error("no descriptor is called non-blocking")
	}
}

func TestNumber(t *testing.T) {
	a, b := eventfd(t), eventfd(t)
	twin, err := unix.Dup(a)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(twin)
	numberA, okA := evfd.Number(a)
	numberB, okB := evfd.Number(b)
	numberTwin, okTwin := evfd.Number(twin)
	if !okA || !okB || !okTwin {
		t.Fatalf("no numbers of eventfds: %v %v %v", okA, okB, okTwin)
	}
	if numberA != numberTwin || numberA == numberB {
		t.Errorf("numbers %d, %d, and %d of a duplicate of the first", numberA, numberB, numberTwin)
	}
	file, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, fd := range []int{int(file.Fd()), 1 << 20, -1} {
		if n, ok := evfd.Number(fd); ok {
			t.Errorf("descriptor %d, no eventfd, has the number %d", fd, n)
		}
	}
}
