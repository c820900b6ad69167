package vfiouser

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"

	"github.com/ivshmem-go/ivshmem/internal/fdpass"
	"github.com/ivshmem-go/ivshmem/vfiouser/internal/wire"
	"golang.org/x/sys/unix"
)

// Bounds on what a server may say, where the protocol has none. Those on the
// device are QEMU's.
const (
	maxRegions    = 100
	maxIRQTypes   = 50
	maxRegionInfo = 64 << 10 // payload of DEVICE_GET_REGION_INFO, bytes
	firstInfoSize = 1024     // enough for 61 areas
)

// DeviceInfo is what the server says about the device.
type DeviceInfo struct {
	Reset      bool // DEVICE_RESET works
	PCI        bool // a PCI device: the regions and interrupts of this package
	NumRegions uint32
	NumIRQs    uint32 // interrupt types
}

// Info asks for the device's kind and sizes (DEVICE_GET_INFO).
func (c *Client) Info() (DeviceInfo, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begin()
	c.out = wire.DeviceInfo{Argsz: wire.InfoSize}.Append(c.out)
	p, _, err := c.call(wire.DeviceGetInfo, nil, wire.InfoSize, 0)
	if err != nil {
		return DeviceInfo{}, err
	}
	d, ok := wire.DecodeDeviceInfo(p)
	if !ok || d.Argsz < wire.InfoSize || d.NumRegions > maxRegions || d.NumIRQs > maxIRQTypes {
		return DeviceInfo{}, c.violation(wire.DeviceGetInfo,
			fmt.Sprintf("%d bytes, at most %d regions and %d interrupt types", wire.InfoSize, maxRegions, maxIRQTypes),
			fmt.Sprintf("%d bytes, %+v", len(p), d))
	}
	return DeviceInfo{
		Reset:      d.Flags&wire.DeviceFlagReset != 0,
		PCI:        d.Flags&wire.DeviceFlagPCI != 0,
		NumRegions: d.NumRegions,
		NumIRQs:    d.NumIRQs,
	}, nil
}

// Region asks for a region (DEVICE_GET_REGION_INFO). One that is not
// implemented has size 0. RegionMmap is set only if the server sent the file,
// and all areas are page-aligned, apart from each other, inside the region and
// inside the file, a regular one, at its present size. The server can still
// make the file shorter, unless the file is sealed: whoever maps it has to
// check that (F_GET_SEALS, fcntl(2)).
func (c *Client) Region(index uint32) (Region, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	argsz := uint32(firstInfoSize)
	for range 3 {
		p, fds, err := c.regionInfo(index, argsz)
		if err != nil {
			return Region{FD: -1}, err
		}
		info, ok := wire.DecodeRegionInfo(p)
		if ok && info.Argsz > argsz && info.Argsz <= maxRegionInfo {
			fdpass.CloseAll(fds) // a server should not send it with a short answer
			argsz = info.Argsz
			continue
		}
		r, why := checkRegion(p, info, index, fds)
		if why != "" {
			fdpass.CloseAll(fds)
			return Region{FD: -1}, c.violation(wire.RegionGetInfo, why, fmt.Sprintf("%+v, %d bytes in all", info, len(p)))
		}
		if r.FD < 0 {
			fdpass.CloseAll(fds)
		}
		return r, nil
	}
	return Region{FD: -1}, c.violation(wire.RegionGetInfo, "the whole answer once the room it asked for is there", "a call for more")
}

// regionInfo is one DEVICE_GET_REGION_INFO. c.mu is held.
func (c *Client) regionInfo(index, argsz uint32) ([]byte, []int, error) {
	c.begin()
	c.out = wire.RegionInfo{Argsz: argsz, Index: index}.Append(c.out)
	return c.call(wire.RegionGetInfo, nil, int(argsz), 1)
}

// checkRegion checks a reply's payload p, whose fixed part is info. It returns
// what was expected where the reply is wrong. r.FD is fds[0] or -1.
func checkRegion(p []byte, info wire.RegionInfo, index uint32, fds []int) (r Region, why string) {
	r = Region{Flags: RegionFlags(info.Flags) & (RegionRead | RegionWrite | RegionMmap), Size: info.Size, FD: -1}
	mappable := r.Flags&RegionMmap != 0 && r.Size > 0 && len(fds) == 1
	if !mappable {
		r.Flags &^= RegionMmap
	}
	switch {
	case len(p) < wire.RegionInfoSize:
		return r, fmt.Sprintf("at least %d bytes", wire.RegionInfoSize)
	case uint64(info.Argsz) > uint64(len(p)):
		return r, "argsz as large as the answer"
	case info.Argsz < wire.RegionInfoSize:
		return r, fmt.Sprintf("argsz of at least %d", wire.RegionInfoSize)
	case info.Index != index:
		return r, fmt.Sprintf("region %d", index)
	}
	var areas []wire.Area
	found := false
	if info.Flags&wire.RegionFlagCaps != 0 {
		var ok bool
		if areas, found, ok = wire.DecodeSparseMmap(p, info.CapOffset); !ok {
			return r, "a chain of capabilities inside the answer, with at most one sparse mmap capability of version 1"
		}
	}
	if !mappable {
		return r, ""
	}
	if !found {
		areas = []wire.Area{{Offset: 0, Size: info.Size}}
	}
	if len(areas) == 0 { // all of it is trapped
		r.Flags &^= RegionMmap
		return r, ""
	}
	if why := checkAreas(areas, info, fds[0]); why != "" {
		return r, why
	}
	if found {
		r.Areas = make([]Area, len(areas))
		for i, a := range areas {
			r.Areas[i] = Area(a)
		}
	}
	r.FD, r.FileOffset = fds[0], info.Offset
	return r, ""
}

func checkAreas(areas []wire.Area, info wire.RegionInfo, fd int) string {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size < 0 {
		return "the descriptor of a regular file"
	}
	page := uint64(os.Getpagesize())
	if info.Offset > math.MaxInt64 || info.Offset%page != 0 {
		return "a page-aligned file offset below 2^63"
	}
	sorted := slices.SortedFunc(slices.Values(areas), func(a, b wire.Area) int { return cmp.Compare(a.Offset, b.Offset) })
	end := uint64(0) // of the areas before
	for _, a := range sorted {
		switch {
		case a.Size == 0 || a.Offset%page != 0 || a.Size%page != 0:
			return "page-aligned areas that are not empty"
		case a.Offset > info.Size || a.Size > info.Size-a.Offset:
			return "areas inside the region"
		case a.Offset < end:
			return "areas that do not overlap"
		}
		end = a.Offset + a.Size
	}
	if size := uint64(st.Size); info.Offset > size || end > size-info.Offset {
		return fmt.Sprintf("areas inside the file of %d bytes", st.Size)
	}
	return ""
}

// ReadRegion reads len(p) bytes at offset of the region (REGION_READ). An
// access that the server can take in one message is one access for the device,
// so registers are read with their own width. Nothing is sent for an empty p.
func (c *Client) ReadRegion(index uint32, offset uint64, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(p) > 0 {
		n := min(len(p), c.maxTransfer)
		want := wire.RegionAccess{Offset: offset, Region: index, Count: uint32(n)}
		c.begin()
		c.out = want.Append(c.out)
		reply, _, err := c.call(wire.RegionRead, nil, wire.AccessSize+n, 0)
		if err != nil {
			return err
		}
		if err := c.checkAccess(wire.RegionRead, want, reply, len(reply)-wire.AccessSize); err != nil {
			return err
		}
		copy(p, reply[wire.AccessSize:])
		p, offset = p[n:], offset+uint64(n)
	}
	return nil
}

// WriteRegion writes p at offset of the region (REGION_WRITE), with the
// widths of ReadRegion. When it returns, the device has taken the value.
func (c *Client) WriteRegion(index uint32, offset uint64, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(p) > 0 {
		n := min(len(p), c.maxTransfer)
		want := wire.RegionAccess{Offset: offset, Region: index, Count: uint32(n)}
		c.begin()
		c.out = want.Append(c.out)
		copy(c.room(n), p)
		reply, _, err := c.call(wire.RegionWrite, nil, wire.AccessSize, 0)
		if err != nil {
			return err
		}
		if err := c.checkAccess(wire.RegionWrite, want, reply, n); err != nil {
			return err
		}
		p, offset = p[n:], offset+uint64(n)
	}
	return nil
}

// checkAccess compares the reply to a region access with its request. data is
// the number of bytes that it proves to have transferred.
func (c *Client) checkAccess(cmd wire.Command, want wire.RegionAccess, reply []byte, data int) error {
	got, ok := wire.DecodeRegionAccess(reply)
	if ok && got == want && data == int(want.Count) {
		return nil
	}
	return c.violation(cmd, fmt.Sprintf("%+v and all its data", want), fmt.Sprintf("%+v, %d bytes in all", got, len(reply)))
}

// IOFDs asks for the eventfds that stand for writes to a region
// (DEVICE_GET_REGION_IO_FDS) and returns those that can replace a plain
// write: with a descriptor, of type 0, a width of 0, 1, 2, 4 or 8 bytes, no
// flag but "data match". The descriptors are the caller's; entries may share
// one, which is then closed once. Eventfds of a server that is not trusted may
// block.
func (c *Client) IOFDs(index uint32) ([]IOFD, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, fds, err := c.regionInfo(index, wire.RegionInfoSize)
	if err != nil {
		return nil, err
	}
	fdpass.CloseAll(fds)
	info, ok := wire.DecodeRegionInfo(p)
	if !ok || info.Index != index {
		return nil, c.violation(wire.RegionGetInfo, fmt.Sprintf("region %d", index), fmt.Sprintf("%+v, %d bytes in all", info, len(p)))
	}
	size := info.Size
	argsz := uint32(wire.IOFDsSize + wire.IOFDShadowEntry*fdpass.MaxFDs)
	p, fds, err = c.ioFDs(index, argsz)
	if err != nil {
		return nil, err
	}
	if r, ok := wire.DecodeRegionIOFDs(p); ok && r.Argsz > argsz && r.Argsz <= wire.MaxTransfer {
		fdpass.CloseAll(fds) // none should come with an answer that had no room
		if p, fds, err = c.ioFDs(index, r.Argsz); err != nil {
			return nil, err
		}
	}
	list, why := checkIOFDs(p, index, size, fds)
	if why != "" {
		fdpass.CloseAll(fds)
		return nil, c.violation(wire.RegionGetIOFDs, why, fmt.Sprintf("%d bytes, %d descriptors", len(p), len(fds)))
	}
	for _, fd := range fds {
		if !slices.ContainsFunc(list, func(f IOFD) bool { return f.FD == fd }) {
			unix.Close(fd)
		}
	}
	return list, nil
}

// ioFDs is one DEVICE_GET_REGION_IO_FDS. c.mu is held.
func (c *Client) ioFDs(index, argsz uint32) ([]byte, []int, error) {
	c.begin()
	c.out = wire.RegionIOFDs{Argsz: argsz, Index: index}.Append(c.out)
	return c.call(wire.RegionGetIOFDs, nil, int(argsz), fdpass.MaxFDs)
}

// checkIOFDs checks a reply and returns its usable entries, or what was
// expected where the reply is wrong.
func checkIOFDs(p []byte, index uint32, size uint64, fds []int) (list []IOFD, why string) {
	reply, ok := wire.DecodeRegionIOFDs(p)
	if !ok || reply.Index != index {
		return nil, fmt.Sprintf("%d bytes about region %d", wire.IOFDsSize, index)
	}
	entries, ok := wire.DecodeIOFDEntries(p, reply)
	if !ok {
		return nil, fmt.Sprintf("%d entries of %d or %d bytes", reply.Count, wire.IOFDEntrySize, wire.IOFDShadowEntry)
	}
	for _, e := range entries {
		if e.FDIndex != wire.NoIOFD && uint64(e.FDIndex) >= uint64(len(fds)) {
			return nil, "entries whose descriptors are there"
		}
		width := max(e.Size, 1)
		if e.Offset > size || width > size-e.Offset {
			return nil, fmt.Sprintf("entries inside the region of %d bytes", size)
		}
		if e.FDIndex == wire.NoIOFD || e.Type != wire.IOFDTypeEventFD || e.Flags&^wire.IOFDFlagDataMatch != 0 {
			continue
		}
		match := e.Flags&wire.IOFDFlagDataMatch != 0
		switch e.Size {
		case 1, 2, 4, 8:
		case 0:
			if match {
				continue // KVM has no such thing
			}
		default:
			continue
		}
		f := IOFD{Offset: e.Offset, Size: e.Size, Match: match, FD: fds[e.FDIndex]}
		if match {
			f.Data = e.DataMatch
		}
		list = append(list, f)
	}
	return list, ""
}
