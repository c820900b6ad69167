package pcidev

import (
	"encoding/binary"
	"math/bits"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Layout of the configuration space. Only the header offsets are PCI's; the
// places of the capabilities are ours.
const (
	offCommand = 0x04
	offStatus  = 0x06
	capVendor  = 0x40
	capMSIX    = 0x60

	commandIntxDisable = 1 << 10
	commandBusMaster   = 1 << 2
	commandMemory      = 1 << 1
	commandIO          = 1 << 0

	statusInterrupt    = 1 << 3
	statusCapabilities = 1 << 4

	barIO           = 0x1
	barMemory64     = 0x4
	barPrefetchable = 0x8
)

// Subsystem is the pair of subsystem IDs of a function.
type Subsystem struct{ Vendor, Device uint16 }

// subsystem is the pair that a function shows: what Jailhouse's device carries,
// unless it is to tell of a strict link.
func (o Options) subsystem() Subsystem {
	switch {
	case o.Mode == ModeStrict:
		return Subsystem{regs.VendorID, regs.SubsystemStrict}
	case o.Subsystem == Subsystem{}:
		return Subsystem{regs.VendorID, regs.DeviceID}
	}
	return o.Subsystem
}

// field is a register of the configuration space: its reset value, and the
// bits of it that a guest can write (specification, "PCI Header Registers").
// What no field covers reads 0 and ignores writes.
type field struct {
	offset, size int
	reset        uint64
	writable     uint64
}

// fields is the configuration space of a peer's function.
func fields(c link.Config, l shmem.Layout, id uint32, o Options) []field {
	class := uint64(regs.ClassCode(c.Protocol.ForPeer(id)))
	// Memory decoding is there in any case: other BARs are in memory space.
	command, bar0, bar0Mask := uint64(commandMemory|commandBusMaster|commandIntxDisable), uint64(0), barMask(o.bar0Size())
	if o.IORegisters {
		command, bar0, bar0Mask = command|commandIO, barIO, ^(o.bar0Size()-1)&^0x3
	}
	subsystem := o.subsystem()
	space := []field{
		{0x00, 2, regs.VendorID, 0},
		{0x02, 2, regs.DeviceID, 0},
		{offCommand, 2, 0, command},
		{offStatus, 2, statusCapabilities, 0},
		{0x08, 4, class << 8, 0}, // Revision ID 00, class code
		{0x10, 4, bar0, bar0Mask},
		{0x2c, 2, uint64(subsystem.Vendor), 0},
		{0x2e, 2, uint64(subsystem.Device), 0},
		{0x34, 1, capVendor, 0},

		// Privileged Control; the rest of the capability is encoded by regs.
		{capVendor + 3, 1, 0, regs.OneShot},
	}
	if o.BaseAddress == 0 {
		space = append(space, field{0x18, 8, barMemory64 | barPrefetchable, barMask(bar2Size(l))})
	}
	if o.INTx {
		return append(space, field{0x3d, 1, 1, 0}) // Interrupt Pin: INTA
	}
	table, pba := msixTable(c.Vectors)
	return append(space, []field{
		{0x14, 4, 0, barMask(bar1Size(c.Vectors))},
		{0x3d, 1, 0, 0}, // Interrupt Pin: 0 with MSI-X

		{capMSIX, 1, regs.CapMSIX, 0},
		{capMSIX + 1, 1, 0, 0}, // last capability
		{capMSIX + regs.MSIXControl, 2, uint64(c.Vectors - 1), regs.MSIXEnable | regs.MSIXFunctionMask},
		{capMSIX + 4, 4, uint64(table) | 1, 0}, // table in BAR1
		{capMSIX + 8, 4, uint64(pba) | 1, 0},   // pending bits in BAR1
	}...)
}

// bar0Size is that of the register region. In I/O space it is as small as the
// registers allow: PCI has 256 bytes at most for a BAR there.
func (o Options) bar0Size() uint64 {
	if o.IORegisters {
		return pow2(uint64(regs.State) + 4)
	}
	return regs.RegionSize
}

// barMask is the writable address bits of a memory BAR of a size that is a
// power of two.
func barMask(size uint64) uint64 { return ^(size - 1) &^ 0xf }

// msixTable returns the offsets of the MSI-X table and of the pending bits in
// BAR1.
func msixTable(vectors uint16) (table, pba uint32) {
	// The pending bits are read in 64-bit words; 100h keeps Jailhouse's
	// offset for up to 16 vectors.
	return 0, (uint32(vectors)*16 + 0xff) &^ 0xff
}

func bar1Size(vectors uint16) uint64 {
	_, pba := msixTable(vectors)
	end := uint64(pba) + (uint64(vectors)+63)/64*8
	return max(pow2(end), shmem.PageSize)
}

func bar2Size(l shmem.Layout) uint64 { return pow2(l.Total()) }

// pow2 rounds up to a power of two: PCI knows no other BAR sizes.
func pow2(n uint64) uint64 { return 1 << bits.Len64(n-1) }

// space is a configuration space: values, and the mask of writable bits.
type space struct {
	value, mask, reset [regs.ConfigSize]byte
}

func newSpace(c link.Config, l shmem.Layout, id uint32, o Options) *space {
	sp := &space{}
	vendor := regs.VendorCap{
		StateTable: uint32(l.StateTable), ReadWrite: l.ReadWrite, Output: l.Output,
		HasBase: o.BaseAddress != 0, BaseAddress: o.BaseAddress,
	}
	next := uint8(capMSIX)
	if o.INTx {
		next = 0
	}
	copy(sp.reset[capVendor:], vendor.Append(nil, next))
	for _, f := range fields(c, l, id, o) {
		var v, m [8]byte
		binary.LittleEndian.PutUint64(v[:], f.reset)
		binary.LittleEndian.PutUint64(m[:], f.writable)
		copy(sp.reset[f.offset:f.offset+f.size], v[:])
		copy(sp.mask[f.offset:f.offset+f.size], m[:])
	}
	sp.value = sp.reset
	return sp
}

// write changes the writable bits of p at offset.
func (sp *space) write(offset uint64, p []byte) {
	for i, b := range p {
		o := offset + uint64(i)
		m := sp.mask[o]
		sp.value[o] = sp.value[o]&^m | b&m
	}
}

func (sp *space) oneShot() bool { return sp.value[capVendor+3]&regs.OneShot != 0 }

func (sp *space) intxDisabled() bool {
	return binary.LittleEndian.Uint16(sp.value[offCommand:])&commandIntxDisable != 0
}

func (sp *space) msixEnabled() bool {
	return binary.LittleEndian.Uint16(sp.value[capMSIX+regs.MSIXControl:])&regs.MSIXEnable != 0
}
