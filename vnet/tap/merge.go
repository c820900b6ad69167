package tap

import (
	"bytes"
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIP is the length of the longest IP packet.
const maxIP = 65535

// merger writes frames to the interface: those of a TCP stream that follow one
// another, and whose checksums are right, in one piece. The frames are in the
// peer's hands, so headers are copied before they are looked at.
type merger struct {
	fd     int
	move   mover
	most   int // frames in a piece
	prefix [vnetLen]byte
	iovs   []unix.Iovec

	// The piece that is being made, of count frames.
	count int
	headers
	first [maxHeaders]byte // headers of the first frame
	size  int              // data of each frame but the last
	data  int              // of all
	seq   uint32           // of the next frame
	open  bool             // there may be another one
	done  func(frames int, err error)
}

// newMerger returns one that tells done how many frames were written, or not
// and why.
func newMerger(fd int, move mover, done func(frames int, err error)) *merger {
	return &merger{fd: fd, move: move, most: maxFrames, iovs: make([]unix.Iovec, 0, 2+maxFrames), done: done}
}

// write writes frames. What is in them may change meanwhile.
func (m *merger) write(frames [][]byte) {
	for _, p := range frames {
		m.add(p)
	}
	m.flush()
}

// add adds a frame to the piece, or begins another one.
func (m *merger) add(p []byte) {
	var head [maxHeaders]byte
	n := copy(head[:], p)
	h, ok := parse(head[:n])
	ok = ok && m.mergeable(h, head[:n], p)
	if !ok || !m.follows(h, head[:], len(p)) {
		m.flush()
		m.begin(h, head)
		if ok {
			m.size, m.seq = len(p)-h.len, binary.BigEndian.Uint32(head[h.tcp+tcpSeq:])
		}
	}
	data := p
	if m.count > 0 {
		data = p[h.len:]
	} else if ok {
		// The headers are written from their copy, here and in the piece.
		m.addPart(m.first[:h.len])
		data = p[h.len:]
	}
	m.addPart(data)
	m.count++
	if !ok {
		m.open = false
		return
	}
	m.data += len(p) - h.len
	m.seq += uint32(len(p) - h.len)
	push := head[h.tcp+tcpFlags] & flagPSH
	m.first[h.tcp+tcpFlags] |= push
	m.open = push == 0 && len(p)-h.len == m.size
}

func (m *merger) addPart(p []byte) {
	if len(p) == 0 {
		return
	}
	v := unix.Iovec{Base: unsafe.SliceData(p)}
	v.SetLen(len(p))
	m.iovs = append(m.iovs, v)
}

// begin begins a piece with the headers of its first frame.
func (m *merger) begin(h headers, head [maxHeaders]byte) {
	m.headers, m.first = h, head
	m.iovs = m.iovs[:0]
	m.addPart(m.prefix[:])
	m.count, m.data, m.size = 0, 0, 0
	m.open = true
}

// mergeable reports whether a frame is one that others may follow, or that may
// follow others: data of a TCP stream, and nothing else, with checksums that
// are right.
func (m *merger) mergeable(h headers, head, p []byte) bool {
	const plain = 0x10 // ACK
	switch n := len(p) - h.len; {
	case n <= 0 || h.length(head) != n:
		return false
	case head[h.tcp+tcpFlags]&^flagPSH != plain:
		return false
	case !h.six && (binary.BigEndian.Uint16(head[h.ip+ipv4Fragment:]) != dontFragment || fold(sum(head[h.ip:h.tcp], 0)) != 0xffff):
		// Without "don't fragment" the number of the packet has a meaning.
		return false
	}
	s := sum(head[h.tcp:h.len], h.pseudo(head, len(p)-h.tcp))
	return fold(sum(p[h.len:], s)) == 0xffff
}

// follows reports whether a mergeable frame of n bytes belongs to the piece.
func (m *merger) follows(h headers, head []byte, n int) bool {
	n -= h.len
	switch {
	case m.count == 0 || !m.open || m.count == m.most:
		return false
	case h != m.headers || n > m.size || h.len-h.ip+m.data+n > maxIP:
		return false
	case binary.BigEndian.Uint32(head[h.tcp+tcpSeq:]) != m.seq:
		return false
	}
	// All else is the same, but lengths, numbers, checksums and PSH.
	a, b := m.first, [maxHeaders]byte(head)
	for _, p := range [...]*[maxHeaders]byte{&a, &b} {
		clear(p[h.tcp+tcpSeq : h.tcp+tcpSeq+4])
		clear(p[h.tcp+tcpSum : h.tcp+tcpSum+2])
		p[h.tcp+tcpFlags] &^= flagPSH
		if h.six {
			clear(p[h.ip+ipv6Payload : h.ip+ipv6Payload+2])
			continue
		}
		clear(p[h.ip+ipv4Total : h.ip+ipv4ID+2])
		clear(p[h.ip+ipv4Sum : h.ip+ipv4Sum+2])
	}
	return bytes.Equal(a[:h.len], b[:h.len])
}

// flush writes the piece.
func (m *merger) flush() {
	if m.count == 0 {
		return
	}
	clear(m.prefix[:])
	if m.count > 1 {
		h, p := m.headers, m.first[:m.headers.len]
		h.setLength(p, m.data)
		binary.NativeEndian.PutUint16(p[h.tcp+tcpSum:], fold(h.pseudo(p, h.len-h.tcp+m.data)))
		m.prefix[vnetFlags] = needsSum
		m.prefix[vnetGSOType] = gsoTCPv4
		if h.six {
			m.prefix[vnetGSOType] = gsoTCPv6
		}
		binary.NativeEndian.PutUint16(m.prefix[vnetHeaderLen:], uint16(h.len))
		binary.NativeEndian.PutUint16(m.prefix[vnetGSOSize:], uint16(m.size))
		binary.NativeEndian.PutUint16(m.prefix[vnetSumStart:], uint16(h.tcp))
		binary.NativeEndian.PutUint16(m.prefix[vnetSumOffset:], tcpSum)
	}
	_, err := m.move(unix.SYS_WRITEV, m.fd, m.iovs)
	m.done(m.count, err)
	m.count = 0
}
