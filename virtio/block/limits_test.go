package block_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/block"
)

// narrow is a disk in memory, from the virtio specification, that takes small
// segments only, and looks at the descriptors.
type narrow struct {
	dev              *ivshmem.Device
	image            []byte
	entries          int
	sizeMax, segMost uint32
}

func (n *narrow) device() virtio.Device {
	config := make([]byte, 24)
	binary.LittleEndian.PutUint64(config, uint64(len(n.image)/512))
	binary.LittleEndian.PutUint32(config[8:], n.sizeMax)
	binary.LittleEndian.PutUint32(config[12:], n.segMost)
	return virtio.Device{ID: 2, Features: 1<<1 | 1<<2, Queues: []int{n.entries}, Config: config, Run: n.run}
}

func (n *narrow) run(ctx context.Context, s *virtio.Session) error {
	q := s.Queue(0)
	for {
		c, err := q.Next(ctx)
		if err != nil {
			return err
		}
		if err := n.descriptors(s); err != nil {
			return err
		}
		var h [16]byte
		if _, err := c.ReadAt(h[:], 0); err != nil {
			return err
		}
		at, written := 512*binary.LittleEndian.Uint64(h[8:]), 1
		if binary.LittleEndian.Uint32(h[:]) == 0 {
			written = c.Writable()
			_, err = c.WriteAt(n.image[at:][:written-1], 0)
		} else {
			_, err = c.ReadAt(n.image[at:][:c.Readable()-16], 16)
		}
		if err == nil {
			_, err = c.WriteAt([]byte{0}, int64(written-1))
		}
		if err == nil {
			err = q.Push(c, written)
		}
		if err != nil {
			return err
		}
	}
}

// descriptors checks all lengths in the queue's table, those of requests and
// those of the past.
func (n *narrow) descriptors(s *virtio.Session) error {
	rw := n.dev.Sections().ReadWrite
	table := func(at uint64, entries int) ([]byte, error) {
		b := make([]byte, 16*entries)
		_, err := rw.ReadAt(b, int64(at))
		return b, err
	}
	var queue [8]byte
	if _, err := rw.ReadAt(queue[:], 0x28); err != nil {
		return err
	}
	all, err := table(binary.LittleEndian.Uint64(queue[:]), s.Queue(0).Size())
	if err != nil {
		return err
	}
	for ; len(all) > 0; all = all[16:] {
		data := uint32(0) // segments of it
		some := all[:16]
		if binary.LittleEndian.Uint16(all[12:])&4 != 0 {
			entries := binary.LittleEndian.Uint32(all[8:]) / 16
			if some, err = table(binary.LittleEndian.Uint64(all), int(entries)); err != nil {
				return err
			}
			data = entries - 2
		}
		if data > n.segMost {
			return fmt.Errorf("%d segments of data, at most %d expected", data, n.segMost)
		}
		for ; len(some) > 0; some = some[16:] {
			if size := binary.LittleEndian.Uint32(some[8:]); size > n.sizeMax {
				return fmt.Errorf("segment of %d bytes, at most %d expected", size, n.sizeMax)
			}
		}
	}
	return nil
}

// A disk's driver keeps to the sizes that a device takes, however small they
// are, and never has more in the queue than there are entries.
func TestNarrow(t *testing.T) {
	t.Parallel()
	for _, sizeMax := range []uint32{512, 1000, 8192} {
		for _, segMax := range []uint32{0, 3, 30, 1000} {
			for _, entries := range []int{4, 32} {
				t.Run(fmt.Sprintf("size_max %d, seg_max %d, %d entries", sizeMax, segMax, entries), func(t *testing.T) {
					n := &narrow{image: make([]byte, 256<<10), entries: entries, sizeMax: sizeMax, segMost: segMax}
					n.works(t)
				})
			}
		}
	}
}

func (n *narrow) works(t *testing.T) {
	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8002, ReadWrite: 1 << 20})
	n.dev = peers[0]
	b, err := virtio.NewBackEnd(peers[0], n.device())
	if err != nil {
		t.Fatal(err)
	}
	n.segMost = max(1, n.segMost)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- b.Serve(ctx) }()
	disk, err := block.Open(t.Context(), peers[1])
	if err != nil {
		t.Fatal(err)
	}
	var users sync.WaitGroup
	const each = 32 << 10
	for i := range int64(8) {
		users.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 0))
			want, got := make([]byte, each), make([]byte, each)
			for k := range byte(10) {
				at := random.IntN(each)
				end := at + random.IntN(each-at+1)
				copy(want[at:end], bytes.Repeat([]byte{k + 1}, end-at))
				if _, err := disk.WriteAt(want[at:end], i*each+int64(at)); err != nil {
					t.Error(err)
					return
				}
				if _, err := disk.ReadAt(got, i*each); err != nil || !bytes.Equal(got, want) {
					t.Errorf("not what was written: %v", err)
					return
				}
			}
		})
	}
	users.Wait()
	disk.Close()
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
