package regs

import (
	"encoding/binary"
	"fmt"
)

// Offsets in the vendor-specific capability (specification, "Vendor Specific
// Capability"), and its two lengths.
const (
	vcLength      = 0x02
	vcPrivileged  = 0x03
	vcStateTable  = 0x04
	vcReadWrite   = 0x08
	vcOutput      = 0x10
	vcBaseAddress = 0x18

	// VendorCapShort and VendorCapLong are the lengths of the capability
	// without and with the Base Address field, in bytes.
	VendorCapShort = 0x18
	VendorCapLong  = 0x20
)

// OneShot is bit 0 of Privileged Control: the device clears Interrupt Control
// bit 0 when it delivers an interrupt.
const OneShot = 1

// VendorCap is the content of the vendor-specific capability. It is a pure
// value; sizes are in bytes.
type VendorCap struct {
	// Offset of the capability in configuration space. Not part of the
	// encoded form.
	Offset int
	// Privileged is Privileged Control: bit 0 is one-shot mode.
	Privileged uint8
	// StateTable is the size of the State Table, never 0.
	StateTable uint32
	// ReadWrite is the size of the R/W section, 0 where there is none.
	ReadWrite uint64
	// Output is the size of one output section, 0 where there are none.
	Output uint64
	// HasBase says that the Base Address field is there: BaseAddress is the
	// guest-physical address of the shared memory, for devices without BAR2.
	HasBase     bool
	BaseAddress uint64
}

// PrivilegedControl is the offset of the Privileged Control byte in
// configuration space.
func (c VendorCap) PrivilegedControl() int { return c.Offset + vcPrivileged }

// ParseVendorCap finds and reads the vendor-specific capability of a
// configuration space. Both lengths, 18h and 20h, are taken; one in between is
// read like 18h, a longer one like 20h. Errors are [ErrNoCapability],
// [ErrGone] or a *[ConfigError].
func ParseVendorCap(config []byte) (VendorCap, error) {
	at, err := FindCapability(config, CapVendor)
	if err != nil {
		return VendorCap{}, err
	}
	if at+vcLength >= len(config) {
		return VendorCap{}, short(config, at+vcLength, "vendor capability length")
	}
	n := int(config[at+vcLength])
	if n < VendorCapShort {
		return VendorCap{}, &ConfigError{Offset: at + vcLength, Field: "vendor capability length", Expected: "18h or 20h", Found: fmt.Sprintf("%02Xh", n)}
	}
	if at+n > len(config) {
		return VendorCap{}, short(config, at, "vendor capability")
	}
	b := config[at : at+n]
	c := VendorCap{
		Offset:     at,
		Privileged: b[vcPrivileged] & OneShot,
		StateTable: binary.LittleEndian.Uint32(b[vcStateTable:]),
		ReadWrite:  binary.LittleEndian.Uint64(b[vcReadWrite:]),
		Output:     binary.LittleEndian.Uint64(b[vcOutput:]),
	}
	if n >= VendorCapLong {
		c.HasBase = true
		c.BaseAddress = binary.LittleEndian.Uint64(b[vcBaseAddress:])
	}
	if c.StateTable == 0 {
		return VendorCap{}, &ConfigError{Offset: at + vcStateTable, Field: "State Table size", Expected: "a size above 0", Found: "0"}
	}
	return c, nil
}

// Append appends the encoded capability to b, with next as the pointer to the
// next capability. Its length is 20h where HasBase is set, else 18h.
func (c VendorCap) Append(b []byte, next uint8) []byte {
	n := uint8(VendorCapShort)
	if c.HasBase {
		n = VendorCapLong
	}
	b = append(b, CapVendor, next, n, c.Privileged&OneShot)
	b = binary.LittleEndian.AppendUint32(b, c.StateTable)
	b = binary.LittleEndian.AppendUint64(b, c.ReadWrite)
	b = binary.LittleEndian.AppendUint64(b, c.Output)
	if c.HasBase {
		b = binary.LittleEndian.AppendUint64(b, c.BaseAddress)
	}
	return b
}
