package pcidev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// Mode says what of the shared memory is mapped into a guest. What is not
// mapped costs a message for each access, and is protected.
type Mode int

const (
	// ModeState keeps the State Table from being mapped: its accesses trap,
	// and writes to it have no effect. The default.
	ModeState Mode = iota
	// ModeShared maps all of the shared memory: everything at full speed, and
	// every peer can write every section.
	ModeShared
	// ModeStrict maps the R/W section and the peer's own output section only.
	// The Subsystem ID tells of it, [regs.SubsystemStrict]: a guest would not
	// notice, but that foreign output sections are slow.
	ModeStrict
)

// ParseMode reads a mode's name, "state", "shared" or "strict".
func ParseMode(s string) (Mode, error) {
	switch s {
	case "state":
		return ModeState, nil
	case "shared":
		return ModeShared, nil
	case "strict":
		return ModeStrict, nil
	}
	return 0, fmt.Errorf("mode %q: expected state, shared or strict", s)
}

// areas is what the mode maps into peer id: pieces of whole pages, none of
// them empty.
func (m Mode) areas(l shmem.Layout, id uint32) []vfiouser.Area {
	var pieces []vfiouser.Area
	switch m {
	case ModeShared:
		pieces = []vfiouser.Area{{Offset: 0, Size: l.Total()}}
	case ModeState:
		pieces = []vfiouser.Area{{Offset: l.StateTable, Size: l.Total() - l.StateTable}}
	case ModeStrict:
		pieces = []vfiouser.Area{
			{Offset: l.ReadWriteOffset(), Size: l.ReadWrite},
			{Offset: l.OutputOffset(id), Size: l.Output},
		}
	}
	return slices.DeleteFunc(pieces, func(a vfiouser.Area) bool { return a.Size == 0 })
}

// Options of a function. The last three are forms of the device that the
// specification allows besides the usual one: MSI-X, BAR2, and registers in
// memory space.
type Options struct {
	Mode      Mode
	Subsystem Subsystem // zero: 110A:4106, or 110A:4107 of a strict link, which is the only one it can have
	Pin       *uint32   // the peer ID to take; nil: the lowest that is free

	// INTx gives the device an interrupt pin in place of MSI-X, and so a
	// single vector. For the drivers of Linux, and against the specification,
	// Interrupt Status is set while an interrupt waits for Interrupt Disable.
	// QEMU stops mapping BAR2 after the first one: from then on every access
	// to the shared memory is a message.
	INTx bool
	// BaseAddress leaves BAR2 out: the vendor capability says that the shared
	// memory is at this guest-physical address, where QEMU has to be told to
	// map it, all of it. 0: BAR2.
	BaseAddress uint64
	// IORegisters puts BAR0 into I/O space.
	IORegisters bool
}

// Check says whether a link can be served with these options.
func (o Options) Check(c link.Config) error {
	layout, err := c.Layout()
	switch {
	case err != nil:
		return err
	case o.Mode == ModeStrict && o.Subsystem != Subsystem{}:
		return errors.New("subsystem: expected none with mode strict, which has its own")
	case o.Mode == ModeStrict && o.BaseAddress != 0:
		return errors.New("mode strict: expected no base address, which has all of the memory mapped")
	case o.INTx && c.Vectors != 1:
		return fmt.Errorf("vectors: expected 1, which is all that INTx has, found %d", c.Vectors)
	case o.BaseAddress%shmem.PageSize != 0:
		return fmt.Errorf("base address: expected a multiple of %d, found %#x", shmem.PageSize, o.BaseAddress)
	case o.BaseAddress+layout.Total() < o.BaseAddress:
		return fmt.Errorf("base address: expected %d bytes of addresses from it on, found %#x", layout.Total(), o.BaseAddress)
	}
	return nil
}

// Function is one peer as a PCI function. It implements [vfiouser.Device].
type Function struct {
	peer   *link.Peer
	layout shmem.Layout
	memory *shmem.ReadWrite // the whole region
	config *space
	irq    *vectors
	region [vfiouser.NumRegions]vfiouser.Region
}

var _ vfiouser.Device = (*Function)(nil)

// New attaches a peer to the link and makes it a function. The error wraps
// [link.ErrFull] where no peer ID is free, and [link.ErrTaken] where that of
// Pin is not.
func New(l *link.Link, o Options) (*Function, error) {
	c, layout := l.Config(), l.Layout()
	if err := o.Check(c); err != nil {
		return nil, err
	}
	memory, err := l.Memory().ReadWrite("shared memory", 0, layout.Total())
	if err != nil {
		return nil, err
	}
	irq, err := newVectors(c.Vectors, o.INTx, l.FD())
	if err != nil {
		return nil, err
	}
	peer, err := l.Attach(o.Pin, irq)
	if err != nil {
		irq.close()
		return nil, err
	}
	f := &Function{
		peer: peer, layout: layout, memory: memory, irq: irq,
		config: newSpace(c, layout, peer.ID(), o),
	}
	access := vfiouser.RegionRead | vfiouser.RegionWrite
	shared := vfiouser.Region{
		Flags: access | vfiouser.RegionMmap, Size: bar2Size(layout), FD: l.FD(),
		Areas: o.Mode.areas(layout, peer.ID()),
	}
	if len(shared.Areas) == 0 { // a link that is nothing but a State Table
		shared.Flags, shared.FD = access, -1
	}
	f.region[vfiouser.RegionBAR0] = vfiouser.Region{Flags: access, Size: o.bar0Size()}
	if !o.INTx {
		f.region[vfiouser.RegionBAR1] = vfiouser.Region{Flags: access, Size: bar1Size(c.Vectors)}
	}
	if o.BaseAddress == 0 {
		f.region[vfiouser.RegionBAR2] = shared
	}
	f.region[vfiouser.RegionConfig] = vfiouser.Region{Flags: access, Size: regs.ConfigSize, FD: -1}
	if f.region[vfiouser.RegionBAR2].Flags&vfiouser.RegionMmap == 0 {
		// QEMU waits for its writes to be carried out only if some region can
		// be mapped. Otherwise the guest goes on at once: it would look at
		// shared memory (of a Base Address) while its write to Interrupt
		// Control is on the way, and miss the doorbell that comes in between.
		// The flag is enough; nobody maps configuration space.
		f.region[vfiouser.RegionConfig].Flags |= vfiouser.RegionMmap
	}
	return f, nil
}

// ID is the peer ID of the function.
func (f *Function) ID() uint32 { return f.peer.ID() }

// Close disconnects the peer from the link and closes the client's eventfds.
func (f *Function) Close() {
	f.peer.Detach()
	f.irq.close()
}

// Region implements [vfiouser.Device].
func (f *Function) Region(index uint32) vfiouser.Region { return f.region[index] }

// ReadRegion implements [vfiouser.Device].
func (f *Function) ReadRegion(index uint32, offset uint64, p []byte) error {
	clear(p)
	switch index {
	case vfiouser.RegionConfig:
		copy(p, f.config.value[offset:])
		if at := offStatus - offset; at < uint64(len(p)) && f.irq.interruptStatus() {
			p[at] |= statusInterrupt
		}
	case vfiouser.RegionBAR0:
		if len(p) == 4 && offset%4 == 0 && offset <= uint64(regs.State) {
			binary.LittleEndian.PutUint32(p, f.peer.Load(regs.Register(offset)))
		}
	case vfiouser.RegionBAR2:
		f.readShared(offset, p)
	}
	// BAR1: QEMU has the MSI-X table itself; the pending bits always read 0.
	return nil
}

// WriteRegion implements [vfiouser.Device].
func (f *Function) WriteRegion(index uint32, offset uint64, p []byte) error {
	switch index {
	case vfiouser.RegionConfig:
		f.config.write(offset, p)
		f.peer.SetOneShot(f.config.oneShot())
		if f.irq.intx {
			f.irq.setDisabled(f.config.intxDisabled())
		} else {
			f.irq.setEnabled(f.config.msixEnabled())
		}
	case vfiouser.RegionBAR0:
		if len(p) == 4 && offset%4 == 0 && offset <= uint64(regs.State) {
			f.peer.Store(regs.Register(offset), binary.LittleEndian.Uint32(p))
		}
	case vfiouser.RegionBAR2:
		f.writeShared(offset, p)
	}
	return nil
}

// readShared reads shared memory that is not mapped. States come from the
// link's own copy, never from memory that a peer can write.
func (f *Function) readShared(offset uint64, p []byte) {
	for len(p) > 0 && offset < f.layout.StateTable {
		var entry [4]byte
		binary.LittleEndian.PutUint32(entry[:], f.peer.StateOf(uint32(offset/4)))
		n := copy(p, entry[offset%4:])
		p, offset = p[n:], offset+uint64(n)
	}
	if offset >= f.layout.Total() {
		return
	}
	p = p[:min(uint64(len(p)), f.layout.Total()-offset)]
	// An access of a guest's register width is one access to memory too.
	switch {
	case len(p) == 8 && offset%8 == 0:
		v, _ := f.memory.Load64(offset)
		binary.LittleEndian.PutUint64(p, v)
	case len(p) == 4 && offset%4 == 0:
		v, _ := f.memory.Load32(offset)
		binary.LittleEndian.PutUint32(p, v)
	case len(p) == 2 && offset%2 == 0:
		v, _ := f.memory.Load16(offset)
		binary.LittleEndian.PutUint16(p, v)
	default:
		f.memory.ReadAt(p, int64(offset))
	}
}

// writeShared writes shared memory that is not mapped, as far as it is the
// peer's to write: the R/W section and its own output section.
func (f *Function) writeShared(offset uint64, p []byte) {
	l := f.layout
	own := l.OutputOffset(f.peer.ID())
	f.writePart(offset, p, l.ReadWriteOffset(), l.ReadWrite)
	f.writePart(offset, p, own, l.Output)
}

// writePart writes the bytes of p at offset that lie in [start, start+size).
func (f *Function) writePart(offset uint64, p []byte, start, size uint64) {
	end := min(offset+uint64(len(p)), start+size)
	from := max(offset, start)
	if from >= end {
		return
	}
	p, offset = p[from-offset:end-offset], from
	switch {
	case len(p) == 8 && offset%8 == 0:
		f.memory.Store64(offset, binary.LittleEndian.Uint64(p))
	case len(p) == 4 && offset%4 == 0:
		f.memory.Store32(offset, binary.LittleEndian.Uint32(p))
	case len(p) == 2 && offset%2 == 0:
		f.memory.Store16(offset, binary.LittleEndian.Uint16(p))
	default:
		f.memory.WriteAt(p, int64(offset))
	}
}

// IOFDs implements [vfiouser.Device]: the doorbell eventfds of all peers, for
// host processes. They stand for one value of the Doorbell register each.
func (f *Function) IOFDs(index uint32, limit int) []vfiouser.IOFD {
	if index != vfiouser.RegionBAR0 {
		return nil
	}
	all := f.peer.Link().DoorbellFDs(limit) // the rest rings by message
	fds := make([]vfiouser.IOFD, len(all))
	for i, d := range all {
		fds[i] = vfiouser.IOFD{
			Offset: uint64(regs.DoorbellRegister), Size: 4,
			Match: true, Data: uint64(d.Value), FD: d.FD,
		}
	}
	return fds
}

// IRQ implements [vfiouser.Device]. Without the NORESIZE flag QEMU adds
// vectors one at a time instead of withdrawing all of them.
func (f *Function) IRQ(index uint32) vfiouser.IRQ {
	switch {
	case index != f.irq.index():
		return vfiouser.IRQ{}
	case f.irq.intx:
		return vfiouser.IRQ{Flags: vfiouser.IRQEventFD | vfiouser.IRQMaskable | vfiouser.IRQAutomasked, Count: 1}
	}
	return vfiouser.IRQ{Flags: vfiouser.IRQEventFD, Count: uint32(len(f.irq.slots))}
}

// SetIRQs implements [vfiouser.Device].
func (f *Function) SetIRQs(s vfiouser.IRQSet) error {
	if s.Index != f.irq.index() {
		return fmt.Errorf("interrupt index %d: expected %d: %w", s.Index, f.irq.index(), unix.EINVAL)
	}
	switch {
	case s.Action != vfiouser.IRQTrigger && f.irq.intx:
		f.irq.mask(s, s.Action == vfiouser.IRQMask)
	case s.Action != vfiouser.IRQTrigger:
		// QEMU masks in its own table; a mask that comes over the wire has
		// nothing to act on (IRQ_INFO does not announce maskable).
	case s.EventFD && len(s.FDs) > 0:
		// Nothing but eventfds: to close anything else may block, and the
		// link waits for whoever holds the lock of the vectors.
		for _, fd := range s.FDs {
			if _, ok := evfd.Number(fd); !ok {
				return fmt.Errorf("interrupts: expected eventfds, found another descriptor: %w", unix.EINVAL)
			}
		}
		for i, fd := range s.FDs {
			vector := uint16(s.Start) + uint16(i)
			f.peer.SetDirect(vector, f.peer.IsDoorbell(vector, fd))
		}
		f.irq.assign(s.Start, s.FDs)
	case s.EventFD, s.Count == 0:
		start, count := s.Start, s.Count
		if count == 0 {
			start, count = 0, uint32(len(f.irq.slots))
		}
		for i := range count {
			f.peer.SetDirect(uint16(start+i), false)
		}
		f.irq.withdraw(start, count)
	default:
		f.irq.trigger(s)
	}
	return nil
}

// Reset implements [vfiouser.Device].
func (f *Function) Reset() {
	f.config.value = f.config.reset
	f.irq.reset()
	f.peer.Reset()
}
