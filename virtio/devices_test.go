package virtio_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio/block"
	"github.com/ivshmem-go/ivshmem/virtio/entropy"
)

// Linux's hwrng reads from the entropy device.
func TestEntropy(t *testing.T) {
	t.Parallel()
	b := newBoard(t, 0x8004, 0x2000, 2)
	source := bytes.Repeat([]byte("0123456789abcdef"), 512)
	serve(t, b.Device(t, 0, apart), entropy.Device(bytes.NewReader(source)))
	l := newLinux(t, b)
	if err := l.again(1); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{64, 1, 3000, 4096} {
		r, err := l.queues[0].request(nil, n)
		if err != nil || r.length != uint32(n) || !bytes.Equal(r.in, source[:n]) {
			t.Fatalf("%d bytes, %v, want %d", r.length, err, n)
		}
		source = source[n:]
	}
	l.remove()
}

// A source that has nothing left ends the service, and not the process.
func TestEntropyEnds(t *testing.T) {
	b := newBoard(t, 0x8004, 0x2000, 2)
	s := serve(t, b.Device(t, 0, apart), entropy.Device(strings.NewReader("x")))
	l := newLinux(t, b)
	if err := l.again(1); err != nil {
		t.Fatal(err)
	}
	if _, err := l.queues[0].request(nil, 10); !errors.Is(err, errBroken) {
		t.Errorf("request: %v", err)
	}
	l.remove()
	if err := s.stop(); err == nil || !strings.Contains(err.Error(), "source of random bytes") {
		t.Error(err)
	}
}

const (
	sizeMax     = 1 << 1
	segMax      = 1 << 2
	readOnly    = 1 << 5
	flush       = 1 << 9
	discard     = 1 << 13
	writeZeroes = 1 << 14
)

// image counts what an image is asked for.
type image struct {
	block.Image
	syncs, discards, zeros atomic.Int32
}

func (i *image) Sync() error {
	i.syncs.Add(1)
	return i.Image.Sync()
}

func (i *image) Discard(offset, n int64) error {
	i.discards.Add(1)
	return i.Image.Discard(offset, n)
}

func (i *image) Zero(offset, n int64, unmap bool) error {
	i.zeros.Add(1)
	return i.Image.Zero(offset, n, unmap)
}

// guestDisk is a disk in a guest.
type guestDisk struct {
	*linux
	board *board
	path  string
	image *image
}

// newDisk makes an image of some bytes, and binds the guest's driver.
func newDisk(t *testing.T, size int64, vectors int, c block.Config, accept uint64) *guestDisk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xd5}, int(size)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := block.OpenFile(path, false) // read-only is up to the device
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	b := newBoard(t, 0x8002, 0xdf000, vectors)
	dev := b.Device(t, 0, apart)
	i := &image{Image: f}
	d, err := block.Device(dev, i, c)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, dev, d)
	l := newLinux(t, b)
	l.accept = accept
	if err := l.again(1); err != nil {
		t.Fatal(err)
	}
	return &guestDisk{l, b, path, i}
}

// do does a request: a header, data, room for data and the status.
func (g *guestDisk) do(kind uint32, sector uint64, data []byte, in ...int) (got []byte, status byte, length uint32) {
	g.Helper()
	h := make([]byte, 16)
	binary.LittleEndian.PutUint32(h, kind)
	binary.LittleEndian.PutUint64(h[8:], sector)
	out := [][]byte{h}
	if len(data) > 0 {
		out = append(out, data)
	}
	r, err := g.queues[0].request(out, append(in, 1)...)
	if err != nil {
		g.Errorf("request %d: %v", kind, err)
		return nil, 0xff, 0
	}
	return r.in[:len(r.in)-1], r.in[len(r.in)-1], r.length
}

func rangeOf(sector uint64, n, flags uint32) []byte {
	r := binary.LittleEndian.AppendUint64(nil, sector)
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(r, n), flags)
}

const everything = sizeMax | segMax | readOnly | flush | discard | writeZeroes

// What Linux does to a disk.
func TestBlock(t *testing.T) {
	t.Parallel()
	for _, vectors := range []int{1, 2, 3, 16} {
		g := newDisk(t, 1<<20+100, vectors, block.Config{Serial: "serial number 123456"}, everything)
		g.shows("capacity", 0x4c, "0008000000000000 00100000 04000000")
		want := bytes.Repeat([]byte("sector by sector"), 320) // 10 sectors
		if _, status, n := g.do(1, 2038, want); status != 0 || n != 1 {
			t.Fatalf("OUT: status %d, length %d", status, n)
		}
		if got, status, n := g.do(0, 2038, nil, 512, 4096, 512); status != 0 || n != 5121 || !bytes.Equal(got, want) {
			t.Fatalf("IN: status %d, length %d, %q", status, n, got)
		}
		before := g.image.syncs.Load()
		if _, status, n := g.do(4, 0, nil); status != 0 || n != 1 || g.image.syncs.Load() != before+1 || before != 0 {
			t.Errorf("FLUSH: status %d, length %d, %d syncs", status, n, before)
		}
		if got, status, n := g.do(8, 0, nil, 20); status != 0 || n != 21 || string(got) != "serial number 123456" {
			t.Errorf("GET_ID: %q, status %d, length %d", got, status, n)
		}
		if _, status, _ := g.do(13, 0, rangeOf(2039, 2, 1)); status != 0 || g.image.zeros.Load() != 1 {
			t.Errorf("WRITE_ZEROES: status %d", status)
		}
		copy(want[512:], make([]byte, 1024))
		if _, status, _ := g.do(11, 0, append(rangeOf(0, 8, 0), rangeOf(16, 0, 0)...)); status != 0 || g.image.discards.Load() != 1 {
			t.Errorf("DISCARD: status %d", status)
		}
		if got, _, _ := g.do(0, 2038, nil, 5120); !bytes.Equal(got, want) {
			t.Errorf("after WRITE_ZEROES: %q", got)
		}
		g.remove()
		file, err := os.ReadFile(g.path)
		if err != nil || len(file) != 1<<20+100 || !bytes.Equal(file[2038*512:2048*512], want) || file[1<<20] != 0xd5 {
			t.Errorf("image of %d bytes, %v", len(file), err)
		}
	}
}

// Requests that must not be done are not, and the image keeps its size.
func TestBlockRefuses(t *testing.T) {
	t.Parallel()
	const io, unsupported = 1, 2
	for _, c := range []struct {
		name   string
		ro     bool
		kind   uint32
		sector uint64
		data   []byte
		in     []int
		status byte
	}{
		{"IN at the end", false, 0, 8, nil, []int{512}, io},
		{"IN beyond the end", false, 0, 7, nil, []int{1024}, io},
		{"IN far away", false, 0, 1 << 55, nil, []int{512}, io},
		{"IN wraps", false, 0, 1<<64 - 1, nil, []int{512}, io},
		{"IN of half a sector", false, 0, 0, nil, []int{100}, io},
		{"OUT at the end", false, 1, 8, make([]byte, 512), nil, io},
		{"OUT beyond the end", false, 1, 7, make([]byte, 1024), nil, io},
		{"OUT wraps", false, 1, 1<<64 - 1, make([]byte, 1024), nil, io},
		{"OUT of a sector and a half", false, 1, 0, make([]byte, 700), nil, io},
		{"OUT to a read-only disk", true, 1, 0, make([]byte, 512), nil, io},
		{"DISCARD beyond the end", false, 11, 0, rangeOf(0, 9, 0), nil, io},
		{"DISCARD wraps", false, 11, 0, rangeOf(1<<64-1, 2, 0), nil, io},
		{"DISCARD with a flag", false, 11, 0, rangeOf(0, 1, 1), nil, unsupported},
		{"DISCARD of nothing", false, 11, 0, nil, nil, io},
		{"DISCARD of half a range", false, 11, 0, rangeOf(0, 1, 0)[:10], nil, io},
		{"DISCARD of a good and a bad range", false, 11, 0, append(rangeOf(0, 0, 0), rangeOf(8, 1, 0)...), nil, io},
		{"DISCARD of too many ranges", false, 11, 0, bytes.Repeat(rangeOf(0, 0, 0), 17), nil, io},
		{"DISCARD on a read-only disk", true, 11, 0, rangeOf(0, 1, 0), nil, io},
		{"WRITE_ZEROES beyond the end", false, 13, 0, rangeOf(7, 2, 1), nil, io},
		{"WRITE_ZEROES of too much", false, 13, 0, rangeOf(0, 1<<31, 0), nil, io},
		{"WRITE_ZEROES of two ranges", false, 13, 0, append(rangeOf(0, 1, 0), rangeOf(1, 1, 0)...), nil, io},
		{"WRITE_ZEROES with an unknown flag", false, 13, 0, rangeOf(0, 1, 2), nil, unsupported},
		{"WRITE_ZEROES on a read-only disk", true, 13, 0, rangeOf(0, 1, 0), nil, io},
		{"a request that nobody knows", false, 99, 0, nil, nil, unsupported},
		{"a SCSI command", false, 2, 0, make([]byte, 32), []int{96}, unsupported},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newDisk(t, 8*512, 2, block.Config{ReadOnly: c.ro}, everything)
			if (g.features&readOnly != 0) != c.ro || (g.features&discard != 0) == c.ro {
				t.Errorf("features %#x", g.features)
			}
			if _, status, n := g.do(c.kind, c.sector, c.data, c.in...); status != c.status || n != 1 {
				t.Errorf("status %d, length %d, want status %d", status, n, c.status)
			}
			if got, status, _ := g.do(0, 0, nil, 8*512); status != 0 || !bytes.Equal(got, bytes.Repeat([]byte{0xd5}, 8*512)) {
				t.Errorf("changed: status %d", status)
			}
			if info, err := os.Stat(g.path); err != nil || info.Size() != 8*512 {
				t.Error(info.Size(), err)
			}
			g.remove()
		})
	}
}

// Requests without a header, or without room for a status, come back.
func TestBlockFragments(t *testing.T) {
	t.Parallel()
	g := newDisk(t, 8*512, 2, block.Config{}, everything)
	q := g.queues[0]
	if r, err := q.request([][]byte{make([]byte, 15)}, 1); err != nil || r.in[0] != 1 || r.length != 1 {
		t.Errorf("short header: %+v, %v", r, err)
	}
	if r, err := q.request([][]byte{make([]byte, 16)}); err != nil || r.length != 0 {
		t.Errorf("no status: %+v, %v", r, err)
	}
	if r, err := q.request(nil, 512); err != nil || r.in[511] != 1 || r.length != 1 {
		t.Errorf("no header: %+v, %v", r, err)
	}
	h := make([]byte, 16)
	if r, err := q.request([][]byte{h[:3], h[3:9], h[9:]}, 100, 300, 113); err != nil || r.in[512] != 0 || r.length != 513 {
		t.Errorf("any layout: %+v, %v", r, err)
	}
	g.remove()
}

// A driver that cannot ask for a flush finds what it wrote on stable storage.
func TestWriteThrough(t *testing.T) {
	t.Parallel()
	g := newDisk(t, 8*512, 2, block.Config{}, sizeMax|segMax|discard|writeZeroes)
	for i, c := range []struct {
		kind uint32
		data []byte
	}{{1, make([]byte, 512)}, {11, rangeOf(0, 1, 0)}, {13, rangeOf(0, 1, 0)}} {
		if _, status, _ := g.do(c.kind, 0, c.data); status != 0 || g.image.syncs.Load() != int32(i)+1 {
			t.Errorf("request %d: status %d, %d syncs", c.kind, status, g.image.syncs.Load())
		}
	}
	g.remove()
}

// Many requests at a time, each by its own.
func TestBlockParallel(t *testing.T) {
	t.Parallel()
	g := newDisk(t, 1<<20, 2, block.Config{}, everything)
	var group sync.WaitGroup
	for i := range uint64(6) {
		group.Go(func() {
			want := bytes.Repeat([]byte{byte(i)}, 4096)
			for range 20 {
				_, status, _ := g.do(1, 8*i, want)
				got, status2, _ := g.do(0, 8*i, nil, 4096)
				if status != 0 || status2 != 0 || !bytes.Equal(got, want) {
					t.Errorf("request of %d: status %d, %d", i, status, status2)
				}
			}
		})
	}
	group.Wait()
	g.remove()
}
