package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/ivshsock"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/urfave/cli/v2"
)

func (p *program) serveCommand() *cli.Command {
	return command(0, &cli.Command{
		Name:  "serve",
		Usage: "serve a link to guests of QEMU 10.1 or newer, and to host processes",
		Description: `Runs in the foreground until it is interrupted; all peers connect to one
socket. It must outlive its guests: QEMU does not connect again. A guest with
the device must not be migrated: QEMU does not refuse, but leaves the device
out. Arrivals and departures are logged on standard error, and on SIGUSR1 what
the service uses. docs/link.md tells more about the kinds of peers, and about
who may join.

Other forms of the device, for drivers and systems that need them, can be
combined. --intx has a price under QEMU: it deviates from the specification
(Interrupt Status is set, or Linux would not see the interrupt), and from the
first interrupt on each access to shared memory takes some 60 us, until the
guest is reset.

Example: ivshctl serve --socket /run/link0 --peers 3 --rw 16M --output 0`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "socket", Aliases: []string{"S"}, Usage: "`PATH` of the link's socket (required)"},
			&cli.UintFlag{Name: "peers", Usage: "number of peers, 2 to 65536", Value: 2},
			&cli.UintFlag{Name: "vectors", Usage: "interrupt vectors of each peer, 1 to 2048", Value: 4},
			&cli.StringFlag{Name: "protocol", Usage: "protocol `TYPE`, 0 to 0xffff; virtio types give peer 0 the back-end", Value: "0"},
			&cli.StringFlag{Name: "state-table", Usage: "`SIZE` of the State Table (default: the smallest that fits)"},
			&cli.StringFlag{Name: "rw", Usage: "`SIZE` of the R/W section, may be 0; with --ivshmem2-socket the default is more, up to a power of two in all", Value: "1M"},
			&cli.StringFlag{Name: "output", Usage: "`SIZE` of each peer's output section, may be 0", Value: "256K"},
			&cli.StringFlag{Name: "mode", Usage: "what guests map directly: state (all but the State Table), shared (all), or strict (the R/W section and their own output section)", Value: "state"},
			&cli.StringFlag{Name: "ivshmem2-socket", Usage: "`PATH` of a further socket of the link, for QEMUs that carry the ivshmem2 device of 2020"},
			&cli.StringFlag{Name: "memory", Usage: "`NAME` of a POSIX shared memory object, or a path, to use as the memory (default: memory without a name)"},
			&cli.StringFlag{Name: "huge-pages", Usage: "`SIZE` of the pages to make the memory of, such as 2M (default: ordinary ones)"},
			&cli.BoolFlag{Name: "quiet", Usage: "log problems only"},
			&cli.BoolFlag{Name: "intx", Usage: "an interrupt pin in place of MSI-X, and so a single vector"},
			&cli.BoolFlag{Name: "io-registers", Usage: "registers in I/O space"},
			&cli.StringFlag{Name: "base-address", Usage: "no BAR2: further QEMU arguments put the memory, all of it writable, at the guest-physical `ADDRESS`, such as 4G in x86-64 guests of up to 2 GiB"},
		}, joinFlags...),
		Action: func(c *cli.Context) error {
			if c.String("socket") == "" {
				return usagef("serve: expected --socket PATH")
			}
			config, err := linkConfig(c)
			if err != nil {
				return err
			}
			options, err := deviceOptions(c, &config)
			if err != nil {
				return err
			}
			level := slog.LevelInfo
			if c.Bool("quiet") {
				level = slog.LevelWarn
			}
			out := newLogWriter(p.err)
			defer out.Close()
			s := &service{
				config: config, options: options,
				socket: c.String("socket"), ivshmem2: c.String("ivshmem2-socket"),
				log: slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level})),
			}
			s.ready = func(l *link.Link) error { return p.announce(s, l) }
			if err := s.join(c); err != nil {
				return err
			}
			return s.run(c.Context)
		},
	})
}

// deviceOptions reads what form the device has.
func deviceOptions(c *cli.Context, config *link.Config) (pcidev.Options, error) {
	o := pcidev.Options{INTx: c.Bool("intx"), IORegisters: c.Bool("io-registers")}
	var err error
	if o.Mode, err = pcidev.ParseMode(c.String("mode")); err != nil {
		return o, usageError{err}
	}
	if o.INTx && !c.IsSet("vectors") {
		config.Vectors = 1
	}
	if v := c.String("base-address"); v != "" {
		if o.BaseAddress, err = parseSize("--base-address", v); err != nil {
			return o, err
		}
		if o.BaseAddress == 0 {
			return o, usagef("--base-address: expected an address above 0")
		}
		if c.IsSet("mode") && o.Mode != pcidev.ModeShared {
			return o, usagef("--mode %s: expected shared, as all of the memory is mapped where there is no BAR2 (--base-address)", c.String("mode"))
		}
		o.Mode = pcidev.ModeShared
	}
	if o.Mode == pcidev.ModeStrict && c.String("ivshmem2-socket") != "" {
		return o, usagef("--mode strict: expected no --ivshmem2-socket beside it, as its clients map all of the memory and are not told of the mode")
	}
	if err := o.Check(*config); err != nil {
		return o, usageError{err}
	}
	return o, nil
}

func linkConfig(c *cli.Context) (link.Config, error) {
	var config link.Config
	if n := c.Uint("peers"); n < regs.MinPeers || n > regs.PeersMax {
		return config, usagef("--peers: expected 2 to %d, found %d", regs.PeersMax, n)
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
		{"huge-pages", &config.HugePages},
		{"state-table", &config.StateTable}, {"rw", &config.ReadWrite}, {"output", &config.Output},
	} {
		if v := c.String(s.flag); v != "" {
			if *s.size, err = parseSize("--"+s.flag, v); err != nil {
				return config, err
			}
			if page := config.HugePages; page > 0 && !c.IsSet(s.flag) {
				*s.size = (*s.size + page - 1) / page * page
			}
		}
	}
	config.File = memoryFile(c.String("memory"))
	if c.String("ivshmem2-socket") != "" && !c.IsSet("rw") {
		// The size that its clients work out.
		if config.ReadWrite, err = ivshsock.ReadWrite(config.Peers, config.Output, config.ReadWrite); err != nil {
			return config, usageError{err}
		}
	}
	if _, err := config.Layout(); err != nil {
		return config, usageError{err}
	}
	return config, nil
}

// announce prints what the link is, and how to give it to a guest.
func (p *program) announce(s *service, l *link.Link) error {
	c, o := l.Config(), s.options
	path, err := filepath.Abs(s.socket)
	if err != nil {
		return err
	}
	ready := path
	if s.perPeer {
		path += ".0"
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
	rest := fmt.Sprintf(`and, in front of it, for vfio-pci in the guest:
  x86-64: -M q35 -device intel-iommu,intremap=on,caching-mode=on
  arm64:  -M virt -device virtio-iommu-pci
host processes: open the socket's path as their device, as in
  ivshctl info --device %s`, path)
	if o.BaseAddress != 0 {
		rest = memoryArguments(l, o.BaseAddress)
	}
	if s.perPeer {
		rest += fmt.Sprintf("\nthe socket of peer 0 is %s, of the last peer %s.%d", path, ready, c.Peers-1)
	}
	if s.ivshmem2 != "" {
		rest += fmt.Sprintf("\nQEMUs that carry the ivshmem2 device of 2020, and others that speak its protocol: %s", s.ivshmem2)
	}
	_, err = fmt.Fprintf(p.out, `link: %d peers, %d vectors, protocol %04Xh (%v), State Table %s, R/W section %s, output sections %d x %s
QEMU arguments of each guest (QEMU 10.1 or newer):
  -device '%s'
%s
ready %s
`, c.Peers, c.Vectors, uint16(c.Protocol), c.Protocol, formatSize(c.StateTable), formatSize(c.ReadWrite), c.Peers, formatSize(c.Output),
		arg, rest, ready)
	return err
}

// memoryArguments are the QEMU arguments that map the shared memory at an
// address outside of the guest's RAM. A virtio-pmem device does that without
// the guest's help. It is put where no guest looks for a device, at a function
// above 0 of a slot without a function 0, so that no driver takes the memory.
func memoryArguments(l *link.Link, address uint64) string {
	file := l.Config().File
	if file == "" {
		file = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), l.FD())
	}
	return fmt.Sprintf(`  -object memory-backend-file,id=ivshmem%[3]x,share=on,size=%[1]d,mem-path=%[2]s
  -device virtio-pmem-pci,memdev=ivshmem%[3]x,memaddr=%#[3]x,addr=0x1d.7
with slot 1dh free, and room for the memory above the RAM (as in -m 1G,maxmem=4G;
QEMU says which addresses are usable if this one is not)
driver in the guest: uio_ivshmem, no other; host processes: none`, l.Layout().Total(), file, address)
}
