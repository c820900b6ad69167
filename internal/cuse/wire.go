package cuse

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Numbers of linux/fuse.h. All fields have the byte order of the machine.
const (
	opOpen      = 14
	opRead      = 15
	opWrite     = 16
	opRelease   = 18
	opInterrupt = 36
	opIoctl     = 39
	opPoll      = 40
	opInit      = 4096 // CUSE_INIT

	notifyPoll = 1

	openDirectIO    = 1 << 0
	openNonSeekable = 1 << 2
	initAnyIoctl    = 1 << 0 // CUSE_UNRESTRICTED_IOCTL
	ioctlRetry      = 1 << 2
	pollSchedule    = 1 << 0

	// Of poll(2), as most machines have them.
	pollReadNormal, pollWriteNormal = 0x40, 0x100

	protocolMajor = 7
	// The first minor version with the wanted events in POLL (Linux 3.9), and
	// the one that this was written for.
	protocolLeast, protocolMinor = 21, 38
)

// Sizes in bytes.
const (
	inHeaderSize  = 40
	outHeaderSize = 16

	initInSize  = 16
	writeInSize = 40

	// maxTransfer is the most that one READ or WRITE carries; the kernel takes
	// longer ones apart. It has 32 pages for each.
	maxTransfer = 128 << 10
	// messageSize is at least that of each message; the kernel refuses to write
	// into less than a WRITE may have.
	messageSize = 4096 + maxTransfer
)

var native = binary.NativeEndian

// message is what the kernel sends: the header's fields, and what follows it.
type message struct {
	op     uint32
	unique uint64
	body   []byte
}

// bodySizes has the least size of each known body.
var bodySizes = map[uint32]int{
	opOpen:      8,
	opRead:      40,
	opWrite:     writeInSize,
	opRelease:   24,
	opInterrupt: 8,
	opIoctl:     32,
	opPoll:      24,
}

// parse takes a message apart: len u32, opcode u32, unique u64, and 24 bytes
// that do not matter here.
func parse(b []byte) (message, error) {
	if len(b) < inHeaderSize || native.Uint32(b) != uint32(len(b)) {
		return message{}, fmt.Errorf("message of the kernel's CUSE: expected its own size of at least %d bytes at its beginning, found % x in %d bytes",
			inHeaderSize, b[:min(4, len(b))], len(b))
	}
	return message{op: native.Uint32(b[4:]), unique: native.Uint64(b[8:]), body: b[inHeaderSize:]}, nil
}

// Offsets in the bodies; a file's number is the first field of all.
const (
	readOffset, readSize, readFlags = 8, 16, 32 // WRITE has them at the same place
	ioctlCommand, ioctlArgument     = 12, 16
	ioctlOutSize                    = 28
	pollHandle, pollFlags, pollMask = 8, 16, 20
)

// put puts the header before an answer that is in b behind it: len u32, error
// i32 (negative), unique u64.
func put(b []byte, errno unix.Errno, unique uint64) {
	native.PutUint32(b, uint32(len(b)))
	native.PutUint32(b[4:], -uint32(errno))
	native.PutUint64(b[8:], unique)
}

// initAnswer is the body of the answer to INIT: major, minor, unused, flags,
// max_read, max_write, two for the device number of which 0 lets the kernel
// choose, ten spare; all u32. Strings follow.
func initAnswer(minor uint32, name string) []byte {
	var b []byte
	for _, v := range []uint32{protocolMajor, minor, 0, initAnyIoctl, maxTransfer, maxTransfer, 0, 0} {
		b = native.AppendUint32(b, v)
	}
	b = append(b, make([]byte, 40)...)
	return append(b, "DEVNAME="+name+"\x00"...)
}

// ioctlAnswer is result i32, flags, in_iovs, out_iovs.
func ioctlAnswer(flags, outVectors uint32) []byte {
	b := make([]byte, 16)
	native.PutUint32(b[4:], flags)
	native.PutUint32(b[12:], outVectors)
	return b
}
