package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// kernel is a socket that takes and gives packets as the file of a TAP
// interface does.
func kernel(t testing.TB) (ours, theirs int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return fds[0], fds[1]
}

// slowSum is the checksum of RFC 1071, as its text says it.
func slowSum(parts ...[]byte) uint16 {
	p := bytes.Join(parts, nil)
	if len(p)%2 == 1 {
		p = append(p, 0)
	}
	var s uint32
	for i := 0; i < len(p); i += 2 {
		s += uint32(p[i])<<8 | uint32(p[i+1])
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// segment is a TCP segment in a frame, before and after it is written as bytes.
type segment struct {
	six     bool
	options []byte // of TCP
	seq     uint32
	id      uint16
	flags   byte
	vlan    bool
	change  func(p []byte) // the bytes, before the checksums
	spoil   func(p []byte) // and after
	data    []byte
}

// frame writes a segment; without sums, and then only the pseudo header's, if
// partial.
func (s segment) frame(partial bool) []byte {
	p := []byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1}
	if s.vlan {
		p = append(p, 0x81, 0, 0, 5)
	}
	tcp := 20 + len(s.options)
	var pseudo []byte
	ip := len(p) + 2
	if s.six {
		p = append(p, 0x86, 0xdd, 0x60, 0, 0, 0)
		p = binary.BigEndian.AppendUint16(p, uint16(tcp+len(s.data)))
		p = append(p, 6, 64)
		addresses := make([]byte, 32)
		addresses[15], addresses[31] = 1, 2
		p = append(p, addresses...)
		pseudo = append(addresses, 0, 0, byte((tcp+len(s.data))>>8), byte(tcp+len(s.data)), 0, 0, 0, 6)
	} else {
		p = append(p, 0x08, 0, 0x45, 0)
		p = binary.BigEndian.AppendUint16(p, uint16(20+tcp+len(s.data)))
		p = binary.BigEndian.AppendUint16(p, s.id)
		p = append(p, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2)
		pseudo = []byte{10, 0, 0, 1, 10, 0, 0, 2, 0, 6, byte((tcp + len(s.data)) >> 8), byte(tcp + len(s.data))}
	}
	at := len(p)
	p = append(p, 0x12, 0x34, 0, 22)
	p = binary.BigEndian.AppendUint32(p, s.seq)
	p = append(p, 1, 2, 3, 4, byte(tcp/4)<<4, s.flags, 9, 9, 0, 0, 0, 0)
	p = append(append(p, s.options...), s.data...)
	if s.change != nil {
		s.change(p[ip:])
	}
	if !s.six {
		binary.BigEndian.PutUint16(p[ip+10:], slowSum(p[ip:ip+20]))
	}
	if partial {
		binary.BigEndian.PutUint16(p[at+16:], ^slowSum(pseudo))
	} else {
		binary.BigEndian.PutUint16(p[at+16:], slowSum(pseudo, p[at:]))
	}
	if s.spoil != nil {
		s.spoil(p[ip:])
	}
	return p
}

func (s segment) headers() int {
	n := 14 + 20 + 20 + len(s.options)
	if s.six {
		n += 20
	}
	return n
}

// prefixed is what the kernel gives or takes.
func prefixed(flags, kind byte, headers, size, start, offset int, frame []byte) []byte {
	p := []byte{flags, kind}
	for _, v := range []int{headers, size, start, offset} {
		p = binary.NativeEndian.AppendUint16(p, uint16(v))
	}
	return append(p, frame...)
}

// piece is a long segment as the kernel has it.
func (s segment) piece(size int) []byte {
	kind := byte(1)
	if s.six {
		kind = 4
	}
	start := s.headers() - 20 - len(s.options)
	return prefixed(1, kind, s.headers(), size, start, 16, s.frame(true))
}

// cut is the frames that a segment has to become.
func (s segment) cut(size int) (frames [][]byte) {
	rest := s.data
	for i := 0; len(rest) > 0; i++ {
		one := s
		n := min(size, len(rest))
		one.data, rest = rest[:n], rest[n:]
		one.seq += uint32(i * size)
		one.id += uint16(i)
		if i > 0 {
			one.flags &^= 0x80
		}
		if len(rest) > 0 {
			one.flags &^= 0x09
		}
		frames = append(frames, one.frame(false))
	}
	return frames
}

var timestamps = []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}

func random(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rand.Uint32())
	}
	return p
}

// TestSplit has pieces of all kinds in turn, so that guesses are right and
// wrong, with as many slots as there may be.
func TestSplit(t *testing.T) {
	const mtu = 1500
	ours, theirs := kernel(t)
	in := newSplitter(ours, transfer)
	memory := make([][]byte, maxFrames)
	for i := range memory {
		memory[i] = make([]byte, mtu+18)
	}
	for round := range 600 {
		var want [][]byte
		var packet []byte
		s := segment{six: rand.IntN(2) == 0, seq: rand.Uint32(), id: uint16(rand.Uint32()), flags: 0x10 | byte(rand.IntN(256))&0x89}
		if rand.IntN(2) == 0 {
			s.options = timestamps
		}
		size := mtu + 14 - s.headers()
		if rand.IntN(4) == 0 {
			size = 1 + rand.IntN(size)
		}
		switch kind := rand.IntN(4); {
		case kind < 2 || round%100 < 5:
			s.data = random(1 + size + rand.IntN(65535-size-100))
			packet, want = s.piece(size), s.cut(size)
		case kind == 2: // a sum to be completed
			s.data = random(rand.IntN(size))
			start := s.headers() - 20 - len(s.options)
			packet, want = prefixed(1, 0, 0, 0, start, 16, s.frame(true)), [][]byte{s.frame(false)}
		default:
			frame := random(14 + rand.IntN(mtu+1))
			packet, want = prefixed(0, 0, 0, 0, 0, 0, frame), [][]byte{frame}
		}
		if err := unix.Send(theirs, packet, 0); err != nil {
			t.Fatal(err)
		}
		for first := true; len(want) > 0; first = false {
			n := min(in.wanted(), 1+rand.IntN(maxFrames))
			copy(in.frames[:n], memory)
			lengths, err := in.next(n)
			if err != nil {
				t.Fatalf("round %d, first %v: %v", round, first, err)
			}
			if len(lengths) > len(want) || len(lengths) == 0 {
				t.Fatalf("round %d: %d frames, want %d", round, len(lengths), len(want))
			}
			for i, n := range lengths {
				if !bytes.Equal(in.frames[i][:n], want[i]) {
					t.Fatalf("round %d: frame:\n%x\nwant\n%x", round, in.frames[i][:n], want[i])
				}
			}
			want = want[len(lengths):]
		}
	}
	if _, err := in.next(1); err != unix.EAGAIN {
		t.Errorf("afterwards: %v", err)
	}
}

// TestSplitTruncated has what does not fit, and what no kernel sends.
func TestSplitTruncated(t *testing.T) {
	ours, theirs := kernel(t)
	in := newSplitter(ours, transfer)
	s := segment{data: random(4000)}
	for name, packet := range map[string][]byte{
		"frame":                         prefixed(0, 0, 0, 0, 0, 0, random(1519)),
		"sum beyond the end":            prefixed(1, 0, 0, 0, 90, 16, random(100)),
		"piece without TCP":             prefixed(1, 1, 54, 1000, 34, 16, random(3000)),
		"piece of frames of 0":          prefixed(1, 1, 54, 0, 34, 16, s.frame(true)),
		"piece of frames above the MTU": s.piece(1501),
	} {
		unix.Send(theirs, packet, 0)
		in.frames[0] = make([]byte, 1518)
		if lengths, err := in.next(1); !errors.Is(err, errTruncated) {
			t.Errorf("%s: %v, %v", name, lengths, err)
		}
	}
}

// TestSplitSmallerMTU has slots become smaller between two pieces, and within
// one.
func TestSplitSmallerMTU(t *testing.T) {
	ours, theirs := kernel(t)
	in := newSplitter(ours, transfer)
	slots := func(n, mtu int) {
		for i := range n {
			in.frames[i] = make([]byte, mtu+18)
		}
	}
	long, short := segment{data: random(10 * 1460)}, segment{data: random(100)}
	for range 2 { // the first one teaches the guess
		unix.Send(theirs, long.piece(1460), 0)
		slots(maxFrames, 1500)
		if lengths, err := in.next(in.wanted()); err != nil || len(lengths) == 0 {
			t.Fatal(lengths, err)
		}
		for len(in.rest) > 0 {
			in.next(in.wanted())
		}
	}
	unix.Send(theirs, prefixed(0, 0, 0, 0, 0, 0, short.frame(false)), 0)
	slots(maxFrames, 576)
	if lengths, err := in.next(in.wanted()); err != nil || len(lengths) != 1 || !bytes.Equal(in.frames[0][:lengths[0]], short.frame(false)) {
		t.Errorf("after the guess: %v, %v", lengths, err)
	}
	unix.Send(theirs, long.piece(1460), 0)
	slots(2, 1500)
	if lengths, err := in.next(2); err != nil || len(lengths) != 2 {
		t.Fatal(lengths, err)
	}
	slots(2, 576)
	if lengths, err := in.next(2); !errors.Is(err, errTruncated) {
		t.Errorf("the rest: %v, %v", lengths, err)
	}
	unix.Send(theirs, short.piece(50), 0)
	if lengths, err := in.next(2); err != nil || len(lengths) != 2 {
		t.Errorf("another one: %v, %v", lengths, err)
	}
}

// TestMerge has the frames of a long segment become one again.
func TestMerge(t *testing.T) {
	ours, theirs := kernel(t)
	written := 0
	out := newMerger(ours, transfer, func(n int, err error) {
		if err != nil {
			t.Error(err)
		}
		written += n
	})
	got := make([]byte, 1<<17)
	for range 300 {
		s := segment{six: rand.IntN(2) == 0, seq: rand.Uint32(), id: uint16(rand.Uint32()), flags: 0x10 | byte(rand.IntN(2))<<3}
		if rand.IntN(2) == 0 {
			s.options = timestamps
		}
		size := 1 + rand.IntN(1448)
		s.data = random(min(65000, 1+size+rand.IntN((maxFrames-1)*size)))
		frames := s.cut(size)
		written = 0
		out.write(frames)
		n, err := unix.Read(theirs, got)
		if err != nil {
			t.Fatal(err)
		}
		if want := s.piece(size); !bytes.Equal(got[:n], want) {
			t.Fatalf("%d bytes of %d in frames of %d\n%x\nwant\n%x", n, len(s.data), size, got[:n], want)
		}
		if written != len(frames) {
			t.Errorf("%d frames counted, want %d", written, len(frames))
		}
	}
}

// TestMergeNot has two frames in turn which must stay two: as they were.
func TestMergeNot(t *testing.T) {
	flags := func(f byte) func(a, b *segment) { return func(_, b *segment) { b.flags = f } }
	change := func(at int) func(a, b *segment) {
		return func(_, b *segment) { b.change = func(p []byte) { p[at] ^= 1 } }
	}
	spoil := func(at int) func(a, b *segment) {
		return func(_, b *segment) { b.spoil = func(p []byte) { p[at] ^= 1 } }
	}
	for _, c := range []struct {
		name string
		do   func(a, b *segment)
	}{
		{"gap", func(_, b *segment) { b.seq++ }},
		{"again", func(a, b *segment) { b.seq = a.seq }},
		{"pushed before", func(a, _ *segment) { a.flags |= 8 }},
		{"shorter before", func(a, b *segment) { a.data = a.data[1:]; b.seq-- }},
		{"FIN", flags(0x11)}, {"SYN", flags(0x12)}, {"RST", flags(0x14)}, {"URG", flags(0x30)}, {"ECE", flags(0x50)}, {"CWR", flags(0x90)}, {"no ACK", flags(0)},
		{"no data", func(_, b *segment) { b.data = nil }},
		{"other options", func(_, b *segment) { b.options = bytes.Replace(timestamps, []byte{0, 0, 0, 1}, []byte{0, 0, 0, 3}, 1) }},
		{"fewer options", func(_, b *segment) { b.options = nil }},
		{"other IP version", func(a, b *segment) { b.six = !a.six }},
		{"service", change(1)},
		{"hops", func(_, b *segment) { b.change = func(p []byte) { p[map[bool]int{false: 8, true: 7}[b.six]]-- } }},
		{"tagged", func(a, b *segment) { a.vlan, b.vlan = true, true }},
		{"wrong TCP checksum", func(_, b *segment) { b.spoil = func(p []byte) { p[len(p)-1] ^= 1 } }},
		{"wrong TCP checksum before", func(a, _ *segment) { a.spoil = func(p []byte) { p[len(p)-1] ^= 1 } }},
		{"padded", func(_, b *segment) { b.data = b.data[:4] }},
		{"IP only: wrong checksum", spoil(10)},
		{"IP only: fragments may be made", func(_, b *segment) { b.change = func(p []byte) { p[6] = 0 } }},
		{"IP only: a fragment", func(_, b *segment) { b.change = func(p []byte) { p[7] = 3 } }},
		{"IP only: more fragments", func(_, b *segment) { b.change = func(p []byte) { p[6] |= 0x20 } }},
		{"UDP", func(_, b *segment) { b.spoil = func(p []byte) { p[map[bool]int{false: 9, true: 6}[b.six]] = 17 } }},
	} {
		for _, six := range []bool{false, true} {
			if six && c.name[:2] == "IP" {
				continue
			}
			t.Run(fmt.Sprintf("%s, IPv6 %v", c.name, six), func(t *testing.T) {
				ours, theirs := kernel(t)
				a := segment{six: six, seq: 1, flags: 0x10, options: timestamps, data: random(100)}
				b := a
				b.seq, b.id = 101, 1
				b.data = random(100)
				c.do(&a, &b)
				want := [][]byte{a.frame(false), b.frame(false)}
				if c.name == "padded" {
					want[1] = append(want[1], 0, 0)
				}
				out := newMerger(ours, transfer, func(_ int, err error) {
					if err != nil {
						t.Error(err)
					}
				})
				out.write(want)
				got := make([]byte, 1<<12)
				for _, w := range want {
					n, err := unix.Read(theirs, got)
					if err != nil || !bytes.Equal(got[:n], append(make([]byte, vnetLen), w...)) {
						t.Fatalf("%x, %v\nwant\n%x", got[:max(n, 0)], err, w)
					}
				}
			})
		}
	}
}

// TestMergeLong has as much as an IP packet takes, and more.
func TestMergeLong(t *testing.T) {
	for _, six := range []bool{false, true} {
		ours, theirs := kernel(t)
		s := segment{six: six, flags: 0x10, data: random(8000)}
		var frames [][]byte
		for range 12 {
			frames = append(frames, s.frame(false))
			s.seq += 8000
		}
		out := newMerger(ours, transfer, func(int, error) {})
		out.write(frames)
		got, total := make([]byte, 1<<17), 0
		for range 2 {
			n, err := unix.Read(theirs, got)
			if err != nil {
				t.Fatal(err)
			}
			if n > vnetLen+14+65535 {
				t.Errorf("a piece of %d bytes", n)
			}
			total += n - vnetLen - s.headers()
		}
		if total != 12*8000 {
			t.Errorf("%d bytes, want %d", total, 12*8000)
		}
	}
}

// FuzzMerge merges what a peer may send, and loses nothing of it: what the
// kernel would make of the result again are the same frames.
func FuzzMerge(f *testing.F) {
	s := segment{flags: 0x18, options: timestamps, data: random(300)}
	f.Add(bytes.Join(s.cut(100), nil), 100+s.headers())
	s.six = true
	f.Add(bytes.Join(s.cut(100), nil), 100+s.headers())
	f.Fuzz(func(t *testing.T, p []byte, size int) {
		if size < 14 || size > 1<<12 || len(p) > 1<<14 {
			return
		}
		ours, theirs := kernel(t)
		var frames [][]byte
		for len(p) > 0 && len(frames) < maxFrames {
			n := min(size, len(p))
			frames, p = append(frames, p[:n]), p[n:]
		}
		given := 0
		out := newMerger(ours, transfer, func(n int, _ error) { given += n })
		out.write(frames)
		if given != len(frames) {
			t.Errorf("%d frames written, of %d", given, len(frames))
		}
		in := newSplitter(theirs, transfer)
		for len(frames) > 0 {
			for i := range in.frames {
				in.frames[i] = make([]byte, 1<<12)
			}
			lengths, err := in.next(in.wanted())
			if err != nil {
				t.Fatal(err)
			}
			for i, n := range lengths {
				same := bytes.Equal(in.frames[i][:n], frames[i])
				if h, ok := parse(frames[i]); ok && !same && !h.six {
					// The packet's number may be another.
					a, b := bytes.Clone(in.frames[i][:n]), bytes.Clone(frames[i])
					for _, q := range [][]byte{a, b} {
						clear(q[h.ip+ipv4ID : h.ip+ipv4ID+2])
						clear(q[h.ip+ipv4Sum : h.ip+ipv4Sum+2])
					}
					same = bytes.Equal(a, b)
				}
				if !same {
					t.Fatalf("%x\nwas\n%x", in.frames[i][:n], frames[i])
				}
			}
			frames = frames[len(lengths):]
		}
	})
}

func BenchmarkSum(b *testing.B) {
	p := random(1448)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		sum(p, 0)
	}
}
