package main

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/block"
)

// A back-end that is there and answers nothing does not keep an attached disk
// from ending.
func TestAttachedDiskEnds(t *testing.T) {
	t.Parallel()
	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8002, ReadWrite: 256 << 10})
	asked := make(chan struct{})
	back, err := virtio.NewBackEnd(peers[0], virtio.Device{ID: 2, Queues: []int{32}, Config: []byte{1, 0, 0, 0, 0, 0, 0, 0},
		Run: func(ctx context.Context, s *virtio.Session) error {
			q := s.Queue(0)
			c, err := q.Next(ctx) // what it calls itself
			if err != nil {
				return err
			}
			c.Write(make([]byte, c.Writable()))
			if err := q.Push(c, c.Writable()); err != nil {
				return err
			}
			if _, err := q.Next(ctx); err != nil {
				return err
			}
			close(asked)
			<-ctx.Done()
			return ctx.Err()
		}})
	if err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- back.Serve(serving) }()
	defer func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	disk, err := block.Attach(ctx, peers[1], func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	path := filepath.Join(t.TempDir(), "disk.sock")
	ready, ended := make(chan string, 1), make(chan error, 1)
	p := &program{out: io.Discard, err: io.Discard}
	go func() { ended <- p.serveDisk(ctx, path, disk, func(path string) { ready <- path }) }()
	<-ready
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// NBD_OPT_EXPORT_NAME, and NBD_CMD_READ of the sector.
	io.WriteString(c, "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00")
	io.WriteString(c, "\x25\x60\x95\x13\x00\x00\x00\x00coookies\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00")
	<-asked
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("it did not end")
	}
}
