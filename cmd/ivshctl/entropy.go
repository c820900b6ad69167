package main

import (
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/entropy"
)

func (p *program) entropyCommand() *cli.Command {
	return command(0, &cli.Command{
		Name: "entropy", Usage: "be a virtio source of random bytes for the other peer, until it is interrupted",
		Description: `The link has to be of protocol type 8004h, and this its peer 0. Linux at the
other end, with its driver virtio_ivshmem, has it as /dev/hwrng.

Example: ivshctl serve --protocol 0x8004 --peers 2 --vectors 2 --rw 64K --output 0
         ivshctl entropy`,
		Flags: []cli.Flag{deviceFlag,
			&cli.StringFlag{Name: "source", Usage: "`FILE` to read, such as /dev/hwrng; its end is the device's (default: this kernel's random numbers)"}},
		Action: func(c *cli.Context) error {
			var source io.Reader
			name := "random numbers"
			if path := c.String("source"); path != "" {
				f, err := os.Open(path)
				if err != nil {
					return err
				}
				defer f.Close()
				source, name = f, path
			}
			return p.serveVirtio(c, name, func(*ivshmem.Device) (virtio.Device, error) { return entropy.Device(source), nil })
		},
	})
}
