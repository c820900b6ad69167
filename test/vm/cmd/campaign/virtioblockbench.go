package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
	"github.com/ivshmem-go/ivshmem/virtio/block"
)

// blockJob is a load on a disk.
type blockJob struct {
	what   string
	write  bool
	size   int
	flight int // requests under way
}

var blockJobs = []blockJob{
	{"reads, 4 KiB, one at a time", false, 4 << 10, 1},
	{"reads, 4 KiB, 8 at a time", false, 4 << 10, 8},
	{"writes, 4 KiB, 8 at a time", true, 4 << 10, 8},
	{"reads, 64 KiB, 8 at a time", false, 64 << 10, 8},
	{"writes, 64 KiB, 8 at a time", true, 64 << 10, 8},
}

// benchImage is the size of the images: they stay in the page cache.
const benchImage = 64 << 20

// blockDevice is what can be read and written.
type blockDevice interface {
	io.ReaderAt
	io.WriterAt
}

// blockEnds are a disk over the link, and one over NBD, on this machine.
type blockEnds struct {
	service *vm.Service
	server  *checks.Process
	device  *ivshmem.Device
	link    *block.Disk
	nbd     *nbdClient
}

func (e *blockEnds) close() {
	if e.nbd != nil {
		e.nbd.Close()
	}
	if e.link != nil {
		e.link.Close()
	}
	if e.device != nil {
		e.device.Close()
	}
	if e.server != nil {
		e.server.Kill()
	}
	if e.service != nil {
		e.service.Close()
	}
}

func makeImage(path string) error {
	b := make([]byte, benchImage)
	for at := 0; at < len(b); at += 512 {
		binary.LittleEndian.PutUint64(b[at:], uint64(at))
	}
	return os.WriteFile(path, b, 0o600)
}

// openBlockEnds has QEMU's own NBD server give an image that it was started
// with.
func openBlockEnds(ctx context.Context, dir string, monitor *vm.Monitor) (e *blockEnds, err error) {
	e = &blockEnds{}
	ivshctl, err := vm.HostBinary(ctx, "ivshctl")
	if err != nil {
		return e, err
	}
	image := filepath.Join(dir, "link.img")
	if err := makeImage(image); err != nil {
		return e, err
	}
	if e.service, err = vm.Serve(ctx, nil, "--protocol", "0x8002", "--peers", "2", "--vectors", "2", "--rw", "8M", "--output", "0", "--socket-per-peer", "--quiet"); err != nil {
		return e, err
	}
	if e.server, err = checks.Start(checks.Host(filepath.Dir(ivshctl)), "ivshctl", "block", "--image", image, "--device", e.service.Socket+".0"); err != nil {
		return e, err
	}
	if _, err := e.server.Line(ctx); err != nil {
		return e, err
	}
	if e.device, err = ivshmem.Open(e.service.Socket + ".1"); err != nil {
		return e, err
	}
	if e.link, err = block.Open(ctx, e.device); err != nil {
		return e, err
	}
	socket := filepath.Join(dir, "nbd.sock")
	err = errors.Join(
		monitor.Execute(ctx, "nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": socket}}}, nil),
		monitor.Execute(ctx, "block-export-add", map[string]any{"type": "nbd", "id": "bench", "node-name": "bench", "name": "bench", "writable": true}, nil))
	if err != nil {
		return e, err
	}
	e.nbd, err = dialNBD(socket, "bench")
	return e, err
}

// nbdImage makes the image that QEMU serves, and says what starts it so.
func nbdImage(dir string) ([]string, error) {
	path := filepath.Join(dir, "nbd.img")
	return []string{"-blockdev", "driver=file,node-name=bench,filename=" + path}, makeImage(path)
}

// measure is requests per second. Each sector says where it is.
func (j blockJob) measure(d blockDevice, long time.Duration) (float64, error) {
	var done atomic.Int64
	var group sync.WaitGroup
	errs := make([]error, j.flight)
	begin := time.Now()
	for i := range j.flight {
		group.Go(func() {
			p := make([]byte, j.size)
			for errs[i] == nil && time.Since(begin) < long {
				at := rand.Int64N(benchImage/int64(j.size)) * int64(j.size)
				if j.write {
					for s := 0; s < len(p); s += 512 {
						binary.LittleEndian.PutUint64(p[s:], uint64(at)+uint64(s))
					}
					_, errs[i] = d.WriteAt(p, at)
				} else if _, errs[i] = d.ReadAt(p, at); errs[i] == nil {
					for s := 0; s < len(p); s += 512 {
						if got := binary.LittleEndian.Uint64(p[s:]); got != uint64(at)+uint64(s) {
							errs[i] = fmt.Errorf("sector at %d: found %d", at+int64(s), got)
						}
					}
				}
				done.Add(1)
			}
		})
	}
	group.Wait()
	return float64(done.Load()) / time.Since(begin).Seconds(), errors.Join(errs...)
}

// bench measures both disks in turn.
func (e *blockEnds) bench(r *Report, rounds int, long time.Duration) error {
	t := Table{
		Title: fmt.Sprintf("A disk of a process of this machine, over the link, beside QEMU's NBD server on a Unix socket: requests per second, %d rounds, everything in turn", rounds),
		Head:  []string{"what", "median", "NBD, median", "ratio, median (lowest – highest)", "bar"},
	}
	own, other := make([][]float64, len(blockJobs)), make([][]float64, len(blockJobs))
	for range rounds {
		for i, j := range blockJobs {
			x, err := j.measure(e.link, long)
			if err != nil {
				return fmt.Errorf("%s: %w", j.what, err)
			}
			y, err := j.measure(e.nbd, long)
			if err != nil {
				return fmt.Errorf("%s: %w", j.what, err)
			}
			own[i], other[i] = append(own[i], x), append(other[i], y)
		}
	}
	for i, j := range blockJobs {
		var ratios []float64
		for k := range own[i] {
			ratios = append(ratios, own[i][k]/other[i][k])
		}
		r.sample(j.what, ratios...)
		t.Rows = append(t.Rows, []string{j.what, withUnit(median(own[i]), "/s"), withUnit(median(other[i]), "/s"),
			fmt.Sprintf("**%.2f** (%.2f – %.2f)", median(ratios), slices.Min(ratios), slices.Max(ratios)), ">= 1"})
		want := 1.0
		if r.Quick {
			want = 0.25
		}
		r.atLeast(j.what, median(ratios), want)
	}
	r.Tables = append(r.Tables, t)
	return nil
}
