package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
	virtionet "github.com/ivshmem-go/ivshmem/virtio/net"
	"github.com/ivshmem-go/ivshmem/vnet"
	"github.com/ivshmem-go/ivshmem/vnet/tap"
)

func (p *program) netCommand() *cli.Command {
	return &cli.Command{
		Name: "net", Usage: "virtual Ethernet with the other peer, as ivshmem-net and virtio have it",
		Action: unknownCommand, OnUsageError: onUsageError,
		Subcommands: []*cli.Command{p.netUpCommand(), p.netStatusCommand(), p.netDownCommand(), p.netCaptureCommand(), p.netForwardCommand(), p.netPingCommand()},
	}
}

func (p *program) netUpCommand() *cli.Command {
	return command(0, &cli.Command{
		Name: "up", Usage: "join the link to an interface of the kernel, until it is interrupted",
		Description: `Makes a TAP interface, which ends with the command, or takes one that is there:
without privileges an interface that root made for the user
(ip tuntap add dev ivsh0 mode tap user USER). The interface has carrier while the
peer runs; taken down, and changed in its MTU, the link follows. The MTU has to
be that of the peer, which nothing checks.

On a link of protocol type 8001h, this is peer 0 and the other one has a virtio
network card, which Linux's driver virtio_ivshmem there shows as ethX. It is
told the interface's MTU.

Example: ivshctl serve --protocol 1 --peers 2 --vectors 2 --rw 0 --output 1M
         ivshctl net up --address 10.0.0.1/24
Example: ivshctl serve --protocol 0x8001 --peers 2 --vectors 3 --rw 4M --output 0
         ivshctl net up --address 10.0.0.1/24 --peer-mac 02:00:00:00:00:02`,
		Flags: []cli.Flag{deviceFlag,
			&cli.StringFlag{Name: "name", Usage: "`NAME` of the interface; %d is the first free number", Value: "ivsh%d"},
			&cli.StringSliceFlag{Name: "address", Usage: "`IP/BITS`, any number of times"},
			macFlag, mtuFlag, pcapFlag,
			&cli.StringFlag{Name: "peer-mac", Usage: "Ethernet `ADDRESS` of the other end's network card, for virtio (default: it makes one up)"}},
		Action: p.netUp,
	})
}

var (
	macFlag = &cli.StringFlag{Name: "mac", Usage: "own Ethernet `ADDRESS` (default: a random one)"}
	mtuFlag = &cli.IntFlag{Name: "mtu", Usage: "largest packet in `BYTES` (default: that of an interface that is there; else Linux's for the link)"}
)

func macAddress(c *cli.Context, flag string) (net.HardwareAddr, error) {
	s := c.String(flag)
	if s == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 {
		return nil, usagef("--%s %q: expected a unicast address such as 02:00:00:00:00:01", flag, s)
	}
	return mac, nil
}

func addresses(c *cli.Context) (all []netip.Prefix, err error) {
	for _, s := range c.StringSlice("address") {
		a, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, usagef("--address %q: expected an address such as 10.0.0.1/24", s)
		}
		all = append(all, a)
	}
	return all, nil
}

func (p *program) netUp(c *cli.Context) error {
	config := tap.Config{Name: c.String("name"), MTU: c.Int("mtu")}
	var err error
	if config.MAC, err = macAddress(c, "mac"); err != nil {
		return err
	}
	if config.Addresses, err = addresses(c); err != nil {
		return err
	}
	if config.MTU < 0 || config.MTU > tap.MaxMTU {
		return usagef("--mtu %d: expected at most %d", config.MTU, tap.MaxMTU)
	}
	d, err := ivshmem.Open(c.String("device"))
	if err != nil {
		return err
	}
	defer d.Close()
	if d.Protocol()&^regs.VirtioBackEnd == regs.ProtocolVirtio|virtionet.ID {
		return interrupted(p.netUpVirtio(c, d, config))
	}
	if c.IsSet("peer-mac") {
		return usagef("--peer-mac: expected a link of protocol type 8001h, found %04Xh", uint16(d.Protocol()))
	}
	return p.onLink(c, d, func(ctx context.Context, frames *captures) error {
		link := frames.link
		t, err := tap.Open(config)
		if err != nil {
			return err
		}
		defer t.Close()
		status := func() any {
			s := netStatusOf(d, t)
			stats := link.Stats()
			s.MTU, s.Link = link.MTU(), &stats
			return s
		}
		return p.netRun(ctx, t, frames, status, func(ctx context.Context) error { return t.Run(ctx, link) })
	})
}

// netRun runs an interface until the context ends, or somebody says so.
func (p *program) netRun(ctx context.Context, t *tap.Interface, frames *captures, status func() any, run func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	control := &control{name: t.Name(), down: cancel, captures: frames, status: status}
	if err := control.listen(); err != nil {
		return err
	}
	defer control.close()
	fmt.Fprintf(p.out, "ready %s\n", t.Name())
	return run(ctx)
}

// netStatus is what `net status` knows of an interface.
type netStatus struct {
	Interface string         `json:"interface"`
	MAC       string         `json:"mac,omitempty"`
	MTU       int            `json:"mtu"`
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	Process   int            `json:"process"`
	Device    string         `json:"device"`
	Driver    string         `json:"driver"`
	ID        uint32         `json:"id"`
	Frames    tap.Stats      `json:"interface_frames"`
	Link      *vnet.Stats    `json:"link,omitempty"`
	Card      *netCard       `json:"card,omitempty"`
	Error     string         `json:"error,omitempty"`
}

func netStatusOf(d *ivshmem.Device, t *tap.Interface) *netStatus {
	s := &netStatus{
		Interface: t.Name(), Process: os.Getpid(), Device: d.Address(), Driver: d.Driver(), ID: d.ID(), Frames: t.Stats(),
	}
	a, err := t.Attributes()
	if err == nil {
		s.Interface, s.MAC, s.MTU = a.Name, a.HardwareAddr.String(), a.MTU
		s.Addresses, err = t.Addresses()
	}
	if err != nil {
		s.Error = err.Error()
	}
	return s
}

func (p *program) netStatusCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "status", Usage: "show the interfaces that `net up` runs in this network name space", ArgsUsage: "[INTERFACE]",
		Flags: []cli.Flag{jsonFlag},
		Action: func(c *cli.Context) error {
			names, err := netNames(c)
			if err != nil {
				return err
			}
			all := []json.RawMessage{}
			for _, name := range names {
				b, err := askControl(name, "status")
				if err != nil {
					if c.NArg() == 0 {
						continue // it has just ended
					}
					return err
				}
				all = append(all, b)
			}
			if c.Bool("json") {
				return json.NewEncoder(p.out).Encode(all)
			}
			for i, b := range all {
				var s netStatus
				if err := json.Unmarshal(b, &s); err != nil {
					return fmt.Errorf("status of %s: %w", names[i], err)
				}
				if i > 0 {
					fmt.Fprintln(p.out)
				}
				s.print(p.out)
			}
			return nil
		},
	})
}

func (s *netStatus) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	carrier := "no carrier"
	if s.Link != nil && s.Link.Carrier || s.Card != nil && s.Card.Driver {
		carrier = "carrier"
	}
	row(s.Interface, "%s, %s, MTU %d, process %d", carrier, s.MAC, s.MTU, s.Process)
	if len(s.Addresses) > 0 {
		var list []string
		for _, a := range s.Addresses {
			list = append(list, a.String())
		}
		row("  addresses", "%s", strings.Join(list, " "))
	}
	row("  device", "%s (%s), peer %d", s.Device, s.Driver, s.ID)
	if s.Link != nil {
		s.printLink(row)
	} else if s.Card != nil {
		s.Card.print(row, s.Frames)
	}
	if s.Error != "" {
		row("  error", "%s", s.Error)
	}
	w.Flush()
}

func (s *netStatus) printLink(row func(name, format string, args ...any)) {
	row("  states", "%v, the peer %v", s.Link.State, s.Link.PeerState)
	sent, received := s.Link.Sent, s.Link.Received
	row("  sent", "%d frames, %d bytes, %d doorbells", sent.Frames, sent.Bytes, sent.Doorbells)
	row("  received", "%d frames, %d bytes, %d doorbells", received.Frames, received.Bytes, received.Doorbells)
	f := s.Frames
	if n := f.Truncated + f.NoCarrier + sent.Reset + sent.Lost; n > 0 {
		row("  not sent", "%d: %d longer than the MTU, %d without carrier, %d in a reset", n, f.Truncated, f.NoCarrier, sent.Reset+sent.Lost)
	}
	if n := received.Dropped() + f.Down + f.Refused; n > 0 {
		row("  not received", "%d: %d with a bad descriptor, %d while down, %d refused by the kernel", n, received.Dropped(), f.Down, f.Refused)
	}
	if r := s.Link.Resets; r != (vnet.ResetStats{}) {
		row("  resets", "%d by the peer, %d by taking it down, %d because of a violation", r.Peer, r.Down, r.Violation)
	}
	if s.Link.LastViolation != "" {
		row("  last violation", "%s", s.Link.LastViolation)
	}
}

func (p *program) netDownCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "down", Usage: "end a `net up`: yours, or any for root", ArgsUsage: "[INTERFACE]",
		Action: func(c *cli.Context) error {
			name, err := netName(c)
			if err != nil {
				return err
			}
			_, err = askControl(name, "down")
			return err
		},
	})
}

// netNames is the interface that is named, or all of them.
func netNames(c *cli.Context) ([]string, error) {
	if c.NArg() == 1 {
		return []string{c.Args().First()}, nil
	}
	return controlled()
}

// netName is the interface that is named, or the only one.
func netName(c *cli.Context) (string, error) {
	names, err := netNames(c)
	switch {
	case err != nil:
		return "", err
	case len(names) == 0:
		return "", fmt.Errorf("%w: no `ivshctl net up` runs in this network name space", ivshmem.ErrNotFound)
	case len(names) > 1:
		return "", usagef("%s: expected INTERFACE, one of %s", c.Command.Name, strings.Join(names, ", "))
	}
	return names[0], nil
}
