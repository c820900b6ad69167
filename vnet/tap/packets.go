package tap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
)

// Packets is an interface as the port of a virtio network device: frames with
// the header of virtio 1.0 in front, of 12 bytes, little-endian, which the
// kernel writes and reads.
type Packets struct {
	t   *Interface
	ctx context.Context // of Begin
	// stop ends what wakes Read when the context ends.
	stop    func() bool
	carrier atomic.Bool
}

// packetLen is the size of the header.
const packetLen = 12

// Offloads is what the other side takes: frames without complete checksums, and
// long pieces of TCP streams.
type Offloads struct{ Checksum, TCP4, TCP6, ECN bool }

// Packets is another way to use the interface, in place of Run.
func (t *Interface) Packets() (*Packets, error) {
	for _, o := range []struct {
		request uint
		value   int
		what    string
	}{
		{unix.TUNSETVNETHDRSZ, packetLen, "headers of 12 bytes"},
		{unix.TUNSETVNETLE, 1, "little-endian headers"},
	} {
		if err := unix.IoctlSetPointerInt(t.fd, o.request, o.value); err != nil {
			return nil, fmt.Errorf("interface %s: %s: %w", t.name, o.what, err)
		}
	}
	if err := t.up(); err != nil {
		return nil, err
	}
	return &Packets{t: t}, nil
}

// Begin gives the interface carrier, for somebody who takes o. What it had to
// send before is dropped.
func (p *Packets) Begin(ctx context.Context, o Offloads) error {
	flags := 0
	for _, f := range []struct {
		on   bool
		flag int
	}{{o.Checksum, unix.TUN_F_CSUM}, {o.TCP4, unix.TUN_F_TSO4}, {o.TCP6, unix.TUN_F_TSO6}, {o.ECN && (o.TCP4 || o.TCP6), unix.TUN_F_TSO_ECN}} {
		if f.on {
			flags |= f.flag
		}
	}
	if err := unix.IoctlSetInt(p.t.fd, unix.TUNSETOFFLOAD, flags); err != nil {
		return fmt.Errorf("interface %s: offloads %#x: %w", p.t.name, flags, err)
	}
	if err := p.t.discard(); err != nil {
		return err
	}
	p.ctx = ctx
	p.stop = context.AfterFunc(ctx, func() { evfd.Signal(p.t.kick) })
	p.carrier.Store(true)
	p.t.setCarrier(true)
	return nil
}

// End takes the carrier away.
func (p *Packets) End() {
	p.stop()
	p.carrier.Store(false)
	p.t.setCarrier(false)
}

// Carrier reports whether somebody takes the packets.
func (p *Packets) Carrier() bool { return p.carrier.Load() }

// Read waits for a packet, until Begin's context ends.
func (p *Packets) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(p.t.fd, b)
		switch err {
		case nil:
			p.t.stats.sent.Add(1)
			return n, nil
		case unix.EAGAIN:
			if _, err := p.t.set.Wait(); err != nil {
				return 0, err
			}
			evfd.Drain(p.t.kick)
			if p.ctx.Err() != nil {
				return 0, context.Cause(p.ctx)
			}
		case unix.EINTR:
		default:
			return 0, p.t.over(err)
		}
	}
}

// Write takes a packet. One that the kernel does not want is dropped.
func (p *Packets) Write(b []byte) error {
	for {
		switch _, err := unix.Write(p.t.fd, b); err {
		case nil:
			p.t.stats.received.Add(1)
			return nil
		case unix.EINTR:
			continue
		case unix.EBADFD:
			return p.t.over(err)
		case unix.EIO:
			p.t.stats.down.Add(1)
			return nil
		default: // a packet that it does not understand, or no memory
			p.t.stats.refused.Add(1)
			return nil
		}
	}
}

// Follow tells, at first and at each change, whether the interface is up, and
// its MTU. It returns when the context ends, the interface is removed
// ([ErrRemoved]), or changed fails.
func (t *Interface) Follow(ctx context.Context, changed func(up bool, mtu int) error) error {
	for {
		a, err := t.Attributes()
		switch {
		case errors.As(err, new(netlink.LinkNotFoundError)):
			return fmt.Errorf("interface %s: %w", t.name, ErrRemoved)
		case err == nil:
			err = changed(a.Flags&net.FlagUp != 0, a.MTU)
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.events.changed:
		}
	}
}
