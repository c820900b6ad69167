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
	capVendor  = 0x40
	capMSIX    = 0x60

	commandIntxDisable = 1 << 10
	commandBusMaster   = 1 << 2
	commandMemory      = 1 << 1

	barMemory64     = 0x4
	barPrefetchable = 0x8
)

// Subsystem is the pair of subsystem IDs of a function.
type Subsystem struct{ Vendor, Device uint16 }

// defaultSubsystem is what Jailhouse's device carries.
var defaultSubsystem = Subsystem{regs.VendorID, regs.DeviceID}

// field is a register of the configuration space: its reset value, and the
// bits of it that a guest can write (specification, "PCI Header Registers").
// What no field covers reads 0 and ignores writes.
type field struct {
	offset, size int
	reset        uint64
	writable     uint64
}

// fields is the configuration space of a peer's function.
func fields(c link.Config, l shmem.Layout, id uint32, s Subsystem) []field {
	class := uint64(regs.ClassCode(c.Protocol.ForPeer(id)))
	table, pba := msixTable(c.Vectors)
	bar2 := bar2Size(l)
	return []field{
		{0x00, 2, regs.VendorID, 0},
		{0x02, 2, regs.DeviceID, 0},
		{offCommand, 2, 0, commandMemory | commandBusMaster | commandIntxDisable},
		{0x06, 2, 1 << 4, 0},     // Status: capability list, constant
		{0x08, 4, class << 8, 0}, // Revision ID 00, class code
		{0x10, 4, 0, barMask(regs.RegionSize)},
		{0x14, 4, 0, barMask(bar1Size(c.Vectors))},
		{0x18, 8, barMemory64 | barPrefetchable, barMask(bar2)},
		{0x2c, 2, uint64(s.Vendor), 0},
		{0x2e, 2, uint64(s.Device), 0},
		{0x34, 1, capVendor, 0},
		{0x3d, 1, 0, 0}, // Interrupt Pin: 0 with MSI-X

		// Privileged Control; the rest of the capability is encoded by regs.
		{capVendor + 3, 1, 0, regs.OneShot},

		{capMSIX, 1, regs.CapMSIX, 0},
		{capMSIX + 1, 1, 0, 0}, // last capability
		{capMSIX + regs.MSIXControl, 2, uint64(c.Vectors - 1), regs.MSIXEnable | regs.MSIXFunctionMask},
		{capMSIX + 4, 4, uint64(table) | 1, 0}, // table in BAR1
		{capMSIX + 8, 4, uint64(pba) | 1, 0},   // pending bits in BAR1
	}
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

func newSpace(c link.Config, l shmem.Layout, id uint32, s Subsystem) *space {
	sp := &space{}
	vendor := regs.VendorCap{StateTable: uint32(l.StateTable), ReadWrite: l.ReadWrite, Output: l.Output}
	copy(sp.reset[capVendor:], vendor.Append(nil, capMSIX))
	for _, f := range fields(c, l, id, s) {
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

func (sp *space) msixEnabled() bool {
	return binary.LittleEndian.Uint16(sp.value[capMSIX+regs.MSIXControl:])&regs.MSIXEnable != 0
}
