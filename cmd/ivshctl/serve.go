package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/regs"
)

func (p *program) serveCommand() *cli.Command {
	return command(0, &cli.Command{
		Name:  "serve",
		Usage: "serve a link to guests of QEMU 10.1 or newer, and to host processes",
		Description: `Runs in the foreground until it is interrupted; all peers connect to one
socket. It must outlive its guests: QEMU does not connect again. Arrivals and
departures are logged on standard error.

Example: ivshctl serve --socket /run/link0 --peers 3 --rw 16M --output 0`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "socket", Aliases: []string{"S"}, Usage: "`PATH` of the link's socket (required)"},
			&cli.UintFlag{Name: "peers", Usage: "number of peers, 2 to 64", Value: 2},
			&cli.UintFlag{Name: "vectors", Usage: "interrupt vectors of each peer, 1 to 2048", Value: 4},
			&cli.StringFlag{Name: "protocol", Usage: "protocol `TYPE`, 0 to 0xffff; virtio types give peer 0 the back-end", Value: "0"},
			&cli.StringFlag{Name: "state-table", Usage: "`SIZE` of the State Table (default: the smallest that fits)"},
			&cli.StringFlag{Name: "rw", Usage: "`SIZE` of the R/W section, may be 0", Value: "1M"},
			&cli.StringFlag{Name: "output", Usage: "`SIZE` of each peer's output section, may be 0", Value: "256K"},
			&cli.StringFlag{Name: "mode", Usage: "what guests map directly: state (all but the State Table) or shared (all)", Value: "state"},
			&cli.BoolFlag{Name: "quiet", Usage: "log problems only"},
		},
		Action: func(c *cli.Context) error {
			if c.String("socket") == "" {
				return usagef("serve: expected --socket PATH")
			}
			config, err := linkConfig(c)
			if err != nil {
				return err
			}
			mode, err := pcidev.ParseMode(c.String("mode"))
			if err != nil {
				return usageError{err}
			}
			level := slog.LevelInfo
			if c.Bool("quiet") {
				level = slog.LevelWarn
			}
			log := slog.New(slog.NewTextHandler(p.err, &slog.HandlerOptions{Level: level}))
			return p.serve(c.Context, c.String("socket"), config, pcidev.Options{Mode: mode}, log)
		},
	})
}

// maxPeers is the most peers that the service is built and tested for.
const maxPeers = 64

func linkConfig(c *cli.Context) (link.Config, error) {
	var config link.Config
	if n := c.Uint("peers"); n < regs.MinPeers || n > maxPeers {
		return config, usagef("--peers: expected 2 to %d, found %d", maxPeers, n)
	}
	if n := c.Uint("vectors"); n < 1 || n > regs.VectorsMax {
		return config, usagef("--vectors: expected 1 to %d, found %d", regs.VectorsMax, n)
	}
	config.Peers, config.Vectors = uint32(c.Uint("peers")), uint16(c.Uint("vectors"))
	var err error
	if config.Protocol, err = regs.ParseProtocol(c.String("protocol")); err != nil {
		return config, usageError{err}
	}
	for _, s := range []struct {
		flag string
		size *uint64
	}{
		{"state-table", &config.StateTable}, {"rw", &config.ReadWrite}, {"output", &config.Output},
	} {
		if v := c.String(s.flag); v != "" {
			if *s.size, err = parseSize("--"+s.flag, v); err != nil {
				return config, err
			}
		}
	}
	if _, err := config.Layout(); err != nil {
		return config, usageError{err}
	}
	return config, nil
}

func (p *program) serve(ctx context.Context, socket string, config link.Config, o pcidev.Options, log *slog.Logger) error {
	if err := checkDescriptors(config); err != nil {
		return err
	}
	l, err := link.New(config)
	if err != nil {
		return err
	}
	defer l.Close()
	listener, err := pcidev.Listen(socket)
	if err != nil {
		return err
	}
	if err := p.announce(socket, l.Config()); err != nil {
		listener.Close()
		return err
	}
	server := &pcidev.Server{Link: l, Options: o, Log: log}
	return server.Serve(ctx, listener)
}

// checkDescriptors refuses a link whose eventfds would exceed the limit of the
// process: a QEMU whose vectors do not fit loses its device.
func checkDescriptors(c link.Config) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	// For each peer a socket, and for each of its vectors the client's
	// eventfd and the doorbell's; and some for the process itself.
	const spare = 64
	perPeer := 1 + 2*uint64(c.Vectors)
	if need := spare + uint64(c.Peers)*perPeer; need > limit.Cur {
		return usagef("%d peers of %d vectors need up to %d file descriptors (%d + %d x %d), the limit is %d: raise it (ulimit -n), or serve fewer peers or vectors",
			c.Peers, c.Vectors, need, spare, c.Peers, perPeer, limit.Cur)
	}
	return nil
}

// announce prints what the link is, and how to give it to a guest.
func (p *program) announce(socket string, c link.Config) error {
	path, err := filepath.Abs(socket)
	if err != nil {
		return err
	}
	device := struct {
		Driver string `json:"driver"`
		Socket struct {
			Type string `json:"type"`
			Path string `json:"path"`
		} `json:"socket"`
	}{Driver: "vfio-user-pci"}
	device.Socket.Type, device.Socket.Path = "unix", path
	arg, err := json.Marshal(device)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(p.out, `link: %d peers, %d vectors, protocol %04Xh (%v), State Table %s, R/W section %s, output sections %d x %s
QEMU arguments of each guest (QEMU 10.1 or newer):
  -device '%s'
and, in front of it, for vfio-pci in the guest:
  x86-64: -M q35 -device intel-iommu,intremap=on,caching-mode=on
  arm64:  -M virt -device virtio-iommu-pci
host processes: open the socket's path as their device, as in
  ivshctl info --device %s
ready %s
`, c.Peers, c.Vectors, uint16(c.Protocol), c.Protocol, formatSize(c.StateTable), formatSize(c.ReadWrite), c.Peers, formatSize(c.Output),
		arg, path, path)
	return err
}
