package vfiouser_test

import (
	"encoding/binary"
	"errors"
	"math"
	"testing"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

// sent is a request on its way to a server.
type sent struct {
	id, cmd uint16
	last    bool // the server must close after it
}

// requests cuts a client's bytes into the requests that need a reply, by the
// rules of the protocol. The first may have at most limit bytes.
func requests(stream []byte, limit uint32) (list []sent) {
	for len(stream) >= 16 {
		size, flags := binary.LittleEndian.Uint32(stream[4:]), binary.LittleEndian.Uint32(stream[8:])
		r := sent{id: binary.LittleEndian.Uint16(stream), cmd: binary.LittleEndian.Uint16(stream[2:])}
		r.last = flags&0xf != 0 || size < 16 || size > limit
		limit = 32 + 1<<20
		if flags&0x10 == 0 && (r.last || uint64(len(stream)) >= uint64(size)) {
			list = append(list, r)
		}
		if r.last || uint64(len(stream)) < uint64(size) {
			break
		}
		stream = stream[size:]
	}
	return list
}

// FuzzServer sends arbitrary bytes, cut in two, with descriptors on both
// halves, then closes. Every complete request must have exactly one
// well-formed reply, in order, and no descriptor may stay open.
func FuzzServer(f *testing.F) {
	le := func(parts ...any) []byte { return cat(parts...) }
	seeds := [][]byte{
		message(1, 4, 16, 0, 0, 0),
		message(1, 5, 80, 0, 2, 0, uint64(0), uint64(0)),
		message(1, 6, 512, 0, 0, 0),
		message(1, 7, 16, 0, 2, 0),
		message(1, 8, 20, trigger|event, 2, 0, 2),
		message(1, 8, 22, trigger|boolean, 2, 0, 2, uint16(1)),
		message(1, 8, 20, trigger|none, 2, 0, 0),
		message(1, 9, uint64(0), 0, 4),
		message(1, 10, uint64(0), 0, 4, 7),
		message(1, 2, 32, 3, uint64(0), uint64(0), uint64(4096)),
		message(1, 3, 24, 0, uint64(0), uint64(4096)),
		le(message(1, 13), message(2, 15, uint64(0)), message(3, 16, 8, 0)),
		le(uint16(1), uint16(4), 15, 0, 0),
		le(uint16(1), uint16(4), 16, 1, 0),
	}
	for _, s := range seeds {
		f.Add(s, uint16(len(s)), byte(2), byte(0), true)
	}
	f.Add(message(0, 1, uint16(0), uint16(0), qemuJSON, byte(0)), uint16(30), byte(0), byte(0), false)
	f.Fuzz(func(t *testing.T, stream []byte, cut uint16, fds1, fds2 byte, greet bool) {
		if len(stream) > 1<<16 {
			return
		}
		var s *served
		limit := uint32(32 + 1<<20)
		if greet {
			s = greeted(t)
		} else {
			s, limit = serve(t, vfiouser.ServerOptions{}), 4096
		}
		fd := s.dev.mem
		pass := func(n byte) (fds []int) {
			for range n % 20 {
				fds = append(fds, fd)
			}
			return fds
		}
		at := min(int(cut), len(stream))
		written := make(chan bool)
		go func() {
			s.tryWrite(stream[:at], pass(fds1)...) // the server may close before
			s.tryWrite(stream[at:], pass(fds2)...)
			unix.Shutdown(s.fd, unix.SHUT_WR)
			close(written)
		}()
		want := requests(stream, limit)
		n := 0
		for ; ; n++ {
			header, fds, err := s.readFull(16)
			if len(header) == 0 {
				closeAll(fds)
				if err != nil && err != unix.ECONNRESET {
					t.Errorf("end of the replies: %v", err)
				}
				break
			}
			if len(header) < 16 {
				t.Fatalf("a piece of a header: %x", header)
			}
			size, flags, errno := binary.LittleEndian.Uint32(header[4:]), binary.LittleEndian.Uint32(header[8:]), binary.LittleEndian.Uint32(header[12:])
			payload, more, err := s.readFull(int(size) - 16)
			closeAll(append(fds, more...))
			if len(payload) != int(size)-16 || err != nil {
				t.Fatalf("header %x, but a payload of %d bytes, %v", header, len(payload), err)
			}
			good := flags == 1 && errno == 0
			bad := flags == 0x21 && size == 16 && errno > 0 && errno <= 4095
			if !good && !bad {
				t.Errorf("header %x is no reply", header)
			}
			if n >= len(want) {
				t.Fatalf("reply %x to nothing", header)
			}
			if id, cmd := binary.LittleEndian.Uint16(header), binary.LittleEndian.Uint16(header[2:]); id != want[n].id || cmd != want[n].cmd {
				t.Fatalf("reply %x, expected one to %+v", header, want[n])
			}
			if want[n].last && !bad {
				t.Errorf("reply %x to a broken header", header)
			}
		}
		<-written
		if err := s.wait(t); greet && fds1%20 <= 8 && fds2%20 <= 8 && n != len(want) {
			t.Errorf("%d replies to %d requests; Run: %v", n, len(want), err)
		}
	})
}

// What the fuzzed client does, in this order.
var clientCalls = []struct {
	cmd  uint16
	call func(t *testing.T, c *vfiouser.Client) error
}{
	{4, func(t *testing.T, c *vfiouser.Client) error {
		d, err := c.Info()
		if err == nil && (d.NumRegions > 100 || d.NumIRQs > 50) {
			t.Errorf("%+v", d)
		}
		return err
	}},
	{5, func(t *testing.T, c *vfiouser.Client) error {
		r, err := c.Region(2)
		checkFuzzedRegion(t, r, err)
		return err
	}},
	{7, func(t *testing.T, c *vfiouser.Client) error {
		irq, err := c.IRQ(2)
		if err == nil && irq.Count > 1<<16 {
			t.Errorf("%+v", irq)
		}
		return err
	}},
	{9, func(t *testing.T, c *vfiouser.Client) error { return c.ReadRegion(0, 4, make([]byte, 4)) }},
	{10, func(t *testing.T, c *vfiouser.Client) error { return c.WriteRegion(0, 4, make([]byte, 4)) }},
	{5, func(t *testing.T, c *vfiouser.Client) error { // two messages: 5 and 6
		list, err := c.IOFDs(0)
		closed := map[int]bool{}
		for _, f := range list {
			if f.Size > 8 || f.Offset > math.MaxUint64-f.Size {
				t.Errorf("%+v", f)
			}
			if !closed[f.FD] && unix.Close(f.FD) != nil {
				t.Errorf("%+v: not an open descriptor", f)
			}
			closed[f.FD] = true
		}
		return err
	}},
	{6, nil},
	{8, func(t *testing.T, c *vfiouser.Client) error {
		return c.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger, Count: 1})
	}},
	{2, func(t *testing.T, c *vfiouser.Client) error { return c.DMAMap(vfiouser.DMARegion{Size: 4096, FD: -1}) }},
	{3, func(t *testing.T, c *vfiouser.Client) error { return c.DMAUnmap(0, 4096) }},
	{13, func(t *testing.T, c *vfiouser.Client) error { return c.Reset() }},
}

func checkFuzzedRegion(t *testing.T, r vfiouser.Region, err error) {
	if err != nil || r.Flags&vfiouser.RegionMmap == 0 {
		if r.FD != -1 || len(r.Areas) != 0 {
			t.Errorf("%+v, %v", r, err)
		}
		return
	}
	defer unix.Close(r.FD)
	var st unix.Stat_t
	if err := unix.Fstat(r.FD, &st); err != nil {
		t.Fatalf("%+v: %v", r, err)
	}
	areas := r.Areas
	if len(areas) == 0 {
		areas = []vfiouser.Area{{Offset: 0, Size: r.Size}}
	}
	for _, a := range areas {
		end := a.Offset + a.Size
		if end < a.Offset || end > r.Size || end+r.FileOffset < end || end+r.FileOffset > uint64(st.Size) || (a.Offset|a.Size|r.FileOffset)%4096 != 0 {
			t.Errorf("%+v in a file of %d bytes", r, st.Size)
		}
	}
}

// Kinds of a piece of fuzzed input for the client, in its first byte's lower
// half; the upper half is the number of descriptors.
const (
	pieceRaw     = iota // bytes as they are
	pieceReply          // payload of the reply to the next planned request
	pieceAgain          // the same for one more of the same command
	pieceError          // error reply; the payload's first bytes are the number
	pieceCommand        // a command of the server
	pieces
)

// piece is [kind and descriptors] [length, two bytes] [bytes].
func piece(kind, fds int, payload ...any) []byte {
	p := cat(payload...)
	return cat(byte(kind|fds<<4), uint16(len(p)), p)
}

// FuzzClient lets a server say arbitrary things, mostly well framed, and
// close. Nothing that the client returns may point outside, and no descriptor
// may stay open.
func FuzzClient(f *testing.F) {
	region := regionReply(48+32, 15, 2, 32, 4*fakePage, 0, uint16(1), uint16(1), 0, 2, 0,
		uint64(0), uint64(fakePage), uint64(2*fakePage), uint64(fakePage))
	f.Add(cat(
		piece(pieceReply, 0, 16, 3, 9, 5),
		piece(pieceReply, 1, region),
		piece(pieceReply, 0, 16, 1, 2, 2048),
		piece(pieceCommand, 1, uint64(0), uint64(4096)),
		piece(pieceReply, 0, uint64(4), 0, 4, 99),
		piece(pieceReply, 0, uint64(4), 0, 4),
		piece(pieceReply, 0, 32, 3, 0, 0, uint64(4096), uint64(0)),
		piece(pieceReply, 1, 56, 0, 0, 1, uint64(12), uint64(4), 0, 0, 1, 0, uint64(7)),
		piece(pieceError, 0, 22),
		piece(pieceReply, 0),
		piece(pieceReply, 0, 24, 0, uint64(0), uint64(4096)),
		piece(pieceReply, 0),
	))
	f.Add(cat(
		piece(pieceError, 1, 5),
		piece(pieceReply, 1, regionReply(2000, 7, 2, 0, 4*fakePage, 0)),
		piece(pieceAgain, 1, region),
		piece(pieceRaw, 2, "rubbish"),
	))
	f.Add(piece(pieceRaw, 1, answer(2, 4, 16, 3, 9, 5)))
	f.Fuzz(func(t *testing.T, script []byte) {
		checkLeaks(t)
		peer, conn := newPair(t)
		file := memfd(t, 4*fakePage)
		// Request 1 is VERSION.
		peer.write(answer(1, 1, uint16(0), uint16(0), `{"capabilities":{"max_msg_fds":4}}`, byte(0)))
		id, planned := uint16(1), 0
		// All must fit the socket, as nobody reads yet.
		for count := 0; len(script) >= 3 && count < 30; count++ {
			kind, fds := script[0]&15%pieces, make([]int, script[0]>>4)
			n := min(int(binary.LittleEndian.Uint16(script[1:])), len(script)-3)
			payload := script[3 : 3+n]
			script = script[3+n:]
			for i := range fds {
				fds[i] = file
			}
			cmd := uint16(0)
			switch kind {
			case pieceReply, pieceError:
				if planned == len(clientCalls) {
					continue
				}
				cmd = clientCalls[planned].cmd
				planned++
				id++
			case pieceAgain:
				if planned == 0 {
					continue
				}
				cmd = clientCalls[planned-1].cmd
				id++
			}
			message := payload
			switch kind {
			case pieceReply, pieceAgain:
				message = answer(id, cmd, payload)
			case pieceError:
				message = cat(id, cmd, 16+len(payload), 0x21, len(payload), payload)
			case pieceCommand:
				message = cat(uint16(9), uint16(11), 16+len(payload), 0, 0, payload)
			}
			if len(message) > 0 {
				peer.write(message[:min(len(message), 1<<12)], fds...)
			}
		}
		unix.Shutdown(peer.fd, unix.SHUT_WR)
		c, err := vfiouser.NewClient(conn)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var dead *vfiouser.ConnectionError
		for _, step := range clientCalls {
			if step.call == nil {
				continue
			}
			err := step.call(t, c)
			if dead != nil && err != error(dead) {
				t.Errorf("command %d after the end: %v, not %v", step.cmd, err, dead)
			}
			var remote *vfiouser.RemoteError
			if err != nil && !errors.As(err, &remote) && !errors.As(err, &dead) {
				t.Errorf("command %d: %v is neither the server's nor the connection's end", step.cmd, err)
			}
		}
	})
}
