package tap

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/vnet"
)

// Tags of the set's descriptors.
const (
	tagKick = iota
	tagFrames
)

// flushEvery is how many frames the peer is left asleep for, while there are
// more to read. It has work from the first one on.
const flushEvery = 16

// Run brings the interface up and moves frames, until the context ends, the
// interface is removed ([ErrRemoved]), or the link is over. It returns why.
func (t *Interface) Run(ctx context.Context, link *vnet.Link) error {
	if err := t.follow(link); err != nil {
		return err
	}
	if err := t.up(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { evfd.Signal(t.kick) })()
	var all sync.WaitGroup
	for _, f := range []func(context.Context, *vnet.Link) error{t.send, t.receive, t.watch, t.carry} {
		all.Go(func() { cancel(f(ctx, link)) })
	}
	all.Wait()
	t.setCarrier(false)
	return context.Cause(ctx)
}

// up brings the interface up, if it is not.
func (t *Interface) up() error {
	a, err := t.Attributes()
	if err != nil {
		return err
	}
	if a.Flags&net.FlagUp != 0 {
		return nil
	}
	if err := netlink.LinkSetUp(&netlink.Dummy{LinkAttrs: *a}); err != nil {
		return fmt.Errorf("interface %s: bring it up: %w: run as root, or have root do that: ip link set %s up", t.name, err, t.name)
	}
	return nil
}

// follow gives the link the interface's MTU. Where that does not fit, the
// interface gets the link's.
func (t *Interface) follow(link *vnet.Link) error {
	a, err := t.Attributes()
	if err != nil {
		return err
	}
	if a.MTU != link.MTU() {
		if !t.fresh && link.SetMTU(a.MTU) == nil {
			return nil
		}
		t.fresh = false
		if err := netlink.LinkSetMTU(&netlink.Dummy{LinkAttrs: *a}, min(link.MTU(), MaxMTU)); err != nil {
			return fmt.Errorf("interface %s: MTU %d does not fit the link, which takes %d to %d; set it to %d: %w",
				t.name, a.MTU, vnet.MinMTU, link.Geometry().MaxMTU(), link.MTU(), err)
		}
	}
	return nil
}

// watch has the link follow the interface.
func (t *Interface) watch(ctx context.Context, link *vnet.Link) error {
	up := true
	return t.Follow(ctx, func(is bool, _ int) error {
		// It may have been renamed or moved to another name space, which is
		// all the same.
		if err := t.follow(link); err != nil || is == up {
			return err
		}
		up = is
		if up {
			return link.Up()
		}
		return link.Down()
	})
}

// carry has the interface follow the link's carrier.
func (t *Interface) carry(ctx context.Context, link *vnet.Link) error {
	for on := true; ; on = !on {
		if err := link.WaitCarrier(ctx, on); err != nil {
			return err
		}
		if err := t.setCarrier(on); err != nil && err != unix.EINVAL && err != unix.ENOTTY {
			return t.over(err)
		}
	}
}

// over is what the device file's error means.
func (t *Interface) over(err error) error {
	if err == unix.EBADFD {
		err = ErrRemoved
	}
	return fmt.Errorf("interface %s: %w", t.name, err)
}

// send moves frames from the interface to the link.
func (t *Interface) send(ctx context.Context, link *vnet.Link) error {
	slots := slotsOf(link)
	in := newSplitter(t.fd, t.move)
	unflushed := 0
	yielded := false
	for {
		n, err := slots.reserve(ctx, in.frames[:in.wanted()])
		switch {
		case err == nil:
		case errors.Is(err, vnet.ErrNoCarrier):
			in.rest = nil
			if err := t.discard(); err != nil {
				return err
			}
			if err := link.WaitCarrier(ctx, true); err != nil {
				return err
			}
			continue
		case recovers(err):
			continue
		default:
			return err
		}
		lengths, err := in.next(n)
		switch {
		case err == unix.EAGAIN:
			link.Flush()
			unflushed = 0
			if !yielded {
				// Whoever makes frames may be waiting for this CPU, and have more
				// of them: a sleep for each costs as much as a frame.
				yielded = true
				unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
				continue
			}
			yielded = false
			if _, err := t.set.Wait(); err != nil || ctx.Err() != nil {
				return errors.Join(err, context.Cause(ctx))
			}
			continue
		case err == errTruncated:
			t.stats.truncated.Add(1)
			continue
		case err != nil:
			return t.over(err)
		case len(lengths) == 1 && truncated(in.frames[0], lengths[0]):
			t.stats.truncated.Add(1)
			continue
		}
		switch err := slots.commit(ctx, in.frames[:len(lengths)], lengths); {
		case err == nil:
			t.stats.sent.Add(uint64(len(lengths)))
		case errors.Is(err, vnet.ErrNoCarrier):
			t.stats.noCarrier.Add(uint64(len(lengths)))
		case !recovers(err):
			return err
		}
		yielded = false
		if unflushed += len(lengths); unflushed >= flushEvery {
			link.Flush()
			unflushed = 0
		}
	}
}

// recovers reports whether the link goes on after an error, which it has
// counted.
func recovers(err error) bool {
	var violation *vnet.ViolationError
	var size *vnet.FrameSizeError
	return errors.Is(err, vnet.ErrReset) || errors.As(err, &violation) || errors.As(err, &size)
}

// truncated reports whether a frame filled p to its end, and has no tag that
// explains that it did: the kernel leaves out what does not fit.
func truncated(p []byte, n int) bool {
	if n < len(p) {
		return false
	}
	const (
		typeAt, tagLength = 12, 4
		vlan, serviceVLAN = 0x8100, 0x88a8
	)
	tag := func(at int) bool {
		t := binary.BigEndian.Uint16(p[at:])
		return t == vlan || t == serviceVLAN
	}
	return !tag(typeAt) || tag(typeAt+tagLength)
}

// discard drops what the interface has.
func (t *Interface) discard() error {
	var p [packetLen]byte // room for the header at least; the rest of a frame is dropped
	for {
		switch _, err := unix.Read(t.fd, p[:]); err {
		case nil:
			t.stats.noCarrier.Add(1)
		case unix.EAGAIN:
			return nil
		case unix.EINTR:
		default:
			return t.over(err)
		}
	}
}

// receive moves frames from the link to the interface.
func (t *Interface) receive(ctx context.Context, link *vnet.Link) error {
	slots := slotsOf(link)
	var failed error
	out := newMerger(t.fd, t.move, func(n int, err error) {
		switch err {
		case nil:
			t.stats.received.Add(uint64(n))
		case unix.EIO:
			t.stats.down.Add(uint64(n))
		case unix.EBADFD:
			failed = t.over(err)
		default: // frames that it does not understand, or no memory
			t.stats.refused.Add(uint64(n))
		}
	})
	out.most = t.most
	frames := make([][]byte, maxFrames)
	for failed == nil {
		n, err := slots.peek(ctx, frames)
		switch {
		case err == nil:
		case recovers(err):
			continue
		default:
			return err
		}
		out.write(frames[:n])
		if err := slots.release(n); err != nil && !recovers(err) {
			return err
		}
	}
	return failed
}
