package main

import (
	"context"
	"errors"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
	virtionet "github.com/ivshmem-go/ivshmem/virtio/net"
	"github.com/ivshmem-go/ivshmem/vnet/tap"
)

// netCard is what `net status` knows of the network card that the other peer
// has.
type netCard struct {
	Driver    bool         `json:"driver"` // the peer uses it
	Malformed uint64       `json:"dropped_malformed"`
	Oversized uint64       `json:"dropped_oversized"`
	Virtio    virtio.Stats `json:"virtio"`
}

func (n *netCard) print(row func(name, format string, args ...any), f tap.Stats) {
	row("  virtio", "%d sessions, %d resets", n.Virtio.Sessions, n.Virtio.Resets)
	row("  sent", "%d frames", f.Sent)
	row("  received", "%d frames", f.Received)
	if d := n.Oversized + f.NoCarrier; d > 0 {
		row("  not sent", "%d: %d longer than the peer takes, %d without carrier", d, n.Oversized, f.NoCarrier)
	}
	if d := n.Malformed + f.Down + f.Refused; d > 0 {
		row("  not received", "%d: %d with a bad header, %d while down, %d refused by the kernel", d, n.Malformed, f.Down, f.Refused)
	}
	if n.Virtio.LastViolation != "" {
		row("  last violation", "%s", n.Virtio.LastViolation)
	}
}

// tapPort is an interface as the port of a network card.
type tapPort struct{ *tap.Packets }

func (p tapPort) Begin(ctx context.Context, o virtionet.Offloads) error {
	return p.Packets.Begin(ctx, tap.Offloads(o))
}

// netUpVirtio joins an interface to a network card that the other peer has.
func (p *program) netUpVirtio(c *cli.Context, d *ivshmem.Device, config tap.Config) error {
	if c.IsSet("pcap") {
		return usagef("--pcap: expected a link of protocol type 0001h; with virtio capture on the interface, with tcpdump -i")
	}
	if err := rightEnd(d, virtionet.ID, true); err != nil {
		return err
	}
	mac, err := macAddress(c, "peer-mac")
	if err != nil {
		return err
	}
	t, err := tap.Open(config)
	if err != nil {
		return err
	}
	defer t.Close()
	packets, err := t.Packets()
	if err != nil {
		return err
	}
	a, err := t.Attributes()
	if err != nil {
		return err
	}
	var drops virtionet.Drops
	card, err := virtionet.Device(d, tapPort{packets}, virtionet.Config{MAC: mac, MTU: a.MTU, Drops: &drops})
	if err != nil {
		return err
	}
	b, err := virtio.NewBackEnd(d, card)
	if err != nil {
		return err
	}
	status := func() any {
		s := netStatusOf(d, t)
		s.Card = &netCard{packets.Carrier(), drops.Malformed.Load(), drops.Oversized.Load(), b.Stats()}
		return s
	}
	return p.netRun(c.Context, t, nil, status, func(ctx context.Context) error {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		followed := make(chan struct{})
		go func() {
			defer close(followed)
			wasUp, was := true, a.MTU // as the card begins
			cancel(t.Follow(ctx, func(up bool, mtu int) (err error) {
				if mtu != was {
					err = virtionet.SetMTU(b, mtu)
				}
				if up != wasUp {
					err = errors.Join(err, virtionet.SetLink(b, up))
				}
				wasUp, was = up, mtu
				return err
			}))
		}()
		err := b.Serve(ctx)
		cancel(err)
		<-followed
		return context.Cause(ctx)
	})
}
