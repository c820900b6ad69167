package tap

import (
	"encoding/binary"
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxPiece is more than what the kernel gives at a time.
const maxPiece = 65536 + 256

// patience is how many frames may come one by one before the guess is given up.
const patience = 64

// maxFrames is how many frames are moved at a time. It is enough for 64 KiB in
// frames of 1500 bytes.
const maxFrames = 48

// errTruncated says that a frame was longer than the MTU allows.
var errTruncated = errors.New("longer than the MTU")

// splitter reads from the interface into slots, and makes frames of what is a
// long piece of a TCP stream. The data of such a piece is read to where it
// belongs, by guessing that its headers and frames are as long as the last
// one's; where the guess is wrong it is copied.
type splitter struct {
	fd     int
	move   mover
	frames [maxFrames][]byte // slots
	n      int               // of them
	// The guess. Without one, size is 0, and frames are read one by one.
	head, size int
	alone      int // frames that came one by one since it helped

	prefix   [vnetLen]byte
	overflow []byte // what does not fit is read there
	copied   []byte // what was guessed wrongly is put in order there
	iovs     [maxFrames + 2]unix.Iovec
	lengths  [maxFrames]int

	// The piece of which there is a rest, and its headers.
	headers
	first [maxHeaders]byte
	rest  []byte // data in overflow, or copied
	made  int    // frames of the piece so far
}

func newSplitter(fd int, move mover) *splitter {
	return &splitter{fd: fd, move: move, overflow: make([]byte, maxPiece), copied: make([]byte, maxPiece)}
}

// wanted is how many slots are useful now.
func (s *splitter) wanted() int {
	switch {
	case len(s.rest) > 0:
		return min(maxFrames, (len(s.rest)+s.size-1)/s.size)
	case s.size == 0:
		return 1
	}
	return min(maxFrames, 65536/s.size+1)
}

// next fills slots, the first n of frames, and returns the lengths of the frames
// in them. The errors are those of read(2), and errTruncated.
func (s *splitter) next(n int) ([]int, error) {
	s.n = n
	if s.head+s.size > len(s.frames[0]) { // the MTU has become smaller
		lost := len(s.rest) > 0
		s.size, s.rest = 0, nil
		if lost {
			return nil, errTruncated
		}
	}
	if len(s.rest) > 0 {
		return s.more(0), nil
	}
	total, err := s.read()
	if err != nil {
		return nil, err
	}
	if s.prefix[vnetGSOType] != gsoNone {
		s.alone = 0
		return s.split(total)
	}
	if s.alone++; s.alone == patience {
		defer func() { s.size = 0 }()
	}
	s.gather(total)
	if total > len(s.frames[0]) {
		return nil, errTruncated
	}
	p := s.frames[0][:total]
	if s.prefix[vnetFlags]&needsSum != 0 {
		start := int(binary.NativeEndian.Uint16(s.prefix[vnetSumStart:]))
		at := start + int(binary.NativeEndian.Uint16(s.prefix[vnetSumOffset:]))
		if start > at || at+2 > total {
			return nil, errTruncated
		}
		c := ^fold(sum(p[start:], 0))
		if c == 0 { // which UDP has for none, and is the same number
			c = 0xffff
		}
		binary.NativeEndian.PutUint16(p[at:], c)
	}
	s.lengths[0] = total
	return s.lengths[:1], nil
}

// read reads a frame, or a piece, to where the guess says.
func (s *splitter) read() (int, error) {
	iovs := s.iovs[:0]
	add := func(p []byte) {
		v := unix.Iovec{Base: &p[0]}
		v.SetLen(len(p))
		iovs = append(iovs, v)
	}
	add(s.prefix[:])
	if s.size == 0 {
		add(s.frames[0])
	} else {
		add(s.frames[0][:s.head+s.size])
		for _, p := range s.frames[1:s.n] {
			add(p[s.head : s.head+s.size])
		}
	}
	add(s.overflow)
	total, err := s.move(unix.SYS_READV, s.fd, iovs)
	if err == nil && total < vnetLen {
		err = unix.EIO
	}
	return total - vnetLen, err
}

// mover is transfer, or what measures it.
type mover func(call uintptr, fd int, iovs []unix.Iovec) (int, error)

// transfer is readv(2) or writev(2). They do not block, so the scheduler need not
// know: it would take away what runs Go code after 20 us, which long pieces
// take.
func transfer(call uintptr, fd int, iovs []unix.Iovec) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&iovs[0])), uintptr(len(iovs)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		}
		return 0, errno
	}
}

// gather puts a frame that was read by a wrong guess into the first slot, as far
// as it fits.
func (s *splitter) gather(total int) {
	if s.size != 0 && total > s.head+s.size {
		s.linear(s.frames[0], s.head+s.size, total)
	}
}

// linear copies what was read, from byte begin to end, to its place in p.
func (s *splitter) linear(p []byte, begin, end int) {
	at := 0 // of a piece of memory in what was read
	piece := func(m []byte) {
		from, to := max(begin, at), min(end, at+len(m))
		if from < to && from < len(p) {
			copy(p[from:], m[from-at:to-at])
		}
		at += len(m)
	}
	if s.size == 0 {
		piece(s.frames[0])
	} else {
		piece(s.frames[0][:s.head+s.size])
		for _, m := range s.frames[1:s.n] {
			piece(m[s.head : s.head+s.size])
		}
	}
	piece(s.overflow)
}

// split makes frames of a piece.
func (s *splitter) split(total int) ([]int, error) {
	size := int(binary.NativeEndian.Uint16(s.prefix[vnetGSOSize:]))
	begin := min(total, maxHeaders)
	s.linear(s.first[:], 0, begin)
	h, ok := parse(s.first[:begin])
	if !ok || size == 0 || h.len+size > len(s.frames[0]) || total > maxPiece {
		return nil, errTruncated // no kernel does
	}
	s.headers, s.made = h, 0
	if h.len == s.head && size == s.size {
		inSlots := s.head + s.n*s.size
		if total > inSlots {
			s.rest = s.overflow[:total-inSlots]
		}
		return s.finish(min(total, inSlots) - s.head), nil
	}
	// A wrong guess: put the data behind all that was read, and begin anew.
	s.linear(s.copied, 0, total)
	s.head, s.size = h.len, size
	s.rest = s.copied[h.len:total]
	return s.more(0), nil
}

// more makes frames of the rest of a piece.
func (s *splitter) more(n int) []int {
	for n < s.n && len(s.rest) > 0 {
		m := copy(s.frames[n][s.head:s.head+s.size], s.rest)
		s.rest = s.rest[m:]
		s.label(n, m, len(s.rest) == 0)
		n++
	}
	return s.lengths[:n]
}

// finish makes frames of data of n bytes that is in its slots.
func (s *splitter) finish(n int) []int {
	i := 0
	for ; n > 0; i++ {
		m := min(n, s.size)
		n -= m
		s.label(i, m, n == 0 && len(s.rest) == 0)
	}
	return s.lengths[:i]
}

// label writes the headers of the frame in a slot that has m bytes of data, which
// may be the last ones of the piece.
func (s *splitter) label(slot, m int, last bool) {
	h, p := s.headers, s.frames[slot]
	p = p[:h.len+m]
	copy(p, s.first[:h.len])
	i := s.made
	s.made++
	seq := p[h.tcp+tcpSeq:]
	binary.BigEndian.PutUint32(seq, binary.BigEndian.Uint32(seq)+uint32(i*s.size))
	if !h.six {
		id := p[h.ip+ipv4ID:]
		binary.BigEndian.PutUint16(id, binary.BigEndian.Uint16(id)+uint16(i))
	}
	if i > 0 {
		p[h.tcp+tcpFlags] &^= flagCWR
	}
	if !last {
		p[h.tcp+tcpFlags] &^= flagFIN | flagPSH
	}
	h.setLength(p, m)
	p[h.tcp+tcpSum], p[h.tcp+tcpSum+1] = 0, 0
	putSum(p[h.tcp+tcpSum:], sum(p[h.tcp:], h.pseudo(p, len(p)-h.tcp)))
	s.lengths[slot] = len(p)
}
