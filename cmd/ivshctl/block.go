package main

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/nbd"
	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/block"
)

func (p *program) blockCommand() *cli.Command {
	return command(-1, &cli.Command{
		Name: "block", Usage: "be a virtio disk for the other peer, until it is interrupted",
		Description: `The link has to be of protocol type 8002h, and this its peer 0. Linux's driver
virtio_ivshmem at the other end shows the disk as /dev/vdX; where there is none,
'ivshctl block attach' does as /dev/nbdX. What is flushed is on stable storage.
Drivers come and go; the image is locked meanwhile.

Example: ivshctl serve --protocol 0x8002 --peers 2 --vectors 2 --rw 16M --output 0
         ivshctl block --image disk.img`,
		Flags: []cli.Flag{deviceFlag,
			&cli.StringFlag{Name: "image", Usage: "`FILE` or block device with the data (required); its size does not change"},
			&cli.BoolFlag{Name: "read-only", Usage: "refuse writes; several can read an image"},
			&cli.StringFlag{Name: "serial", Usage: "serial `NUMBER` of the disk, up to 20 bytes"}},
		Subcommands: []*cli.Command{p.blockAttachCommand()},
		Action: func(c *cli.Context) error {
			path := c.String("image")
			if c.NArg() > 0 {
				return unknownCommand(c)
			}
			if path == "" {
				return usagef("block: expected --image FILE")
			}
			image, err := block.OpenFile(path, c.Bool("read-only"))
			if err != nil {
				return err
			}
			defer image.Close()
			return p.serveVirtio(c, path, func(d *ivshmem.Device) (virtio.Device, error) {
				return block.Device(d, image, block.Config{ReadOnly: c.Bool("read-only"), Serial: c.String("serial")})
			})
		},
	})
}

// serveVirtio is a virtio device for the other peer until it is interrupted.
func (p *program) serveVirtio(c *cli.Context, name string, device func(*ivshmem.Device) (virtio.Device, error)) error {
	d, err := ivshmem.Open(c.String("device"))
	if err != nil {
		return err
	}
	defer d.Close()
	v, err := device(d)
	if err != nil {
		return err
	}
	if err := rightEnd(d, v.ID, true); err != nil {
		return err
	}
	b, err := virtio.NewBackEnd(d, v)
	if err != nil {
		return err
	}
	fmt.Fprintf(p.out, "ready %s\n", name)
	return b.Serve(c.Context)
}

// rightEnd checks that a device is not the wrong end of the right link.
func rightEnd(d *ivshmem.Device, id uint16, backEnd bool) error {
	own, other, peer, hint := regs.VirtioBackEnd, regs.Protocol(0), 0, "which is who connects first, or to the socket PATH.0 of a link that is served with --socket-per-peer"
	if !backEnd {
		own, other, peer, hint = other, own, 1, "which is who connects when peer 0 is there, or to the socket PATH.1 of a link that is served with --socket-per-peer"
	}
	want := regs.ProtocolVirtio | regs.Protocol(id)
	if d.Protocol() != want|other {
		return nil // the right end, or another link
	}
	return fmt.Errorf("%s: expected to be peer %d (%v), found peer %d (%v): be peer %d, %s",
		d.Address(), peer, want|own, d.ID(), d.Protocol(), peer, hint)
}

func (p *program) blockAttachCommand() *cli.Command {
	return command(0, &cli.Command{
		Name: "attach", Usage: "use the virtio disk of the other peer, until it is interrupted",
		Description: `Shows the disk as /dev/nbdX, for root and with the kernel's module nbd; or
serves it to NBD clients, such as qemu-img, qemu-system, nbdinfo and nbd-client,
on a Unix socket. Waits for the other end. If that dies, accesses wait until it
is back, with the same image, and then go on; unless its whole machine dies,
nothing is lost. An interrupt ends the device after what is to be written has
been: unmount its file systems before.

Example: ivshctl block attach & mount /dev/nbd0 /mnt
         ivshctl block attach --socket disk.sock & qemu-img info nbd+unix:///?socket=disk.sock`,
		Flags: []cli.Flag{deviceFlag,
			&cli.StringFlag{Name: "nbd", Usage: "device of the kernel, such as `/dev/nbd0` (default: the first free one)"},
			&cli.StringFlag{Name: "socket", Usage: "`PATH` of a Unix socket for NBD clients, in place of a device"}},
		Action: func(c *cli.Context) error {
			if c.IsSet("nbd") && c.IsSet("socket") {
				return usagef("block attach: expected --nbd or --socket")
			}
			d, err := ivshmem.Open(c.String("device"))
			if err != nil {
				return err
			}
			defer d.Close()
			if err := rightEnd(d, block.ID, false); err != nil {
				return err
			}
			disk, err := block.Attach(c.Context, d, func(err error) {
				if err != nil {
					fmt.Fprintf(p.err, "%v: waiting for it\n", err)
				} else {
					fmt.Fprintln(p.err, "the virtio back-end is back")
				}
			})
			if err != nil {
				return interrupted(err)
			}
			defer disk.Close()
			ready := func(path string) { fmt.Fprintf(p.out, "ready %s\n", path) }
			if path := c.String("socket"); path != "" {
				return p.serveDisk(c.Context, path, disk, ready)
			}
			return nbd.Attach(c.Context, c.String("nbd"), disk, ready)
		},
	})
}

const (
	// maxClients is how many NBD clients there may be at a time; others wait.
	maxClients = 16
	// lastRequests is how long the requests of clients may take at the end: a
	// back-end may be there and never answer.
	lastRequests = 2 * time.Second
)

// serveDisk serves NBD clients on a socket.
func (p *program) serveDisk(ctx context.Context, path string, disk *block.Attachment, ready func(string)) error {
	l, err := sockpath.Listen(path)
	if err != nil {
		return err
	}
	ready(path)
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		late := time.AfterFunc(lastRequests, func() { disk.Close() })
		all.Wait()
		late.Stop()
	}()
	places := make(chan struct{}, maxClients)
	failed := func(err error) { fmt.Fprintf(p.err, "accept: %v\n", err) }
	return sockpath.Accept(ctx, l, failed, func(conn *net.UnixConn) {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			conn.Close()
			return
		}
		all.Go(func() {
			defer func() { <-places }()
			if err := nbd.Serve(ctx, conn, disk); err != nil && ctx.Err() == nil {
				fmt.Fprintf(p.err, "NBD client: %v\n", err)
			}
		})
	})
}
