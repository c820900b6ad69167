// Package wire is the codec of the vfio-user protocol: each message's fixed
// part as a struct, Decode functions that never read beyond what they are
// given, Append functions that write the exact layout. No I/O, no policy: what
// values mean, and which are refused, is the business of the two halves.
//
// Source: QEMU docs/interop/vfio-user.rst and libvfio-user's vfio-user.h. All
// integers are little-endian here (host byte order by the specification).
package wire

import (
	"encoding/binary"
	"fmt"
)

var le = binary.LittleEndian

// HeaderSize is the size of a message header in bytes.
const HeaderSize = 16

// Limits of the protocol's implementations.
const (
	// MaxTransfer is the default of max_data_xfer_size, and what both halves
	// here announce, in bytes.
	MaxTransfer = 1 << 20
	// MaxMessage is the largest message either half accepts, in bytes: a
	// REGION_WRITE of MaxTransfer.
	MaxMessage = HeaderSize + AccessSize + MaxTransfer
	// MaxVersionMessage is the largest VERSION message either half accepts,
	// in bytes; QEMU's has 214.
	MaxVersionMessage = 4096
)

// Command is the number of a message type.
type Command uint16

// Commands.
const (
	Version          Command = 1
	DMAMap           Command = 2
	DMAUnmap         Command = 3
	DeviceGetInfo    Command = 4
	RegionGetInfo    Command = 5
	RegionGetIOFDs   Command = 6
	IRQGetInfo       Command = 7
	DeviceSetIRQs    Command = 8
	RegionRead       Command = 9
	RegionWrite      Command = 10
	DMARead          Command = 11
	DMAWrite         Command = 12
	DeviceReset      Command = 13
	RegionWriteMulti Command = 15
	DeviceFeature    Command = 16
	MigDataRead      Command = 17
	MigDataWrite     Command = 18
)

var commandNames = [...]string{
	Version: "VERSION", DMAMap: "DMA_MAP", DMAUnmap: "DMA_UNMAP",
	DeviceGetInfo: "DEVICE_GET_INFO", RegionGetInfo: "DEVICE_GET_REGION_INFO",
	RegionGetIOFDs: "DEVICE_GET_REGION_IO_FDS", IRQGetInfo: "DEVICE_GET_IRQ_INFO",
	DeviceSetIRQs: "DEVICE_SET_IRQS", RegionRead: "REGION_READ", RegionWrite: "REGION_WRITE",
	DMARead: "DMA_READ", DMAWrite: "DMA_WRITE", DeviceReset: "DEVICE_RESET",
	RegionWriteMulti: "REGION_WRITE_MULTI", DeviceFeature: "DEVICE_FEATURE",
	MigDataRead: "MIG_DATA_READ", MigDataWrite: "MIG_DATA_WRITE",
}

// String is the specification's name without its prefix VFIO_USER_.
func (c Command) String() string {
	if int(c) < len(commandNames) && commandNames[c] != "" {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Flags of a header. Other bits are reserved and ignored.
type Flags uint32

// Parts of the flags.
const (
	TypeMask    Flags = 0xf
	TypeCommand Flags = 0
	TypeReply   Flags = 1
	NoReply     Flags = 0x10
	Error       Flags = 0x20
)

// Header starts every message. Size counts header and payload.
type Header struct {
	ID      uint16
	Command Command
	Size    uint32
	Flags   Flags
	Errno   uint32
}

// DecodeHeader reads a header; ok is false if b is shorter than one.
func DecodeHeader(b []byte) (h Header, ok bool) {
	if len(b) < HeaderSize {
		return h, false
	}
	return Header{
		ID:      le.Uint16(b),
		Command: Command(le.Uint16(b[2:])),
		Size:    le.Uint32(b[4:]),
		Flags:   Flags(le.Uint32(b[8:])),
		Errno:   le.Uint32(b[12:]),
	}, true
}

// Put writes the header to the first HeaderSize bytes of b, which must be
// there.
func (h Header) Put(b []byte) {
	_ = b[HeaderSize-1]
	le.PutUint16(b, h.ID)
	le.PutUint16(b[2:], uint16(h.Command))
	le.PutUint32(b[4:], h.Size)
	le.PutUint32(b[8:], uint32(h.Flags))
	le.PutUint32(b[12:], h.Errno)
}
