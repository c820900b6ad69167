package net

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// Offloads is what the driver leaves to do, and does itself, in both
// directions: to complete checksums, and to cut long pieces of TCP streams into
// frames.
type Offloads struct{ Checksum, TCP4, TCP6, ECN bool }

// Port is the other side of a network card. A frame has a header of
// [HeaderSize] in front of it.
type Port interface {
	// Begin is called when a driver is there. The port may read frames for
	// which it does what is in o until End, or until the context ends: then Read
	// fails.
	Begin(ctx context.Context, o Offloads) error
	End()
	// Read waits for a frame. Write takes one, which has been checked, or drops
	// it. They are called at the same time, and fail when the port is no more.
	Read(p []byte) (int, error)
	Write(p []byte) error
}

// Config of a network card.
type Config struct {
	// MAC is the Ethernet address that the driver uses, 6 bytes; nil: the
	// driver makes one up.
	MAC []byte
	// MTU is the largest packet of the driver in bytes, without the 14 of the
	// Ethernet header: 68 to 65535; 0: it is not told.
	MTU int
	// Drops is where dropped frames are counted; may be nil.
	Drops *Drops
}

// Drops counts frames that were dropped.
type Drops struct {
	// Malformed is those of the driver that it must not send.
	Malformed atomic.Uint64
	// Oversized is those that it does not take: longer than its buffers, or than
	// the frames that it said it takes.
	Oversized atomic.Uint64
}

const (
	etherLen = 14
	// MaxFrame is the most bytes of a frame without its header: a long piece of
	// a TCP stream, with a VLAN tag.
	MaxFrame = 65535 + etherLen + 4
	// longSection is the least section in bytes where long pieces of a TCP
	// stream find room.
	longSection = 1 << 20
)

// card is a device.
type card struct {
	port  Port
	drops *Drops
}

// Device is a network card for a link.
func Device(dev *ivshmem.Device, p Port, c Config) (virtio.Device, error) {
	if len(c.MAC) != 0 && (len(c.MAC) != 6 || c.MAC[0]&1 != 0) {
		return virtio.Device{}, fmt.Errorf("address %x: expected a unicast address of 6 bytes", c.MAC)
	}
	if c.MTU != 0 && (c.MTU < 68 || c.MTU > 65535) {
		return virtio.Device{}, fmt.Errorf("MTU %d: expected 68 to 65535", c.MTU)
	}
	d := &card{port: p, drops: c.Drops}
	if d.drops == nil {
		d.drops = new(Drops)
	}
	space := make([]byte, configSize)
	le := binary.LittleEndian
	le.PutUint16(space[configStatus:], statusLinkUp)
	features := featureChecksum | featureGuestChecksum | featureMergeBuffers | featureStatus
	if c.MAC != nil {
		features |= featureMAC
		copy(space[configMAC:], c.MAC)
	}
	if c.MTU != 0 {
		features |= featureMTU
		le.PutUint16(space[configMTU:], uint16(c.MTU))
	}
	section := dev.Sections().Layout.ReadWrite
	if section >= longSection {
		features |= featureGuestTCP4 | featureGuestTCP6 | featureGuestECN | featureHostTCP4 | featureHostTCP6 | featureHostECN
	}
	return virtio.Device{ID: ID, Features: features, Queues: queues(section), Config: space, Run: d.run}, nil
}

// queues is how many entries they have. Linux fills the receive queue with
// buffers, of up to a page each: a quarter of the section. What is sent is
// there for a moment only; but below 19 free entries Linux stops to send.
func queues(section uint64) []int {
	receive := min(max(section/4/4096, 4), 256)
	return []int{receiveQueue: 1 << (bits.Len64(receive) - 1), transmitQueue: 64}
}

// SetLink tells the driver whether the link is up. It is at first.
func SetLink(b *virtio.BackEnd, up bool) error {
	v := []byte{0, 0}
	if up {
		v[0] = statusLinkUp
	}
	return b.SetConfig(configStatus, v)
}

// SetMTU changes the MTU, where Config had one. A driver that is there keeps
// what it has.
func SetMTU(b *virtio.BackEnd, mtu int) error {
	return b.SetConfig(configMTU, binary.LittleEndian.AppendUint16(nil, uint16(mtu)))
}

// run moves frames until the session ends.
func (d *card) run(ctx context.Context, s *virtio.Session) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	guest := segmentsOf(s.Features(), featureGuestChecksum, featureGuestTCP4, featureGuestTCP6, featureGuestECN)
	host := segmentsOf(s.Features(), featureChecksum, featureHostTCP4, featureHostTCP6, featureHostECN)
	if err := d.port.Begin(ctx, Offloads{guest.checksum, guest.tcp4, guest.tcp6, guest.ecn}); err != nil {
		return err
	}
	defer d.port.End()
	var both sync.WaitGroup
	both.Go(func() { cancel(d.receive(ctx, s.Queue(receiveQueue), guest, s.Features().Has(featureMergeBuffers))) })
	both.Go(func() { cancel(d.transmit(ctx, s.Queue(transmitQueue), host)) })
	both.Wait()
	return context.Cause(ctx)
}

// segmentsOf is what features say. None is of use without checksums.
func segmentsOf(f, checksum, tcp4, tcp6, ecn virtio.Features) segments {
	s := segments{checksum: f.Has(checksum)}
	if s.checksum {
		s.tcp4, s.tcp6 = f.Has(tcp4), f.Has(tcp6)
		s.ecn = f.Has(ecn)
	}
	return s
}

// transmit moves frames from the driver to the port.
func (d *card) transmit(ctx context.Context, q *virtio.Queue, host segments) error {
	buf := make([]byte, HeaderSize+MaxFrame)
	for {
		c, err := q.Next(ctx)
		if err != nil {
			return err
		}
		n := c.Readable()
		if n < HeaderSize+etherLen || n > len(buf) {
			d.drops.Malformed.Add(1)
		} else {
			p := buf[:n]
			if _, err := c.ReadAt(p, 0); err != nil {
				return err
			}
			if h := decode(p); !h.check(n-HeaderSize, host) {
				d.drops.Malformed.Add(1)
			} else {
				h.put(p, 0)
				if err := d.port.Write(p); err != nil {
					return err
				}
			}
		}
		if err := q.Push(c, 0); err != nil {
			return err
		}
	}
}

// receive moves frames from the port to the driver, each into one of its
// buffers, or into several if it merges them.
func (d *card) receive(ctx context.Context, q *virtio.Queue, guest segments, merge bool) error {
	buf := make([]byte, HeaderSize+MaxFrame)
	r := &receiver{q: q, merge: merge}
	for {
		n, err := d.port.Read(buf)
		if err != nil {
			return err
		}
		p := buf[:n]
		if n < HeaderSize+etherLen {
			d.drops.Oversized.Add(1)
			continue
		}
		h := decode(p)
		valid := h.flags&flagDataValid != 0 && guest.checksum
		// What it made before the driver said what it takes.
		if !h.check(n-HeaderSize, guest) {
			d.drops.Oversized.Add(1)
			continue
		}
		if valid && h.flags == 0 {
			h.flags = flagDataValid
		}
		buffers, err := r.reserve(ctx, n)
		if err != nil {
			return err
		}
		if buffers == 0 {
			d.drops.Oversized.Add(1)
			continue
		}
		h.put(p, uint16(buffers))
		if err := r.push(p, buffers); err != nil {
			return err
		}
	}
}

// receiver has buffers that were taken for a frame.
type receiver struct {
	q       *virtio.Queue
	merge   bool
	chains  []*virtio.Chain
	written []int
}

// reserve takes buffers for n bytes, and returns how many those take; 0: they
// never fit.
func (r *receiver) reserve(ctx context.Context, n int) (int, error) {
	room := 0
	for i := 0; ; i++ {
		if i == len(r.chains) {
			c, err := r.q.Next(ctx)
			if err != nil {
				return 0, err
			}
			r.chains = append(r.chains, c)
		}
		room += r.chains[i].Writable()
		if room >= n {
			return i + 1, nil
		}
		if !r.merge || i+1 == r.q.Size() {
			return 0, nil
		}
	}
}

// push writes a frame to the first buffers, and returns those, all at once: the
// driver expects the rest of a frame where its beginning is.
func (r *receiver) push(p []byte, buffers int) error {
	r.written = r.written[:0]
	for _, c := range r.chains[:buffers] {
		n := min(c.Writable(), len(p))
		if _, err := c.WriteAt(p[:n], 0); err != nil {
			return err
		}
		r.written = append(r.written, n)
		p = p[n:]
	}
	if err := r.q.PushAll(r.chains[:buffers], r.written); err != nil {
		return err
	}
	r.chains = r.chains[:copy(r.chains, r.chains[buffers:])]
	return nil
}
