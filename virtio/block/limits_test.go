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
	taken            uint64 // requests
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

// descriptors checks the lengths in the request that was taken last: nobody
// changes its descriptors meanwhile.
func (n *narrow) descriptors(s *virtio.Session) error {
	rw, le := n.dev.Sections().ReadWrite, binary.LittleEndian
	read := func(at uint64, size int) ([]byte, error) {
		b := make([]byte, size)
		_, err := rw.ReadAt(b, int64(at))
		return b, err
	}
	rings, err := read(0x28, 16) // queue_desc, queue_driver
	if err != nil {
		return err
	}
	head, err := read(le.Uint64(rings[8:])+4+2*(n.taken%uint64(s.Queue(0).Size())), 2)
	if err != nil {
		return err
	}
	n.taken++
	table, id, segments := le.Uint64(rings), le.Uint16(head), uint32(0)
	for {
		d, err := read(table+16*uint64(id), 16)
		if err != nil {
			return err
		}
		flags := le.Uint16(d[12:])
		if flags&4 != 0 {
			table, id = le.Uint64(d), 0
			continue
		}
		if size := le.Uint32(d[8:]); size > n.sizeMax {
			return fmt.Errorf("segment of %d bytes, at most %d expected", size, n.sizeMax)
		}
		segments++
		if flags&1 == 0 {
			break
		}
		id = le.Uint16(d[14:])
	}
	if segments > n.segMost+2 { // header and status
		return fmt.Errorf("%d segments of data, at most %d expected", segments-2, n.segMost)
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
	serve(t, b)
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
}
