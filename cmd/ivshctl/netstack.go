package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem/vnet"
	"github.com/ivshmem-go/ivshmem/vnet/netstack"
)

// stackFlags are those of commands with TCP/IP of their own.
func stackFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{deviceFlag,
		&cli.StringSliceFlag{Name: "address", Usage: "own `IP/BITS`, any number of times"},
		&cli.StringFlag{Name: "gateway", Usage: "`IP` of who knows the way to other networks"},
		macFlag, mtuFlag, pcapFlag}, more...)
}

// withStack runs f with TCP/IP on the link.
func (p *program) withStack(c *cli.Context, f func(context.Context, *vnet.Link, *netstack.Stack) error) (err error) {
	var config netstack.Config
	if config.Addresses, err = addresses(c); err != nil {
		return err
	}
	if len(config.Addresses) == 0 {
		return usagef("net %s: expected --address IP/BITS", c.Command.Name)
	}
	if s := c.String("gateway"); s != "" {
		if config.Gateway, err = netip.ParseAddr(s); err != nil {
			return usagef("--gateway %q: expected an IP address", s)
		}
	}
	if config.MAC, err = macAddress(c, "mac"); err != nil {
		return err
	}
	return p.withLink(c, func(ctx context.Context, frames *captures) error {
		s, err := netstack.New(frames.link, config)
		if err != nil {
			return err
		}
		defer s.Close()
		return f(ctx, frames.link, s)
	})
}

func (p *program) netForwardCommand() *cli.Command {
	return command(-1, &cli.Command{
		Name: "forward", Usage: "forward ports to and from the link's network, without an interface", ArgsUsage: "FROM TO [FROM TO…]",
		Description: `Needs no privilege: TCP/IP is in the program. Takes connections at FROM, joins
each with a new one to TO, until it is interrupted. net:HOST:PORT is in the
link's network, where this program has the addresses that it is given;
tcp:HOST:PORT and unix:PATH are this machine's. Without HOST it listens on all
addresses.

Example: ivshctl net forward --address 10.0.0.2/24 tcp:127.0.0.1:8080 net:10.0.0.1:80
         ivshctl net forward --address 10.0.0.2/24 net::22 tcp:127.0.0.1:22`,
		Flags: stackFlags(),
		Action: func(c *cli.Context) error {
			args := c.Args().Slice()
			if err := checkPairs("net forward", args); err != nil {
				return err
			}
			return p.withStack(c, func(ctx context.Context, _ *vnet.Link, s *netstack.Stack) error {
				x := forward{s}
				return p.relay(ctx, "net forward", args, x.listen, x.dialer)
			})
		},
	})
}

// forward finds what FROM and TO mean.
type forward struct{ stack *netstack.Stack }

func (f forward) listen(s string) (net.Listener, error) {
	network, address, _ := strings.Cut(s, ":")
	switch network {
	case "net":
		return f.stack.Listen("tcp", address)
	case "tcp", "unix":
		return net.Listen(network, address)
	}
	return nil, usagef("net forward: FROM %q: expected net:[HOST]:PORT, tcp:[HOST]:PORT or unix:PATH", s)
}

func (f forward) dialer(s string) (dialFunc, error) {
	network, address, _ := strings.Cut(s, ":")
	switch network {
	case "net":
		if host, _, err := net.SplitHostPort(address); err != nil || host == "" {
			break
		}
		return func(ctx context.Context) (net.Conn, error) { return f.stack.DialContext(ctx, "tcp", address) }, nil
	case "tcp", "unix":
		return func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}, nil
	}
	return nil, usagef("net forward: TO %q: expected net:IP:PORT, tcp:HOST:PORT or unix:PATH", s)
}

func (p *program) netPingCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "ping", Usage: "send echo requests into the link's network, without an interface", ArgsUsage: "IP",
		Description: `Needs no privilege: TCP/IP is in the program. Waits for the peer. The exit code
is 0 if all came back, else 5.

Example: ivshctl net ping --address 10.0.0.2/24 10.0.0.1`,
		Flags: stackFlags(
			&cli.UintFlag{Name: "count", Aliases: []string{"c"}, Usage: "how `MANY`", Value: 4},
			&cli.DurationFlag{Name: "interval", Aliases: []string{"i"}, Usage: "`TIME` between two", Value: time.Second},
			&cli.DurationFlag{Name: "timeout", Usage: "`TIME` to wait for the peer, and for each answer", Value: 5 * time.Second},
			&cli.IntFlag{Name: "size", Aliases: []string{"s"}, Usage: "`BYTES` of data", Value: 56}),
		Action: func(c *cli.Context) error {
			to, err := netip.ParseAddr(c.Args().First())
			if err != nil {
				return usagef("net ping: %q: expected an IP address", c.Args().First())
			}
			return p.withStack(c, func(ctx context.Context, link *vnet.Link, s *netstack.Stack) error {
				return p.ping(ctx, c, link, s, to)
			})
		},
	})
}

func (p *program) ping(ctx context.Context, c *cli.Context, link *vnet.Link, s *netstack.Stack, to netip.Addr) error {
	timeout := c.Duration("timeout")
	waiting, cancel := context.WithTimeout(ctx, timeout)
	err := link.WaitCarrier(waiting, true)
	cancel()
	if err != nil {
		return fmt.Errorf("no carrier: the peer does not run virtual Ethernet: its state is %v: %w", link.Stats().PeerState, err)
	}
	count, size := c.Uint("count"), c.Int("size")
	lost := uint(0)
	for i := range count {
		if i > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(c.Duration("interval")):
			}
		}
		waiting, cancel := context.WithTimeout(ctx, timeout)
		took, err := s.Ping(waiting, to, uint16(i), size)
		cancel()
		switch {
		case err == nil:
			fmt.Fprintf(p.out, "%d bytes from %v: sequence %d, %v\n", size, to, i, took.Round(time.Microsecond))
		case ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded):
			lost++
			fmt.Fprintf(p.out, "no answer from %v: sequence %d\n", to, i)
		default:
			return err
		}
	}
	if lost > 0 {
		return fmt.Errorf("%d of %d were not answered: %w", lost, count, context.DeadlineExceeded)
	}
	return nil
}
