package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/capture"
	"github.com/ivshmem-go/ivshmem/vnet"
)

var pcapFlag = &cli.StringFlag{Name: "pcap", Usage: "write all frames to `FILE`, with their direction and why some were dropped, in the format pcapng"}

// captures is who sees the frames of a link.
type captures struct {
	link *vnet.Link

	mu  sync.Mutex
	all []*capture.Writer
}

// begin begins to write what passes.
func (c *captures) begin(w io.Writer, name string) (*capture.Writer, error) {
	d := c.link.Device()
	one, err := capture.New(w, name, fmt.Sprintf("virtual Ethernet of %s, peer %d", d.Address(), d.ID()))
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, one)
	c.observe()
	return one, nil
}

// end ends a capture.
func (c *captures) end(one *capture.Writer) error {
	c.mu.Lock()
	c.all = slices.DeleteFunc(c.all, func(other *capture.Writer) bool { return other == one })
	c.observe()
	c.mu.Unlock()
	return one.Close()
}

// observe tells the link. The caller holds mu.
func (c *captures) observe() {
	if len(c.all) == 0 {
		c.link.Observe(nil)
		return
	}
	all := slices.Clone(c.all)
	c.link.Observe(func(f vnet.Frame) {
		for _, one := range all {
			one.Observe(f)
		}
	})
}

// withLink runs f on the link of the device that is given.
func (p *program) withLink(c *cli.Context, f func(context.Context, *captures) error) error {
	d, err := ivshmem.Open(c.String("device"))
	if err != nil {
		return err
	}
	defer d.Close()
	return p.onLink(c, d, f)
}

// onLink is withLink for a device that is open.
func (p *program) onLink(c *cli.Context, d *ivshmem.Device, f func(context.Context, *captures) error) (err error) {
	link, err := vnet.Open(d, vnet.Config{MTU: c.Int("mtu")})
	if err != nil {
		return err
	}
	defer link.Close()
	all := &captures{link: link}
	if path := c.String("pcap"); path != "" {
		file, err := os.Create(path)
		if err != nil {
			return err
		}
		defer file.Close()
		one, err := all.begin(file, "link")
		if err != nil {
			return err
		}
		defer func() {
			if e := all.end(one); err == nil && e != nil {
				err = fmt.Errorf("--pcap %s: %w", path, e)
			}
		}()
	}
	return interrupted(f(c.Context, all))
}

func (p *program) netCaptureCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "capture", Usage: "write the frames of a running `net up` to standard output, as they come", ArgsUsage: "[INTERFACE]",
		Description: `The format is pcapng. The user has to be that of the command, or root.

Example: ivshctl net capture | wireshark -k -i -
         ivshctl net capture | tcpdump -n -r -`,
		Action: func(c *cli.Context) error {
			name, err := netName(c)
			if err != nil {
				return err
			}
			return interrupted(p.readCapture(c.Context, name))
		},
	})
}
