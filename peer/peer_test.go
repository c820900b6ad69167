package peer_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/peer"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

var pair = link.Config{Peers: 2, Vectors: 4, ReadWrite: 4096}

const (
	interruptControl = 0x08
	doorbell         = 0x0c
)

func eventfd(t *testing.T, initial uint, flags int) int {
	t.Helper()
	fd, err := unix.Eventfd(initial, flags|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestUseAfterClose uses a back end whose descriptors are closed, and their
// numbers taken by others: those must not be written or read.
func TestUseAfterClose(t *testing.T) {
	b, err := peer.Dial(ivshmemtest.Serve(t, pair))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var others []int
	for range 64 {
		others = append(others, eventfd(t, 7, unix.EFD_NONBLOCK))
	}
	for v := range uint32(4) {
		for target := range uint32(2) {
			if err := b.Store(doorbell, target<<16|v); !errors.Is(err, os.ErrClosed) {
				t.Errorf("doorbell: got %v, want os.ErrClosed", err)
			}
		}
	}
	if err := b.Store(interruptControl, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Interrupt Control: got %v, want os.ErrClosed", err)
	}
	if err := b.WriteConfig(0x43, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Privileged Control: got %v, want os.ErrClosed", err)
	}
	for _, fd := range others {
		var n [8]byte
		if _, err := unix.Read(fd, n[:]); err != nil || n[0] != 7 {
			t.Errorf("an eventfd of somebody else: counter %d, %v, want 7", n[0], err)
		}
	}
}

// oddities is a device that offers more doorbell eventfds than are of use.
type oddities struct {
	*pcidev.Function
	blocking, shared int
}

func (o oddities) IOFDs(index uint32, limit int) []vfiouser.IOFD {
	list := o.Function.IOFDs(index, limit)
	for data := range uint64(3) {
		list = append(list, vfiouser.IOFD{Offset: doorbell, Size: 4, Match: true, Data: data << 20, FD: o.shared})
	}
	return append(list,
		vfiouser.IOFD{Offset: doorbell, Size: 4, Match: true, Data: 1 << 24, FD: o.blocking},
		vfiouser.IOFD{Offset: doorbell, Size: 4, Match: true, Data: 1 << 20, FD: o.blocking})
}

// TestDescriptorsGivenBack counts the descriptors of the process before a back
// end was opened and after it was closed, with doorbell eventfds among them
// that come twice, or are of no use.
func TestDescriptorsGivenBack(t *testing.T) {
	l, err := link.New(pair)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := pcidev.New(l, pcidev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.IOFDs(vfiouser.RegionBAR0, 253) // the link makes them once
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "link")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dev := oddities{f, eventfd(t, 0, 0), eventfd(t, 0, unix.EFD_NONBLOCK)}
	count := func() int {
		t.Helper()
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := 0
	for round := range 3 {
		served := make(chan error, 1)
		go func() {
			conn, err := listener.AcceptUnix()
			if err == nil {
				err = vfiouser.Serve(conn, dev, vfiouser.ServerOptions{})
			}
			served <- err
		}()
		b, err := peer.Dial(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-served; err != nil {
			t.Fatal(err)
		}
		// The first round leaves the function with the eventfds it was given.
		if n := count(); round == 0 {
			before = n
		} else if n != before {
			t.Errorf("round %d: %d descriptors, want %d", round, n, before)
		}
	}
}
