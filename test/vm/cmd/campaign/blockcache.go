package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/signal"
	"strconv"
	"sync"
	"syscall"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/block"
)

// volatileDisk is the argument by which this program is the device side of a
// disk with a cache: IMAGE DEVICE SEED SABOTAGE. When it is killed, the image
// has what was flushed, and of the rest sectors at random, as a disk has that
// loses power.
const volatileDisk = "volatile-disk"

func serveVolatile(args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("expected IMAGE DEVICE SEED SABOTAGE, found %q", args)
	}
	seed, err := strconv.ParseUint(args[2], 10, 64)
	if err != nil {
		return err
	}
	f, err := block.OpenFile(args[0], false)
	if err != nil {
		return err
	}
	defer f.Close()
	dev, err := ivshmem.Open(args[1])
	if err != nil {
		return err
	}
	defer dev.Close()
	image := &cachedImage{File: f, cache: map[int64][]byte{}, rand: rand.New(rand.NewPCG(seed, 1)), forgets: args[3] == "true"}
	device, err := block.Device(dev, image, block.Config{Serial: "campaign"})
	if err != nil {
		return err
	}
	b, err := virtio.NewBackEnd(dev, device)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT)
	defer stop()
	fmt.Println("ready")
	if err := b.Serve(ctx); err != nil {
		return err
	}
	return image.Sync()
}

// cachedImage is a file behind a cache that is lost with the process.
type cachedImage struct {
	*block.File
	forgets bool // sabotage: a flush is answered, and not done

	mu    sync.Mutex
	cache map[int64][]byte // by sector
	rand  *rand.Rand
}

// writeBack is how many sectors go to the file before anybody asks: one of so
// many.
const writeBack = 3

func (c *cachedImage) WriteAt(p []byte, offset int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := 0; i < len(p); i += block.SectorSize {
		at, sector := offset+int64(i), p[i:i+block.SectorSize]
		if c.rand.IntN(writeBack) > 0 {
			c.cache[at] = append([]byte(nil), sector...)
			continue
		}
		delete(c.cache, at)
		if _, err := c.File.WriteAt(sector, at); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

func (c *cachedImage) ReadAt(p []byte, offset int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.File.ReadAt(p, offset)
	for i := 0; i < n; i += block.SectorSize {
		if sector := c.cache[offset+int64(i)]; sector != nil {
			copy(p[i:], sector)
		}
	}
	return n, err
}

func (c *cachedImage) Zero(offset, n int64, _ bool) error {
	_, err := c.WriteAt(make([]byte, n), offset)
	return err
}

func (c *cachedImage) Discard(offset, n int64) error { return nil }

func (c *cachedImage) Sync() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.forgets {
		return nil
	}
	for at, sector := range c.cache {
		if _, err := c.File.WriteAt(sector, at); err != nil {
			return err
		}
	}
	clear(c.cache)
	return c.File.Sync()
}
