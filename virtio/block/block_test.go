package block_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/block"
)

// newImage is a file of some bytes.
func newImage(t testing.TB, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(i / 512)
	}
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// serve lets a back-end serve until the end of the test.
func serve(t testing.TB, b *virtio.BackEnd) {
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

// newDisk serves a file, and opens it at the other end.
func newDisk(t testing.TB, path string, rw uint64, c block.Config) *block.Disk {
	t.Helper()
	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8002, ReadWrite: rw})
	f, err := block.OpenFile(path, c.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	d, err := block.Device(peers[0], f, c)
	if err != nil {
		t.Fatal(err)
	}
	b, err := virtio.NewBackEnd(peers[0], d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	serve(t, b)
	disk, err := block.Open(t.Context(), peers[1])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Close() })
	return disk
}

// A disk behaves as the file that it is, in small sections and large ones.
func TestDisk(t *testing.T) {
	t.Parallel()
	const size = 300 * 512
	for _, rw := range []uint64{0x2000, 0xf000, 1 << 20, 64 << 20} {
		path := newImage(t, size)
		d := newDisk(t, path, rw, block.Config{Serial: "A1"})
		if s, err := d.Serial(); s != "A1" || err != nil || d.Size() != size || d.ReadOnly() {
			t.Errorf("serial %q, %v, size %d", s, err, d.Size())
		}
		model, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		random := rand.New(rand.NewPCG(1, rw))
		for i := range 60 {
			at, n := random.IntN(300), 0
			n = random.IntN(300 - at)
			p := bytes.Repeat([]byte{byte(100 + i)}, n*512)
			switch i % 4 {
			case 0:
				if _, err := d.WriteAt(p, int64(at)*512); err != nil {
					t.Fatal(err)
				}
				copy(model[at*512:], p)
			case 1: // parts of sectors
				to := random.IntN(size - len(p) + 1)
				p = p[:random.IntN(len(p)+1)]
				if n, err := d.WriteAt(p, int64(to)); err != nil || n != len(p) {
					t.Fatal(n, err)
				}
				copy(model[to:], p)
			case 2:
				if err := d.Zero(int64(at)*512, int64(n)*512, i%8 == 2); err != nil {
					t.Fatal(err)
				}
				clear(model[at*512 : (at+n)*512])
			case 3:
				from := random.IntN(size - len(p) + 1)
				if _, err := d.ReadAt(p, int64(from)); err != nil || !bytes.Equal(p, model[from:from+len(p)]) {
					t.Fatalf("read %d bytes at %d: %v", len(p), from, err)
				}
			}
		}
		if err := d.Flush(); err != nil {
			t.Error(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
		if err != nil || !bytes.Equal(got, model) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if file, err := os.ReadFile(path); err != nil || !bytes.Equal(file, model) {
			t.Errorf("the file differs: %v", err)
		}
		if err := d.Discard(0, size); err != nil {
			t.Error(err)
		}
		if info, err := os.Stat(path); err != nil || info.Size() != size {
			t.Errorf("%v, %v", info, err)
		}
	}
}

// Accesses outside, or of parts of sectors, or to a read-only disk are refused.
func TestDiskRefuses(t *testing.T) {
	t.Parallel()
	path := newImage(t, 8*512)
	d := newDisk(t, path, 1<<16, block.Config{})
	p := make([]byte, 512)
	for _, at := range []int64{-512, -1, 8*512 - 511, 8 * 512, 1 << 62} {
		if _, err := d.WriteAt(p, at); err == nil {
			t.Errorf("written at %d", at)
		}
		if err := d.Zero(at, 512, false); err == nil {
			t.Errorf("zeroed at %d", at)
		}
	}
	if d.Zero(1, 512, false) == nil || d.Discard(0, 100) == nil {
		t.Error("a part of a sector was zeroed, or discarded")
	}
	if n, err := d.ReadAt(p, 8*512-10); n != 10 || err != io.EOF {
		t.Errorf("%d bytes, %v at the end", n, err)
	}
	if _, err := d.ReadAt(p, -1); err == nil {
		t.Error("read before the start")
	}
	ro := newDisk(t, newImage(t, 8*512), 1<<16, block.Config{ReadOnly: true})
	if !ro.ReadOnly() {
		t.Error("not read-only")
	}
	for _, err := range []error{ro.Zero(0, 512, true), ro.Discard(0, 512), func() error { _, err := ro.WriteAt(p, 0); return err }()} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Error(err)
		}
	}
	if _, err := ro.ReadAt(p, 512); err != nil || p[0] != 1 {
		t.Error(err)
	}
}

// Many use a disk at a time.
func TestDiskParallel(t *testing.T) {
	t.Parallel()
	d := newDisk(t, newImage(t, 1<<20), 1<<20, block.Config{})
	var group sync.WaitGroup
	for i := range 20 {
		group.Go(func() {
			want, got := bytes.Repeat([]byte{byte(i)}, 4096), make([]byte, 4096)
			for range 20 {
				if _, err := d.WriteAt(want, int64(i)*4096); err != nil {
					t.Error(err)
				}
				if _, err := d.ReadAt(got, int64(i)*4096); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%v, %d", err, got[0])
				}
			}
		})
	}
	group.Wait()
	d.Close()
	if err := d.Flush(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// Writes of parts of a sector by many are all there.
func TestDiskEdges(t *testing.T) {
	t.Parallel()
	d := newDisk(t, newImage(t, 4*512), 1<<16, block.Config{})
	var group sync.WaitGroup
	const writers, each = 16, 100
	for i := range writers {
		group.Go(func() {
			for k := range 10 {
				if _, err := d.WriteAt(bytes.Repeat([]byte{byte(i + k)}, each), int64(i)*each); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	got := make([]byte, writers*each)
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != byte(i/each+9) {
			t.Fatalf("byte %d is %d", i, got[i])
		}
	}
}

// A file is an image for one that writes, or for many that read.
func TestOpenFile(t *testing.T) {
	t.Parallel()
	path := newImage(t, 512)
	writer, err := block.OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, readOnly := range []bool{false, true} {
		if _, err := block.OpenFile(path, readOnly); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("read-only %v: %v", readOnly, err)
		}
	}
	writer.Close()
	for range 2 {
		f, err := block.OpenFile(path, true)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	if _, err := block.OpenFile(t.TempDir(), true); err == nil {
		t.Error("a directory is a disk")
	}
	if _, err := block.OpenFile("/dev/null", false); err == nil {
		t.Error("/dev/null is a disk")
	}
	if _, err := block.OpenFile(filepath.Join(t.TempDir(), "none"), false); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
