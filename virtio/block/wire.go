// Package block is the virtio block device (virtio specification, "Block
// Device"): a disk for the guest at the other end of a link of protocol type
// 8002h, which Linux shows as /dev/vdX; and a driver of one.
package block

import "github.com/ivshmem-go/ivshmem/virtio"

// ID is the virtio device ID.
const ID = 2

// SectorSize is the unit of the protocol in bytes, whatever the disk's own is.
const SectorSize = 512

// Features of the device type.
const (
	featureSizeMax     virtio.Features = 1 << 1
	featureSegMax      virtio.Features = 1 << 2
	featureReadOnly    virtio.Features = 1 << 5
	featureFlush       virtio.Features = 1 << 9
	featureDiscard     virtio.Features = 1 << 13
	featureWriteZeroes virtio.Features = 1 << 14
)

// Fields of the configuration space: offsets in bytes.
const (
	configCapacity          = 0  // 8, in sectors
	configSizeMax           = 8  // 4, bytes of a segment
	configSegMax            = 12 // 4, segments of a request
	configMaxDiscard        = 36 // 4, sectors
	configMaxDiscardSegs    = 40 // 4
	configDiscardAlign      = 44 // 4, sectors
	configMaxWriteZeroes    = 48 // 4, sectors
	configMaxWriteZeroesSeg = 52 // 4
	configMayUnmap          = 56 // 1
	configSize              = 60
)

// Requests: a header of 16 bytes {type 4, reserved 4, sector 8}, data, and one
// byte of status from the device.
const (
	requestIn          = 0
	requestOut         = 1
	requestFlush       = 4
	requestGetID       = 8
	requestDiscard     = 11
	requestWriteZeroes = 13

	headerSize = 16
	// rangeSize is the size of a range to discard or zero: {sector 8, sectors 4,
	// flags 4}.
	rangeSize  = 16
	rangeUnmap = 1 // a flag, for zeroes only
	serialSize = 20
	// What a request may discard, and zero: zeros may have to be written.
	discardMost   = 1 << 22 // sectors of a range
	discardRanges = 16
	zeroesMost    = 1 << 16
	zeroesRanges  = 1

	statusOK          = 0
	statusIOError     = 1
	statusUnsupported = 2
)
