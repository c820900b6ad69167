package virtio

import (
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Registers: offsets in the R/W section. Each is as wide as the distance to
// the next.
const (
	regRevision          = 0x00
	regSize              = 0x04 // of the block, configuration space included
	regWriteTransaction  = 0x08 // 0, or the register that the front-end just wrote
	regDeviceFeatures    = 0x0c
	regDeviceFeaturesSel = 0x10
	regDriverFeatures    = 0x14
	regDriverFeaturesSel = 0x18
	regQueueSel          = 0x1c
	regQueueSize         = 0x20
	regQueueDeviceVector = 0x22
	regQueueDriverVector = 0x24
	regQueueEnable       = 0x26
	regQueueDesc         = 0x28
	regQueueDriver       = 0x30
	regQueueDevice       = 0x38
	regQueueEnd          = 0x40
	regConfigEvent       = 0x40
	regQueueEvent        = 0x41
	regDeviceStatus      = 0x44
	regConfigGeneration  = 0x48
	regConfig            = 0x4c

	revision = 1
	// minSection is the smallest R/W section that Linux takes.
	minSection = 2 * 4096
	// maxConfig is how large a configuration space may be, in bytes: more than
	// any device's.
	maxConfig = 1024
)

// Status is the device status register (virtio specification, "Device Status
// Field").
type Status uint8

// Bits of the device status.
const (
	StatusAcknowledge Status = 1
	StatusDriver      Status = 2
	StatusDriverOK    Status = 4
	StatusFeaturesOK  Status = 8
	StatusNeedsReset  Status = 0x40
	StatusFailed      Status = 0x80
)

// States of a peer.
const (
	stateReset = 0
	stateReady = 1
)

// section is the R/W section. Accesses that were checked to lie inside it fail
// only when the device is closed: they read 0 then, and store nothing, and who
// waits for the device hears of it.
type section struct{ *shmem.ReadWrite }

func (s section) load8(at uint64) uint8 {
	v, _ := s.Load8(at)
	return v
}

func (s section) load16(at uint64) uint16 {
	v, _ := s.Load16(at)
	return v
}

func (s section) load32(at uint64) uint32 {
	v, _ := s.Load32(at)
	return v
}

func (s section) load64(at uint64) uint64 {
	v, _ := s.Load64(at)
	return v
}

// holds reports whether n bytes at an offset lie in the section behind its
// first bytes.
func (s section) holds(first, at, n uint64) bool {
	return at >= first && at <= s.Size() && n <= s.Size()-at
}

// zero clears n bytes. The section may be device memory, which clear must not
// touch.
func (s section) zero(at, n uint64) {
	for n > 0 {
		piece := min(n, uint64(len(zeros)))
		s.WriteAt(zeros[:piece], int64(at))
		at, n = at+piece, n-piece
	}
}

var zeros [4096]byte
