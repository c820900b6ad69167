package vfiouser

import (
	"fmt"

	"github.com/ivshmem-go/ivshmem/vfiouser/internal/wire"
	"golang.org/x/sys/unix"
)

// maxVectors bounds the count of an interrupt type; PCI's largest is the 2048
// of MSI-X.
const maxVectors = 1 << 16

// IRQ asks for an interrupt type (DEVICE_GET_IRQ_INFO).
func (c *Client) IRQ(index uint32) (IRQ, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begin()
	c.out = wire.IRQInfo{Argsz: wire.InfoSize, Index: index}.Append(c.out)
	p, _, err := c.call(wire.IRQGetInfo, nil, wire.InfoSize, 0)
	if err != nil {
		return IRQ{}, err
	}
	r, ok := wire.DecodeIRQInfo(p)
	if !ok || r.Argsz < wire.InfoSize || r.Index != index || r.Count > maxVectors {
		return IRQ{}, c.violation(wire.IRQGetInfo,
			fmt.Sprintf("interrupt type %d with at most %d vectors", index, maxVectors),
			fmt.Sprintf("%d bytes, %+v", len(p), r))
	}
	return IRQ{Flags: IRQFlags(r.Flags), Count: r.Count}, nil
}

// SetIRQs sets, masks, unmasks or triggers interrupts (DEVICE_SET_IRQS); see
// IRQSet. The descriptors in s.FDs, none or Count, stay the caller's: the
// server gets its own. It sends as many messages as the server's limit of
// descriptors needs, and stops at the first that fails.
func (c *Client) SetIRQs(s IRQSet) error {
	req := wire.SetIRQs{Argsz: wire.SetIRQsSize, Index: s.Index, Start: s.Start, Count: s.Count}
	switch s.Action {
	case IRQMask:
		req.Flags = wire.IRQActionMask
	case IRQUnmask:
		req.Flags = wire.IRQActionUnmask
	case IRQTrigger:
		req.Flags = wire.IRQActionTrigger
	default:
		return fmt.Errorf("vfio-user %v: unknown action %d: %w", wire.DeviceSetIRQs, s.Action, unix.EINVAL)
	}
	switch {
	case s.EventFD && s.Bools == nil:
		req.Flags |= wire.IRQDataEventFD
	case s.Bools != nil && !s.EventFD:
		req.Flags |= wire.IRQDataBool
		req.Argsz += uint32(len(s.Bools))
	case s.Bools == nil:
		req.Flags |= wire.IRQDataNone
	default:
		return fmt.Errorf("vfio-user %v: both EventFD and Bools: %w", wire.DeviceSetIRQs, unix.EINVAL)
	}
	if n := uint64(len(s.FDs)); n != 0 && (!s.EventFD || n != uint64(s.Count)) {
		return fmt.Errorf("vfio-user %v: %d descriptors for %d vectors, with EventFD %v: %w",
			wire.DeviceSetIRQs, n, s.Count, s.EventFD, unix.EINVAL)
	}
	if s.Bools != nil && uint64(len(s.Bools)) != uint64(s.Count) || len(s.Bools) > wire.MaxTransfer {
		return fmt.Errorf("vfio-user %v: %d bytes in Bools for %d vectors: %w",
			wire.DeviceSetIRQs, len(s.Bools), s.Count, unix.EINVAL)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(s.FDs) == 0 {
		return c.setIRQs(req, s.Bools, nil)
	}
	if c.maxFDs == 0 {
		return fmt.Errorf("vfio-user %v: the server takes no descriptors: %w", wire.DeviceSetIRQs, unix.EOPNOTSUPP)
	}
	for fds := s.FDs; len(fds) > 0; {
		n := min(len(fds), c.maxFDs)
		req.Count = uint32(n)
		if err := c.setIRQs(req, nil, fds[:n]); err != nil {
			return err
		}
		req.Start += uint32(n)
		fds = fds[n:]
	}
	return nil
}

// setIRQs is one message. c.mu is held.
func (c *Client) setIRQs(req wire.SetIRQs, bools []byte, fds []int) error {
	c.begin()
	c.out = req.Append(c.out)
	c.out = append(c.out, bools...)
	_, _, err := c.call(wire.DeviceSetIRQs, fds, 0, 0)
	return err
}

// Reset puts the device's registers back to their reset values (DEVICE_RESET).
func (c *Client) Reset() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begin()
	_, _, err := c.call(wire.DeviceReset, nil, 0, 0)
	return err
}

// DMARegion is memory of the client that the device may reach.
type DMARegion struct {
	Address, Size uint64 // as the device addresses it, bytes
	Writable      bool
	// FD is the file behind the memory, at FileOffset; it stays the caller's.
	// Without one (-1) the server would have to send DMA_READ and DMA_WRITE,
	// which this client declines.
	FD         int
	FileOffset uint64
}

// DMAMap offers memory to the device (DMA_MAP).
func (c *Client) DMAMap(r DMARegion) error {
	req := wire.MapDMA{
		Argsz: wire.DMAMapSize, Flags: wire.DMAFlagRead,
		Address: r.Address, Size: r.Size,
	}
	if r.Writable {
		req.Flags |= wire.DMAFlagWrite
	}
	var fds []int
	if r.FD >= 0 {
		req.Offset, fds = r.FileOffset, []int{r.FD}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begin()
	c.out = req.Append(c.out)
	_, _, err := c.call(wire.DMAMap, fds, 0, 0)
	return err
}

// DMAUnmap takes back what DMAMap offered, by exactly its address and size
// (DMA_UNMAP). When it returns nil the device does not use the memory any more.
func (c *Client) DMAUnmap(address, size uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begin()
	req := wire.UnmapDMA{Argsz: wire.DMAUnmapSize, Address: address, Size: size}
	c.out = req.Append(c.out)
	p, _, err := c.call(wire.DMAUnmap, nil, wire.DMAUnmapSize, 0)
	if err != nil || len(p) == 0 { // a server without DMA may leave the payload out
		return err
	}
	if got, ok := wire.DecodeUnmapDMA(p); !ok || got.Address != address || got.Size != size {
		return c.violation(wire.DMAUnmap, fmt.Sprintf("%+v", req), fmt.Sprintf("%+v, %d bytes", got, len(p)))
	}
	return nil
}
