package vfiouser

import (
	"slices"

	"github.com/ivshmem-go/ivshmem/vfiouser/internal/wire"
	"golang.org/x/sys/unix"
)

// Each handler checks in the same order: the length of the payload before any
// field, then argsz, then indexes, then ranges in 64 bits. Bytes behind the
// fixed part are ignored unless the message has variable data, as in
// libvfio-user.

func (s *Server) deviceInfo(p []byte) error {
	req, ok := wire.DecodeDeviceInfo(p)
	if !ok || req.Argsz < wire.InfoSize {
		return unix.EINVAL
	}
	s.out = wire.DeviceInfo{
		Argsz:      wire.InfoSize,
		Flags:      wire.DeviceFlagReset | wire.DeviceFlagPCI,
		NumRegions: NumRegions,
		NumIRQs:    NumIRQs,
	}.Append(s.out)
	return nil
}

func (s *Server) regionInfo(p []byte) error {
	req, ok := wire.DecodeRegionInfo(p)
	if !ok || req.Argsz < wire.RegionInfoSize || req.Index >= NumRegions {
		return unix.EINVAL
	}
	r := &s.regions[req.Index]
	info := wire.RegionInfo{Argsz: wire.RegionInfoSize, Index: req.Index, Size: r.Size}
	if r.Size == 0 {
		s.out = info.Append(s.out)
		return nil
	}
	info.Flags = uint32(r.Flags & (RegionRead | RegionWrite | RegionMmap))
	info.Offset = r.FileOffset
	mappable := r.Flags&RegionMmap != 0
	sparse := mappable && len(r.Areas) > 0
	if sparse {
		info.Argsz += uint32(wire.SparseMmapSize(len(r.Areas)))
	}
	if req.Argsz < info.Argsz {
		// The short answer says how much room the full one needs. It has
		// neither capability nor descriptor: the client asks again.
		s.out = info.Append(s.out)
		return nil
	}
	if sparse {
		info.Flags |= wire.RegionFlagCaps
		info.CapOffset = wire.RegionInfoSize
	}
	s.out = info.Append(s.out)
	if sparse {
		areas := make([]wire.Area, len(r.Areas))
		for i, a := range r.Areas {
			areas[i] = wire.Area(a)
		}
		s.out = wire.AppendSparseMmap(s.out, areas)
	}
	if mappable && r.FD >= 0 && s.clientMaxFDs > 0 {
		s.outFDs = append(s.outFDs, r.FD)
	}
	return nil
}

func (s *Server) regionIOFDs(p []byte) error {
	req, ok := wire.DecodeRegionIOFDs(p)
	if !ok || req.Flags != 0 || req.Count != 0 ||
		req.Argsz < wire.IOFDsSize || req.Argsz > wire.MaxTransfer ||
		req.Index >= NumRegions || s.regions[req.Index].Size == 0 {
		return unix.EINVAL
	}
	list := s.dev.IOFDs(req.Index, s.clientMaxFDs)
	reply := wire.RegionIOFDs{
		Argsz: uint32(wire.IOFDsSize + wire.IOFDEntrySize*len(list)),
		Index: req.Index,
		Count: uint32(len(list)),
	}
	s.out = reply.Append(s.out)
	if req.Argsz < reply.Argsz {
		return nil // no room: the client asks again
	}
	for _, f := range list {
		e := wire.IOFDEntry{Offset: f.Offset, Size: f.Size, FDIndex: wire.NoIOFD}
		if f.Match {
			e.Flags, e.DataMatch = wire.IOFDFlagDataMatch, f.Data
		}
		if f.FD >= 0 {
			i := slices.Index(s.outFDs, f.FD)
			if i < 0 {
				i = len(s.outFDs)
				s.outFDs = append(s.outFDs, f.FD)
			}
			e.FDIndex = uint32(i)
		}
		s.out = e.Append(s.out)
	}
	if len(s.outFDs) > s.clientMaxFDs {
		return unix.E2BIG // the device was told the limit
	}
	return nil
}

// access checks the fixed part of a region access.
func (s *Server) access(p []byte) (a wire.RegionAccess, ok bool) {
	a, ok = wire.DecodeRegionAccess(p)
	if !ok || a.Count > wire.MaxTransfer || a.Region >= NumRegions {
		return a, false
	}
	size := s.regions[a.Region].Size
	return a, size > 0 && a.Offset <= size && uint64(a.Count) <= size-a.Offset
}

func (s *Server) regionRead(p []byte) error {
	a, ok := s.access(p)
	if !ok {
		return unix.EINVAL
	}
	s.out = a.Append(s.out)
	if a.Count == 0 {
		return nil
	}
	data := s.grow(int(a.Count))
	clear(data) // a device that forgets a byte must not send an older reply's
	return s.dev.ReadRegion(a.Region, a.Offset, data)
}

func (s *Server) regionWrite(p []byte) error {
	a, ok := s.access(p)
	if !ok || len(p)-wire.AccessSize != int(a.Count) {
		return unix.EINVAL
	}
	s.out = a.Append(s.out)
	if a.Count == 0 {
		return nil
	}
	return s.dev.WriteRegion(a.Region, a.Offset, p[wire.AccessSize:])
}

func (s *Server) irqInfo(p []byte) error {
	req, ok := wire.DecodeIRQInfo(p)
	if !ok || req.Argsz < wire.InfoSize || req.Index >= NumIRQs {
		return unix.EINVAL
	}
	irq := s.dev.IRQ(req.Index)
	s.out = wire.IRQInfo{
		Argsz: wire.InfoSize, Flags: uint32(irq.Flags), Index: req.Index, Count: irq.Count,
	}.Append(s.out)
	return nil
}

func (s *Server) setIRQs(p []byte) error {
	set, ok := s.decodeIRQSet(p)
	if !ok {
		return unix.EINVAL
	}
	if set.EventFD && set.Action != IRQTrigger {
		// An eventfd by which the client would mask or unmask (it is KVM's way
		// to tell the end of a level interrupt) or be told so. Refused, as
		// nobody here would listen to it: QEMU then sends messages instead.
		// To take such a descriptor away is always possible.
		if len(set.FDs) > 0 {
			return unix.EINVAL
		}
		return nil
	}
	if err := s.dev.SetIRQs(set); err != nil {
		return err
	}
	s.fds = nil // the device's now
	return nil
}

// decodeIRQSet checks everything that IRQSet promises.
func (s *Server) decodeIRQSet(p []byte) (set IRQSet, ok bool) {
	req, ok := wire.DecodeSetIRQs(p)
	if !ok || req.Argsz < wire.SetIRQsSize || req.Index >= NumIRQs {
		return set, false
	}
	set = IRQSet{Index: req.Index, Start: req.Start, Count: req.Count}
	const types = wire.IRQDataNone | wire.IRQDataBool | wire.IRQDataEventFD
	switch req.Flags &^ types {
	case wire.IRQActionMask:
		set.Action = IRQMask
	case wire.IRQActionUnmask:
		set.Action = IRQUnmask
	case wire.IRQActionTrigger:
		set.Action = IRQTrigger
	default:
		return set, false
	}
	number := s.dev.IRQ(req.Index).Count
	if req.Start >= number || uint64(req.Start)+uint64(req.Count) > uint64(number) {
		return set, false
	}
	if (req.Index == IRQError || req.Index == IRQRequest) && set.Action != IRQTrigger {
		return set, false
	}
	if req.Count == 0 && (req.Start != 0 || req.Flags != wire.IRQActionTrigger|wire.IRQDataNone) {
		return set, false
	}
	switch req.Flags & types {
	case wire.IRQDataNone:
	case wire.IRQDataBool:
		bools := p[wire.SetIRQsSize:]
		if uint64(len(bools)) != uint64(req.Count) || uint64(req.Argsz) < wire.SetIRQsSize+uint64(req.Count) {
			return set, false
		}
		set.Bools = slices.Clone(bools) // the device may keep it
	case wire.IRQDataEventFD:
		if len(s.fds) != 0 && uint64(len(s.fds)) != uint64(req.Count) {
			return set, false
		}
		set.EventFD = true
		set.FDs = slices.Clone(s.fds)
		return set, true
	default:
		return set, false
	}
	return set, len(s.fds) == 0
}

// dmaMap acknowledges: a server without DMA needs no memory of its client.
func (s *Server) dmaMap(p []byte) error {
	m, ok := wire.DecodeMapDMA(p)
	const needFD = wire.DMAFlagMmap | wire.DMAFlagFileIO
	if !ok || m.Argsz < wire.DMAMapSize ||
		m.Flags&^(wire.DMAFlagRead|wire.DMAFlagWrite|needFD) != 0 ||
		m.Flags&needFD != 0 && len(s.fds) == 0 || len(s.fds) > 1 {
		return unix.EINVAL
	}
	return nil
}

func (s *Server) dmaUnmap(p []byte) error {
	u, ok := wire.DecodeUnmapDMA(p)
	if !ok || u.Argsz < wire.DMAUnmapSize || u.Argsz > wire.MaxTransfer {
		return unix.EINVAL
	}
	switch u.Flags {
	case 0:
	case wire.DMAUnmapFlagAll:
		if u.Address != 0 || u.Size != 0 {
			return unix.EINVAL
		}
	default: // a dirty bitmap too: nothing is tracked
		return unix.EINVAL
	}
	s.out = u.Append(s.out)
	return nil
}
