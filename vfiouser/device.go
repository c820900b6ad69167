package vfiouser

// Region indexes of a PCI device.
const (
	RegionBAR0   = 0
	RegionBAR1   = 1
	RegionBAR2   = 2
	RegionBAR3   = 3
	RegionBAR4   = 4
	RegionBAR5   = 5
	RegionROM    = 6
	RegionConfig = 7
	RegionVGA    = 8

	// NumRegions is the number of fixed regions that the server half reports.
	NumRegions = 9
)

// Interrupt indexes of a PCI device.
const (
	IRQINTx    = 0
	IRQMSI     = 1
	IRQMSIX    = 2
	IRQError   = 3
	IRQRequest = 4

	// NumIRQs is the number of interrupt types that the server half reports.
	NumIRQs = 5
)

// RegionFlags of a [Region].
type RegionFlags uint32

// Region flags as they appear on the wire. The capability flag is added by
// the server half.
const (
	RegionRead  RegionFlags = 1
	RegionWrite RegionFlags = 2
	RegionMmap  RegionFlags = 4
)

// IRQFlags of an [IRQ].
type IRQFlags uint32

// Interrupt flags as they appear on the wire.
const (
	IRQEventFD    IRQFlags = 1
	IRQMaskable   IRQFlags = 2
	IRQAutomasked IRQFlags = 4
	IRQNoResize   IRQFlags = 8
)

// Area is a part of a region that a client can map. Offset and Size are in
// bytes, page-aligned, inside the region.
type Area struct {
	Offset, Size uint64
}

// Region describes one region of a device. The zero value is a region that is
// not implemented.
type Region struct {
	Flags RegionFlags
	Size  uint64 // bytes
	// Areas that can be mapped, for a region with RegionMmap. None means the
	// whole region.
	Areas []Area
	// FD is the file behind a region with RegionMmap, at FileOffset. The
	// server half sends it and does not close it; from the client half it
	// comes open, close-on-exec, and belongs to the caller. It is -1, or
	// anything without RegionMmap, where there is none.
	FD         int
	FileOffset uint64
}

// IRQ describes one interrupt type of a device. Count 0 is one that is not
// implemented.
type IRQ struct {
	Flags IRQFlags
	Count uint32
}

// IRQAction says what [IRQSet] does.
type IRQAction uint8

// Actions of DEVICE_SET_IRQS.
const (
	IRQMask IRQAction = iota + 1
	IRQUnmask
	IRQTrigger
)

// IRQSet is a validated DEVICE_SET_IRQS request: Index is implemented, Start
// and Count lie inside its range.
//
//   - Action IRQTrigger, Count 0: disable the whole index, drop its eventfds.
//   - Action IRQTrigger, EventFD set: FDs has Count descriptors that replace
//     those of Start …, or none: de-assign the range.
//   - Otherwise the action concerns each sub-index of the range, or, where
//     Bools is set, those whose byte is not 0.
//
// The server half never passes on EventFD with another action than IRQTrigger:
// to be told of masking through an eventfd is refused. The slices are the
// receiver's to keep.
type IRQSet struct {
	Index   uint32
	Action  IRQAction
	Start   uint32
	Count   uint32
	EventFD bool
	FDs     []int
	Bools   []byte
}

// IOFD is an eventfd that a client may write instead of sending a
// REGION_WRITE: DEVICE_GET_REGION_IO_FDS, type 0, with the rules of KVM's
// ioeventfd.
type IOFD struct {
	Offset uint64 // in the region
	Size   uint64 // width of the access in bytes; 0 = any
	// Match says that only the value Data is covered.
	Match bool
	Data  uint64
	FD    int
}

// Device is what the server half presents to one client. Its methods are
// called by one request loop, one at a time, never concurrently.
//
// An error that is or wraps a [golang.org/x/sys/unix.Errno] becomes that error
// on the wire, any other becomes EINVAL. A method that fails has changed
// nothing.
type Device interface {
	// Region describes region index, which is below NumRegions. It is asked
	// once per connection, before the first message.
	Region(index uint32) Region
	// ReadRegion fills p from the region; offset and len(p) lie inside it.
	// len(p) is never 0.
	ReadRegion(index uint32, offset uint64, p []byte) error
	// WriteRegion writes p to the region; offset and len(p) lie inside it. p
	// is valid during the call only. len(p) is never 0.
	WriteRegion(index uint32, offset uint64, p []byte) error
	// IOFDs lists the eventfds that stand for writes to region index, at most
	// max distinct descriptors. They stay the device's.
	IOFDs(index uint32, max int) []IOFD
	// IRQ describes interrupt type index, which is below NumIRQs.
	IRQ(index uint32) IRQ
	// SetIRQs carries out the request. When it returns nil, the descriptors
	// in s.FDs belong to the device; otherwise they stay the caller's.
	SetIRQs(s IRQSet) error
	// Reset puts the registers back to their reset values.
	Reset()
}
