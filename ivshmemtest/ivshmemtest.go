// Package ivshmemtest gives tests peers of a link in one process, without a
// hypervisor: the real link service on a socket of its own, and real devices
// connected to it.
//
//	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 1, ReadWrite: 4096})
//	peers[0].Ring(1, 0)
package ivshmemtest

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
)

// Serve serves a link until the test ends, and returns the path of its socket
// for [ivshmem.Open].
func Serve(t testing.TB, c link.Config) string {
	t.Helper()
	path, stop := ServeUntil(t, c, pcidev.Options{})
	t.Cleanup(stop)
	return path
}

// ServeUntil is Serve with options, until stop is called.
func ServeUntil(t testing.TB, c link.Config, o pcidev.Options) (path string, stop func()) {
	t.Helper()
	l, err := link.New(c)
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: its paths may be too long for a socket.
	dir, err := os.MkdirTemp("", "ivshmemtest")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "link")
	listener, err := pcidev.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- (&pcidev.Server{Link: l, Options: o}).Serve(ctx, listener) }()
	return path, func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		l.Close()
		os.RemoveAll(dir)
	}
}

// Peers returns all peers of a fresh link, in the order of their IDs. They are
// closed when the test ends.
func Peers(t testing.TB, c link.Config, opts ...ivshmem.Option) []*ivshmem.Device {
	t.Helper()
	path := Serve(t, c)
	peers := make([]*ivshmem.Device, c.Peers)
	for i := range peers {
		d, err := ivshmem.Open(path, opts...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
		peers[i] = d
	}
	return peers
}
