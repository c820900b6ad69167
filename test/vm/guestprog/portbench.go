package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm/internal/portbench"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// portBench measures a port of the link's console, or of a virtio serial device
// of QEMU, with a host process at the other end.
func portBench(ctx context.Context, args []string) (any, error) {
	f := flags("port-bench")
	device := f.String("device", "", "PCI address; none: a port of the virtio serial device")
	name := f.String("port", "", "name of the port")
	measure := f.String("measure", "", "what to measure")
	size := f.Int("size", 64, "bytes of a message")
	limit := f.Duration("duration", time.Second, "of the measurement")
	spin := f.Duration("spin", 0, "for how long the driver looks before it sleeps")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	m, known := portbench.Measures[*measure]
	if !known {
		return nil, fmt.Errorf("-measure %q: unknown", *measure)
	}
	var rw io.ReadWriteCloser
	if *device == "" {
		fd, err := openSerial(*name)
		if err != nil {
			return nil, err
		}
		if rw, err = file(fd, "thread"); err != nil {
			return nil, err
		}
	} else {
		d, err := ivshmem.Open(*device)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		c, err := console.Open(ctx, d, console.Config{Entries: 16, Spin: *spin})
		if err != nil {
			return nil, err
		}
		defer c.Close()
		p, err := c.WaitPort(ctx, *name)
		if err != nil {
			return nil, err
		}
		if err := p.Open(); err != nil {
			return nil, err
		}
		if err := p.WaitOpen(ctx); err != nil {
			return nil, err
		}
		rw = p
	}
	defer rw.Close()
	return portbench.Lead(rw, m, *size, *limit)
}
