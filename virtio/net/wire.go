// Package net is the virtio network device (virtio specification, "Network
// Device"): a network card for the guest at the other end of a link of protocol
// type 8001h, which Linux shows as ethX. Its frames go to and come from a
// [Port], such as a TAP interface of the kernel.
package net

import (
	"encoding/binary"

	"github.com/ivshmem-go/ivshmem/virtio"
)

// ID is the virtio device ID.
const ID = 1

// Features of the device type. Those of "host" are what the device takes from
// the driver, those of "guest" what the driver takes from the device.
const (
	featureChecksum      virtio.Features = 1 << 0
	featureGuestChecksum virtio.Features = 1 << 1
	featureMTU           virtio.Features = 1 << 3
	featureMAC           virtio.Features = 1 << 5
	featureGuestTCP4     virtio.Features = 1 << 7
	featureGuestTCP6     virtio.Features = 1 << 8
	featureGuestECN      virtio.Features = 1 << 9
	featureHostTCP4      virtio.Features = 1 << 11
	featureHostTCP6      virtio.Features = 1 << 12
	featureHostECN       virtio.Features = 1 << 13
	featureMergeBuffers  virtio.Features = 1 << 15
	featureStatus        virtio.Features = 1 << 16
)

// Fields of the configuration space: offsets in bytes.
const (
	configMAC    = 0  // 6
	configStatus = 6  // 2
	configMTU    = 10 // 2, without the header of 14
	configSize   = 12

	statusLinkUp = 1
)

// Queues, as the driver calls them.
const (
	receiveQueue = iota
	transmitQueue
)

// HeaderSize is the size of the header in front of each frame, little-endian:
// {flags 1, type 1, length of headers 2, size of segments 2, start of the
// checksum 2, its offset 2, number of buffers 2}. The kernel's TAP has the same.
const HeaderSize = 12

const (
	flagNeedsChecksum = 1 // of what is from the start on; the rest is there
	flagDataValid     = 2 // the checksums are right

	segmentNone = 0
	segmentTCP4 = 1
	segmentTCP6 = 4
	segmentECN  = 0x80 // a bit beside
)

// header is the header in private memory.
type header struct {
	flags, segment          uint8
	headers, size           uint16
	checkStart, checkOffset uint16
}

func decode(p []byte) header {
	le := binary.LittleEndian
	return header{p[0], p[1], le.Uint16(p[2:]), le.Uint16(p[4:]), le.Uint16(p[6:]), le.Uint16(p[8:])}
}

// put writes the header of a frame that takes so many buffers.
func (h *header) put(p []byte, buffers uint16) {
	le := binary.LittleEndian
	p[0], p[1] = h.flags, h.segment
	le.PutUint16(p[2:], h.headers)
	le.PutUint16(p[4:], h.size)
	le.PutUint16(p[6:], h.checkStart)
	le.PutUint16(p[8:], h.checkOffset)
	le.PutUint16(p[10:], buffers)
}

// segments are the types of segments that somebody takes.
type segments struct{ checksum, tcp4, tcp6, ecn bool }

// check clears what a header of a frame of n bytes must not say, or what has no
// meaning, and reports whether the frame is one for somebody who takes s.
func (h *header) check(n int, s segments) bool {
	h.flags &= flagNeedsChecksum
	if h.flags == 0 {
		h.checkStart, h.checkOffset = 0, 0
	} else if !s.checksum || int(h.checkStart)+int(h.checkOffset)+2 > n {
		return false
	}
	if h.segment == segmentNone {
		h.headers, h.size = 0, 0
		return true
	}
	if h.segment&segmentECN != 0 && !s.ecn {
		return false
	}
	switch h.segment &^ segmentECN {
	case segmentTCP4:
		if !s.tcp4 {
			return false
		}
	case segmentTCP6:
		if !s.tcp6 {
			return false
		}
	default:
		return false
	}
	return h.flags != 0 && h.size > 0 && int(h.headers) <= n && int(h.checkStart) < n
}
