package regs

import "fmt"

// PCI identity of the device (specification, "Vendor ID" to "Class code").
const (
	VendorID = 0x110a // Siemens AG
	DeviceID = 0x4106

	// SubsystemStrict is the Subsystem ID, under the Subsystem Vendor ID 110Ah,
	// of the devices of a strict link (this project's; the specification leaves
	// both free, and 4106h is usual): see [ConfigStrict].
	SubsystemStrict = 0x4107

	// BaseClass is the upper byte of the 24-bit class code; the lower 16
	// bits are the [Protocol].
	BaseClass = 0xff
)

// Register is the offset of a register in the register region, in bytes. All
// registers are 32 bits wide and accept aligned 32-bit accesses only.
type Register uint16

// The registers (specification, "Register Region").
const (
	ID               Register = 0x00 // read-only: own peer ID, 0-based
	MaxPeers         Register = 0x04 // read-only: number of peers, own included, 2 to 65536
	InterruptControl Register = 0x08 // read/write: bit 0 enables interrupts, reset value 0
	DoorbellRegister Register = 0x0c // write-only: see Doorbell
	State            Register = 0x10 // read/write: own state, reset value 0
)

// RegionSize is the size of the register region in bytes.
const RegionSize = 4096

// InterruptEnable is bit 0 of Interrupt Control.
const InterruptEnable = 1

// Limits of the specification.
const (
	MinPeers = 2
	PeersMax = 65536
	// VectorsMax is the largest MSI-X table (PCI Local Bus specification).
	VectorsMax = 2048
)

// AllOnes is what a register reads when nothing answers: the device is gone,
// or memory decoding is off.
const AllOnes = 0xffffffff

var registerNames = map[Register]string{
	ID: "ID", MaxPeers: "Maximum Peers", InterruptControl: "Interrupt Control",
	DoorbellRegister: "Doorbell", State: "State",
}

// String is the name of the register, or its offset where there is none.
func (r Register) String() string {
	if s, ok := registerNames[r]; ok {
		return s
	}
	return fmt.Sprintf("%02Xh", uint16(r))
}

// Doorbell is the value of the Doorbell register that rings vector at the
// peer target: target in bits 31 to 16, vector in bits 15 to 0.
func Doorbell(target, vector uint16) uint32 {
	return uint32(target)<<16 | uint32(vector)
}

// SplitDoorbell takes a value of the Doorbell register apart.
func SplitDoorbell(v uint32) (target, vector uint16) {
	return uint16(v >> 16), uint16(v)
}
