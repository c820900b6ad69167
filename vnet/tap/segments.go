package tap

import (
	"encoding/binary"
	"math/bits"
)

// A kernel that is told so leaves a TCP stream's data in one piece of up to 64
// KiB, with a header of struct virtio_net_hdr in front, and takes it so: one
// call and one way through its network stack, instead of one for each frame. On
// the link there are frames, each with its own headers and checksum.

// Fields of struct virtio_net_hdr, the virtio specification's legacy one.
const (
	vnetFlags     = 0 // u8
	vnetGSOType   = 1 // u8
	vnetHeaderLen = 2 // u16: length of what precedes the data
	vnetGSOSize   = 4 // u16: most data of a frame
	vnetSumStart  = 6 // u16: where the checksum begins
	vnetSumOffset = 8 // u16: where it goes, from there
	vnetLen       = 10

	needsSum = 1 // in flags: the checksum field has the pseudo header's only
	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4
	gsoECN   = 0x80 // a bit beside: the first frame alone has CWR
)

// Offsets and sizes of the headers.
const (
	etherLen = 14
	typeIPv4 = 0x0800
	typeIPv6 = 0x86dd

	ipv4Len      = 20 // without options
	ipv4Total    = 2
	ipv4ID       = 4
	ipv4Fragment = 6
	ipv4Protocol = 9
	ipv4Sum      = 10
	ipv4Source   = 12

	ipv6Len      = 40
	ipv6Payload  = 4
	ipv6Next     = 6
	ipv6Source   = 8
	protocolTCP  = 6
	tcpLen       = 20 // without options
	tcpSeq       = 4
	tcpOffset    = 12
	tcpFlags     = 13
	tcpSum       = 16
	flagFIN      = 0x01
	flagPSH      = 0x08
	flagCWR      = 0x80
	maxHeaders   = etherLen + ipv6Len + 60
	dontFragment = 0x4000
)

// sum adds up bytes for a checksum, to be folded. The order of bytes in a word
// does not matter as long as it is one, so they are the machine's. The carry is
// kept in a flag for eight words at a time.
func sum(p []byte, s uint64) uint64 {
	var carry uint64
	for ; len(p) >= 64; p = p[64:] {
		q := (*[64]byte)(p)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(q[0:8]), 0)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(q[8:16]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(q[16:24]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(q[24:32]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(q[32:40]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(q[40:48]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(q[48:56]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(q[56:64]), carry)
		s, carry = bits.Add64(s, carry, 0)
		s += carry
	}
	add := func(v uint64) {
		s, carry = bits.Add64(s, v, 0)
		s += carry
	}
	for ; len(p) >= 8; p = p[8:] {
		add(binary.NativeEndian.Uint64(p))
	}
	if len(p) > 0 {
		var last [8]byte
		copy(last[:], p)
		add(binary.NativeEndian.Uint64(last[:]))
	}
	return s
}

// fold makes 16 bits of a sum, in the machine's order of bytes.
func fold(s uint64) uint16 {
	s = s>>32 + s&(1<<32-1)
	s = s>>32 + s&(1<<32-1)
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return uint16(s>>16 + s)
}

// putSum stores a checksum.
func putSum(p []byte, s uint64) { binary.NativeEndian.PutUint16(p, ^fold(s)) }

// headers are those of a TCP segment. Frames with others are left as they are.
type headers struct {
	ip  int // where IP begins; TCP follows it without options or extensions
	tcp int
	len int // of all of them
	six bool
}

// parse reads the headers of a frame, or of its beginning. It trusts nothing.
func parse(p []byte) (h headers, ok bool) {
	if len(p) < etherLen {
		return h, false
	}
	h.ip = etherLen
	switch binary.BigEndian.Uint16(p[12:]) {
	case typeIPv4:
		h.tcp = h.ip + ipv4Len
		if len(p) < h.tcp || p[h.ip] != 0x45 || p[h.ip+ipv4Protocol] != protocolTCP || binary.BigEndian.Uint16(p[h.ip+ipv4Fragment:])&^dontFragment != 0 {
			return h, false
		}
	case typeIPv6:
		h.six, h.tcp = true, h.ip+ipv6Len
		if len(p) < h.tcp || p[h.ip]>>4 != 6 || p[h.ip+ipv6Next] != protocolTCP {
			return h, false
		}
	default:
		return h, false
	}
	if len(p) < h.tcp+tcpLen {
		return h, false
	}
	h.len = h.tcp + int(p[h.tcp+tcpOffset]>>4)*4
	return h, h.len >= h.tcp+tcpLen && len(p) >= h.len
}

// pseudo is the sum of the pseudo header of a segment of n bytes with its TCP
// header.
func (h headers) pseudo(p []byte, n int) uint64 {
	var rest [8]byte
	binary.BigEndian.PutUint32(rest[:], uint32(n))
	rest[7] = protocolTCP
	at, size := h.ip+ipv4Source, 8
	if h.six {
		at, size = h.ip+ipv6Source, 32
	}
	return sum(p[at:at+size], sum(rest[:], 0))
}

// setLength writes the length of a frame with data of n bytes, into a header.
func (h headers) setLength(p []byte, n int) {
	if h.six {
		binary.BigEndian.PutUint16(p[h.ip+ipv6Payload:], uint16(h.len-h.tcp+n))
		return
	}
	binary.BigEndian.PutUint16(p[h.ip+ipv4Total:], uint16(h.len-h.ip+n))
	p[h.ip+ipv4Sum], p[h.ip+ipv4Sum+1] = 0, 0
	putSum(p[h.ip+ipv4Sum:], sum(p[h.ip:h.ip+ipv4Len], 0))
}

// length is the length of the data that a frame's header tells.
func (h headers) length(p []byte) int {
	if h.six {
		return int(binary.BigEndian.Uint16(p[h.ip+ipv6Payload:])) - (h.len - h.tcp)
	}
	return int(binary.BigEndian.Uint16(p[h.ip+ipv4Total:])) - (h.len - h.ip)
}
