package entropy_test

import (
	"bytes"
	"context"
	"io"
	"testing"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/entropy"
)

// serve serves a device until the test ends.
func serve(t testing.TB, b *virtio.BackEnd) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- b.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// Device and driver over the link service.
func TestBoth(t *testing.T) {
	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8004, ReadWrite: 64 << 10})
	want := make([]byte, 100_000)
	for i := range want {
		want[i] = byte(i * 7)
	}
	b, err := virtio.NewBackEnd(peers[0], entropy.Device(bytes.NewReader(want)))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, b)
	s, err := entropy.Open(t.Context(), peers[1])
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(s, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("other bytes than the source's")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
