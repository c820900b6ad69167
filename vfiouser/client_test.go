package vfiouser_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

const ourJSON = `{"capabilities":{"max_msg_fds":253,"max_data_xfer_size":1048576}}`

// scripted is a client whose server is the test.
type scripted struct {
	*rawPeer
	client *vfiouser.Client
}

// newScripted answers the VERSION request with version 0.0 and json.
func newScripted(t testing.TB, json string) *scripted {
	t.Helper()
	checkLeaks(t)
	peer, conn := newPair(t)
	s := &scripted{rawPeer: peer}
	err := s.during(func() (err error) {
		s.client, err = vfiouser.NewClient(conn)
		return err
	}, func() {
		id := s.request(1, uint16(0), uint16(1), ourJSON, byte(0))
		s.write(answer(id, 1, uint16(0), uint16(0), json, byte(0)))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.client.SetTimeout(patience); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.client.Close() })
	return s
}

// during runs script, the server's part, while call waits for it.
func (s *scripted) during(call func() error, script func()) error {
	s.t.Helper()
	done := make(chan error, 1)
	go func() { done <- call() }()
	script()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		s.t.Fatal("the call does not return")
		return nil
	}
}

// request reads one request, which must be this one, and returns its ID.
func (s *scripted) request(cmd uint16, payload ...any) uint16 {
	s.t.Helper()
	header, got, fds := s.read()
	if want := cat(cmd, 16+len(cat(payload...)), 0, 0); !bytes.Equal(header[2:], want) || !bytes.Equal(got, cat(payload...)) || len(fds) != 0 {
		s.t.Errorf("request %x %x with %d descriptors\nexpected   %x %x", header, got, len(fds), want, cat(payload...))
	}
	return binary.LittleEndian.Uint16(header)
}

func TestClientMessages(t *testing.T) {
	s := newScripted(t, `{"capabilities":{"max_msg_fds":2,"max_data_xfer_size":8}}`)
	c := s.client
	for _, m := range []struct {
		name    string
		call    func() error
		cmd     uint16
		request []byte
		reply   []byte
	}{
		{"Info", func() error {
			got, err := c.Info()
			if (got != vfiouser.DeviceInfo{PCI: true, NumRegions: 9, NumIRQs: 5}) {
				err = fmt.Errorf("%+v, %v", got, err)
			}
			return err
		}, 4, cat(16, 0, 0, 0), cat(16, 2, 9, 5)},
		{"IRQ", func() error {
			got, err := c.IRQ(2)
			if (got != vfiouser.IRQ{Flags: 9, Count: 2048}) {
				err = fmt.Errorf("%+v, %v", got, err)
			}
			return err
		}, 7, cat(16, 0, 2, 0), cat(16, 9, 2, 2048)},
		{"ReadRegion", func() error {
			b := make([]byte, 4)
			err := c.ReadRegion(0, 1<<33, b)
			if !bytes.Equal(b, []byte{1, 2, 3, 4}) {
				err = fmt.Errorf("%x, %v", b, err)
			}
			return err
		}, 9, cat(uint64(1<<33), 0, 4), cat(uint64(1<<33), 0, 4, "\x01\x02\x03\x04")},
		{"WriteRegion", func() error { return c.WriteRegion(7, 4, []byte{9, 8}) },
			10, cat(uint64(4), 7, 2, "\x09\x08"), cat(uint64(4), 7, 2)},
		{"Reset", c.Reset, 13, nil, nil},
		{"DMAMap", func() error { return c.DMAMap(vfiouser.DMARegion{Address: 1 << 40, Size: 8192, FD: -1}) },
			2, cat(32, 1, uint64(0), uint64(1<<40), uint64(8192)), nil},
		{"DMAUnmap", func() error { return c.DMAUnmap(1<<40, 8192) },
			3, cat(24, 0, uint64(1<<40), uint64(8192)), cat(24, 0, uint64(1<<40), uint64(8192))},
		{"DMAUnmap, header only", func() error { return c.DMAUnmap(1<<40, 8192) },
			3, cat(24, 0, uint64(1<<40), uint64(8192)), nil},
		{"SetIRQs disable", func() error { return c.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger}) },
			8, cat(20, trigger|none, 2, 0, 0), nil},
		{"SetIRQs bools", func() error {
			return c.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQMask, Start: 3, Count: 2, Bools: []byte{1, 0}})
		}, 8, cat(22, mask|boolean, 2, 3, 2, "\x01\x00"), nil},
		{"SetIRQs unmask", func() error { return c.SetIRQs(vfiouser.IRQSet{Index: 0, Action: vfiouser.IRQUnmask, Count: 1}) },
			8, cat(20, unmask|none, 0, 0, 1), nil},
		{"SetIRQs de-assign", func() error {
			return c.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger, Start: 1, Count: 5, EventFD: true})
		}, 8, cat(20, trigger|event, 2, 1, 5), nil},
		{"Region without anything", func() error {
			got, err := c.Region(3)
			if got.Size != 0 || got.Flags != 0 || got.FD != -1 {
				err = fmt.Errorf("%+v, %v", got, err)
			}
			return err
		}, 5, cat(1024, 0, 3, 0, uint64(0), uint64(0)), cat(32, 0, 3, 0, uint64(0), uint64(0))},
	} {
		err := s.during(m.call, func() {
			id := s.request(m.cmd, m.request)
			s.write(answer(id, m.cmd, m.reply))
		})
		if err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
	}
	// An access wider than the server takes goes in pieces.
	b := make([]byte, 20)
	err := s.during(func() error { return c.ReadRegion(0, 100, b) }, func() {
		for _, piece := range []struct {
			offset uint64
			count  int
		}{{100, 8}, {108, 8}, {116, 4}} {
			id := s.request(9, piece.offset, 0, piece.count)
			s.write(answer(id, 9, piece.offset, 0, piece.count, bytes.Repeat([]byte{byte(piece.offset)}, piece.count)))
		}
	})
	if err != nil || b[0] != 100 || b[8] != 108 || b[19] != 116 {
		t.Errorf("%x, %v", b, err)
	}
	// Eventfds, two per message.
	fds := []int{eventfd(t, 0), eventfd(t, 0), eventfd(t, 0)}
	err = s.during(func() error {
		return c.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger, Start: 4, Count: 3, EventFD: true, FDs: fds})
	}, func() {
		for _, piece := range []struct{ start, count int }{{4, 2}, {6, 1}} {
			header, payload, got := s.read()
			if !bytes.Equal(payload, cat(20, trigger|event, 2, piece.start, piece.count)) || len(got) != piece.count {
				t.Errorf("%x with %d descriptors", payload, len(got))
			}
			for i, fd := range got {
				unix.Write(fd, cat(uint64(1)))
				if counter(fds[piece.start-4+i]) != 1 {
					t.Error("another descriptor arrived")
				}
			}
			s.write(answer(binary.LittleEndian.Uint16(header), 8))
		}
	})
	if err != nil {
		t.Error(err)
	}
	err = s.during(func() error {
		return c.DMAMap(vfiouser.DMARegion{Address: 4096, Size: 4096, FD: fds[0], FileOffset: 8192, Writable: true})
	}, func() {
		header, payload, got := s.read()
		if !bytes.Equal(payload, cat(32, 3, uint64(8192), uint64(4096), uint64(4096))) || len(got) != 1 {
			t.Errorf("%x with %d descriptors", payload, len(got))
		}
		s.write(answer(binary.LittleEndian.Uint16(header), 2))
	})
	if err != nil {
		t.Error(err)
	}
	// Nothing to transfer is no message.
	if err := c.ReadRegion(0, 0, nil); err != nil {
		t.Error(err)
	}
}

// regionReply is a full answer with areas (offset, size)….
func regionReply(argsz, flags, index, capOffset int, size, offset uint64, rest ...any) []byte {
	return cat(argsz, flags, index, capOffset, size, offset, cat(rest...))
}

// TestClientRegionSteps: a server that gives the short answer first, as
// libvfio-user, with a descriptor that is too early.
func TestClientRegionSteps(t *testing.T) {
	s := newScripted(t, `{}`)
	const areas = 80
	size := uint64(areas * 2 * fakePage)
	file := memfd(t, int64(size)+fakePage)
	argsz := 48 + 16*areas
	list := cat(uint16(1), uint16(1), 0, areas, 0)
	for i := range uint64(areas) {
		list = cat(list, i*2*fakePage, uint64(fakePage))
	}
	var r vfiouser.Region
	err := s.during(func() (err error) { r, err = s.client.Region(2); return err }, func() {
		id := s.request(5, 1024, 0, 2, 0, uint64(0), uint64(0))
		s.write(answer(id, 5, regionReply(argsz, 7, 2, 0, size, fakePage)), file)
		id = s.request(5, argsz, 0, 2, 0, uint64(0), uint64(0))
		s.write(answer(id, 5, regionReply(argsz, 15, 2, 32, size, fakePage, list)), file)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(r.FD)
	if len(r.Areas) != areas || r.Areas[79] != (vfiouser.Area{Offset: 158 * fakePage, Size: fakePage}) ||
		!sameFile(t, r.FD, file) || r.FileOffset != fakePage || r.Flags != 7 || r.Size != size {
		t.Errorf("%+v", r)
	}
}

// TestClientRegion is what a server may say about a region, and what not.
func TestClientRegion(t *testing.T) {
	const p = fakePage
	sparse := func(areas ...uint64) []byte {
		b := cat(uint16(1), uint16(1), 0, len(areas)/2, 0)
		for _, a := range areas {
			b = cat(b, a)
		}
		return b
	}
	one := func(areas ...uint64) []byte {
		return regionReply(48+8*len(areas), 15, 2, 32, 4*p, 0, sparse(areas...))
	}
	file := memfd(t, 4*p)
	short := memfd(t, 4*p-1)
	for _, c := range []struct {
		name  string
		reply []byte
		fds   []int
		want  string // part of the error; "" = fine, "trapped" = fine but not mappable
	}{
		{"whole region", regionReply(32, 7, 2, 0, 4*p, 0), []int{file}, ""},
		{"areas", one(0, p, 2*p, 2*p), []int{file}, ""},
		{"areas in any order", one(2*p, 2*p, 0, p), []int{file}, ""},
		{"capability unknown", regionReply(40, 15, 2, 32, 4*p, 0, uint16(77), uint16(1), 0), []int{file}, ""},
		{"unknown, then sparse", regionReply(48+8+16, 15, 2, 32, 4*p, 0, uint16(77), uint16(1), 40, sparse(0, p)), []int{file}, ""},
		{"empty chain", regionReply(32, 15, 2, 0, 4*p, 0), []int{file}, ""},
		{"no descriptor", regionReply(32, 7, 2, 0, 4*p, 0), nil, "trapped"},
		{"descriptor without MMAP", regionReply(32, 3, 2, 0, 4*p, 0), []int{file}, "trapped"},
		{"no areas", one(), []int{file}, "trapped"},
		{"not mappable, file irrelevant", regionReply(32, 3, 2, 0, math.MaxUint64, 0), nil, "trapped"},
		{"31 bytes", regionReply(32, 7, 2, 0, 4*p, 0)[:31], []int{file}, "at least 32 bytes"},
		{"no payload", nil, []int{file}, "at least 32 bytes"},
		{"argsz 31", regionReply(31, 7, 2, 0, 4*p, 0), []int{file}, "argsz of at least 32"},
		{"argsz larger than the answer", regionReply(48, 7, 2, 0, 4*p, 0), []int{file}, "argsz as large"},
		{"argsz huge", regionReply(max32, 7, 2, 0, 4*p, 0), []int{file}, "argsz as large"},
		{"another region", regionReply(32, 7, 1, 0, 4*p, 0), []int{file}, "expected region 2"},
		{"cap offset inside the fixed part", regionReply(48, 15, 2, 16, 4*p, 0, sparse()), []int{file}, "chain"},
		{"cap offset outside", regionReply(32, 15, 2, 32, 4*p, 0), []int{file}, "chain"},
		{"cap offset far outside", regionReply(48, 15, 2, max32, 4*p, 0, sparse()), []int{file}, "chain"},
		{"cap loop to itself", regionReply(48, 15, 2, 32, 4*p, 0, uint16(7), uint16(1), 32, uint64(0)), []int{file}, "chain"},
		{"cap loop of two", regionReply(48, 15, 2, 32, 4*p, 0, uint16(7), uint16(1), 40, uint16(7), uint16(1), 32), []int{file}, "chain"},
		{"cap next overlaps", regionReply(48, 15, 2, 32, 4*p, 0, uint16(7), uint16(1), 36, uint64(0)), []int{file}, "chain"},
		{"cap next outside", regionReply(48, 15, 2, 32, 4*p, 0, uint16(7), uint16(1), 44, uint64(0)), []int{file}, "chain"},
		{"sparse twice", regionReply(64, 15, 2, 32, 4*p, 0, uint16(1), uint16(1), 48, 0, 0, sparse()), []int{file}, "chain"},
		{"sparse version 2", regionReply(48, 15, 2, 32, 4*p, 0, uint16(1), uint16(2), 0, 0, 0), []int{file}, "chain"},
		{"sparse cut", regionReply(40, 15, 2, 32, 4*p, 0, sparse()[:8]), []int{file}, "chain"},
		{"more areas than bytes", regionReply(48, 15, 2, 32, 4*p, 0, uint16(1), uint16(1), 0, 1, 0), []int{file}, "chain"},
		{"2^32-1 areas", regionReply(48, 15, 2, 32, 4*p, 0, uint16(1), uint16(1), 0, max32, 0), []int{file}, "chain"},
		{"2^28 areas", regionReply(48, 15, 2, 32, 4*p, 0, uint16(1), uint16(1), 0, 1<<28, 0), []int{file}, "chain"},
		{"area outside the region", one(3*p, 2*p), []int{file}, "inside the region"},
		{"area far outside", one(1<<63, p), []int{file}, "inside the region"},
		{"area that wraps", one(p, math.MaxUint64-p+1), []int{file}, "inside the region"},
		{"area empty", one(0, 0), []int{file}, "not empty"},
		{"area offset unaligned", one(8, p), []int{file}, "page-aligned"},
		{"area size unaligned", one(0, 8), []int{file}, "page-aligned"},
		{"areas overlap", one(0, 2*p, p, p), []int{file}, "overlap"},
		{"areas equal", one(p, p, p, p), []int{file}, "overlap"},
		{"file too short", regionReply(32, 7, 2, 0, 4*p, 0), []int{short}, "inside the file"},
		{"file too short for the offset", regionReply(32, 7, 2, 0, 4*p, p), []int{file}, "inside the file"},
		{"offset beyond the file", regionReply(32, 7, 2, 0, p, 5*p), []int{file}, "inside the file"},
		{"offset unaligned", regionReply(32, 7, 2, 0, p, 1), []int{file}, "file offset"},
		{"offset 2^63", regionReply(32, 7, 2, 0, p, 1<<63), []int{file}, "file offset"},
		{"region larger than any file", regionReply(32, 7, 2, 0, math.MaxUint64-p+1, 0), []int{file}, "inside the file"},
		{"not a file", regionReply(32, 7, 2, 0, p, 0), []int{-1}, "regular file"},
		{"two descriptors", regionReply(32, 7, 2, 0, 4*p, 0), []int{file, file}, "at most 1 descriptors"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScripted(t, `{}`)
			fds := slices.Clone(c.fds)
			if len(fds) == 1 && fds[0] < 0 {
				fds[0] = eventfd(t, 0)
			}
			var r vfiouser.Region
			err := s.during(func() (err error) { r, err = s.client.Region(2); return err }, func() {
				id := s.request(5, 1024, 0, 2, 0, uint64(0), uint64(0))
				s.write(answer(id, 5, c.reply), fds...)
			})
			switch c.want {
			case "":
				if err != nil || r.FD < 0 || r.Flags&vfiouser.RegionMmap == 0 {
					t.Errorf("%+v, %v", r, err)
				}
				unix.Close(r.FD)
			case "trapped":
				if err != nil || r.FD != -1 || r.Flags != 3 || r.Areas != nil {
					t.Errorf("%+v, %v", r, err)
				}
			default:
				s.expectViolation(err, c.want)
				if r.FD != -1 {
					t.Errorf("descriptor %d", r.FD)
				}
			}
		})
	}
	t.Run("asks for more for ever", func(t *testing.T) {
		s := newScripted(t, `{}`)
		err := s.during(func() error { _, err := s.client.Region(2); return err }, func() {
			for i := range 3 {
				header, _, _ := s.read()
				s.write(answer(binary.LittleEndian.Uint16(header), 5, regionReply(2000+i*2000, 7, 2, 0, 4*p, 0)), file)
			}
		})
		s.expectViolation(err, "call for more")
	})
}

// expectViolation requires that err is the end of the connection, for a reason
// that contains text, and that it is the answer to every later call.
func (s *scripted) expectViolation(err error, text string) {
	s.t.Helper()
	var dead *vfiouser.ConnectionError
	var perr *vfiouser.ProtocolError
	if !errors.As(err, &dead) || !errors.As(err, &perr) || perr.Peer != "server" || !strings.Contains(err.Error(), text) {
		s.t.Errorf("%v\nexpected a ProtocolError of the server with %q", err, text)
	}
	if again := s.client.Reset(); again != err {
		s.t.Errorf("the next call says %v", again)
	}
	s.expectClosed()
}

// TestClientHostileReplies: one wrong answer each.
func TestClientHostileReplies(t *testing.T) {
	info := func(c *vfiouser.Client) error { _, err := c.Info(); return err }
	irq := func(c *vfiouser.Client) error { _, err := c.IRQ(2); return err }
	read := func(c *vfiouser.Client) error { return c.ReadRegion(0, 4, make([]byte, 4)) }
	write := func(c *vfiouser.Client) error { return c.WriteRegion(0, 4, make([]byte, 4)) }
	unmap := func(c *vfiouser.Client) error { return c.DMAUnmap(0, 4096) }
	reset := func(c *vfiouser.Client) error { return c.Reset() }
	good := cat(16, 3, 9, 5)
	for _, c := range []struct {
		name  string
		call  func(*vfiouser.Client) error
		reply func(id uint16) []byte
		fds   int
		want  string
	}{
		{"another ID", info, func(id uint16) []byte { return answer(id+1, 4, good) }, 1, "the reply to request"},
		{"another command", info, func(id uint16) []byte { return answer(id, 7, good) }, 1, "the reply to request"},
		{"error with another ID", info, func(id uint16) []byte { return errorAnswer(id-1, 4, 5) }, 0, "the reply to request"},
		{"type 2", info, func(id uint16) []byte { return cat(id, uint16(4), 32, 2, 0, good) }, 1, "message type"},
		{"type 15", info, func(id uint16) []byte { return cat(id, uint16(4), 32, 15, 0, good) }, 0, "message type"},
		{"size 15", info, func(id uint16) []byte { return cat(id, uint16(4), 15, 1, 0) }, 1, "a size of 16 to 32"},
		{"size 0", info, func(id uint16) []byte { return cat(id, uint16(4), 0, 1, 0) }, 0, "a size of 16 to 32"},
		{"size 2^32-1", info, func(id uint16) []byte { return cat(id, uint16(4), max32, 1, 0) }, 0, "a size of 16 to 32"},
		{"size 2^31", info, func(id uint16) []byte { return cat(id, uint16(4), uint32(1<<31), 1, 0) }, 0, "a size of 16 to 32"},
		{"one byte too long", info, func(id uint16) []byte { return answer(id, 4, good, byte(0)) }, 0, "a size of 16 to 32"},
		{"error too long", info, func(id uint16) []byte { return cat(id, uint16(4), 1<<20+33, 0x21, 22) }, 0, "a size of 16 to 1048608"},
		{"too short", info, func(id uint16) []byte { return answer(id, 4, good[:15]) }, 0, "16 bytes"},
		{"nothing", info, func(id uint16) []byte { return answer(id, 4) }, 0, "16 bytes"},
		{"argsz 15", info, func(id uint16) []byte { return answer(id, 4, 15, 3, 9, 5) }, 0, "16 bytes"},
		{"101 regions", info, func(id uint16) []byte { return answer(id, 4, 16, 3, 101, 5) }, 0, "at most 100 regions"},
		{"51 interrupt types", info, func(id uint16) []byte { return answer(id, 4, 16, 3, 9, 51) }, 0, "50 interrupt types"},
		{"descriptors", info, func(id uint16) []byte { return answer(id, 4, good) }, 3, "at most 0 descriptors"},
		{"server command too long", info, func(id uint16) []byte { return cat(id, uint16(11), 1<<20+33, 0, 0) }, 0, "a size of 16 to 1048608"},
		{"server command size 0", info, func(id uint16) []byte { return cat(id, uint16(11), 0, 0, 0) }, 2, "a size of 16 to 1048608"},
		{"another interrupt type", irq, func(id uint16) []byte { return answer(id, 7, 16, 9, 3, 1) }, 0, "interrupt type 2"},
		{"too many vectors", irq, func(id uint16) []byte { return answer(id, 7, 16, 9, 2, 65537) }, 0, "interrupt type 2"},
		{"irq too short", irq, func(id uint16) []byte { return answer(id, 7, 16) }, 0, "interrupt type 2"},
		{"read less", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 0, 2, "ab") }, 0, "all its data"},
		{"read, count without data", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 0, 4, "ab") }, 0, "all its data"},
		{"read more", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 0, 5, "abcde") }, 0, "a size of 16 to 36"},
		{"read, count too large", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 0, 5, "abcd") }, 0, "all its data"},
		{"read elsewhere", read, func(id uint16) []byte { return answer(id, 9, uint64(8), 0, 4, "abcd") }, 0, "all its data"},
		{"read another region", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 1, 4, "abcd") }, 0, "all its data"},
		{"read header only", read, func(id uint16) []byte { return answer(id, 9) }, 0, "all its data"},
		{"wrote less", write, func(id uint16) []byte { return answer(id, 10, uint64(4), 0, 3) }, 0, "all its data"},
		{"wrote elsewhere", write, func(id uint16) []byte { return answer(id, 10, uint64(5), 0, 4) }, 0, "all its data"},
		{"write header only", write, func(id uint16) []byte { return answer(id, 10) }, 0, "all its data"},
		{"unmapped something else", unmap, func(id uint16) []byte { return answer(id, 3, 24, 0, uint64(0), uint64(8192)) }, 0, "4096"},
		{"unmapped elsewhere", unmap, func(id uint16) []byte { return answer(id, 3, 24, 0, uint64(4096), uint64(4096)) }, 0, "4096"},
		{"unmap cut", unmap, func(id uint16) []byte { return answer(id, 3, 24, 0, uint64(0)) }, 0, "4096"},
		{"reset with payload", reset, func(id uint16) []byte { return answer(id, 13, 1) }, 0, "a size of 16 to 16"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScripted(t, `{}`)
			fds := make([]int, c.fds)
			for i := range fds {
				fds[i] = eventfd(t, 0)
			}
			err := s.during(func() error { return c.call(s.client) }, func() {
				header, _, _ := s.read()
				s.write(c.reply(binary.LittleEndian.Uint16(header)), fds...)
			})
			s.expectViolation(err, c.want)
		})
	}
}

// TestClientServerErrors: the connection survives error replies, whatever
// they carry.
func TestClientServerErrors(t *testing.T) {
	s := newScripted(t, `{}`)
	for _, c := range []struct {
		name  string
		reply func(id uint16) []byte
		fds   []int
		errno unix.Errno
	}{
		{"plain", func(id uint16) []byte { return errorAnswer(id, 13, unix.EIO) }, nil, unix.EIO},
		{"with payload", func(id uint16) []byte { return cat(id, uint16(13), 16+5000, 0x21, 1, make([]byte, 5000)) }, nil, unix.EPERM},
		{"with descriptors", func(id uint16) []byte { return errorAnswer(id, 13, unix.EIO) }, []int{eventfd(t, 0)}, unix.EIO},
		{"errno 0", func(id uint16) []byte { return errorAnswer(id, 13, 0) }, nil, unix.EINVAL},
		{"errno 4096", func(id uint16) []byte { return errorAnswer(id, 13, 4096) }, nil, unix.EINVAL},
		{"errno 2^32-1", func(id uint16) []byte { return cat(id, uint16(13), 16, 0x21, max32) }, nil, unix.EINVAL},
		{"errno without a name", func(id uint16) []byte { return errorAnswer(id, 13, 4000) }, nil, 4000},
		{"errno without the error bit", func(id uint16) []byte { return cat(id, uint16(13), 16, 1, 22) }, nil, 0},
		{"reserved flags", func(id uint16) []byte { return cat(id, uint16(13), 16, uint32(0xffffff01)&^0x20, 0) }, nil, 0},
	} {
		err := s.during(s.client.Reset, func() { s.write(c.reply(s.request(13)), c.fds...) })
		if c.errno == 0 {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		var remote *vfiouser.RemoteError
		if !errors.As(err, &remote) || !errors.Is(err, c.errno) || !strings.Contains(err.Error(), "DEVICE_RESET") {
			t.Errorf("%s: %v, want %v", c.name, err, c.errno)
		}
	}
}

// TestClientServerCommands: commands of the server are declined while a reply
// is awaited, their payload skipped.
func TestClientServerCommands(t *testing.T) {
	s := newScripted(t, `{}`)
	err := s.during(s.client.Reset, func() {
		id := s.request(13)
		s.write(message(id, 11, uint64(4096), uint64(64)))
		s.expect(errorAnswer(id, 11, unix.EINVAL))
		s.write(message(5, 12, uint64(4096), uint64(3), "abc"), eventfd(t, 0))
		s.expect(errorAnswer(5, 12, unix.EINVAL))
		posted := message(6, 12, uint64(4096), uint64(3), "abc")
		posted[8] = 0x10
		s.write(cat(posted, message(7, 999), answer(id, 13)))
		s.expect(errorAnswer(7, 999, unix.EINVAL))
	})
	if err != nil {
		t.Error(err)
	}
}

func TestClientOneByteAtATime(t *testing.T) {
	s := newScripted(t, `{}`)
	file := memfd(t, 4096*16)
	var r vfiouser.Region
	err := s.during(func() (err error) { r, err = s.client.Region(2); return err }, func() {
		header, _, _ := s.read()
		reply := answer(binary.LittleEndian.Uint16(header), 5, regionReply(32, 7, 2, 0, 4096*16, 0))
		s.write(reply[:1], file)
		for i := range reply[1:] {
			s.write(reply[i+1 : i+2])
		}
	})
	if err != nil || !sameFile(t, r.FD, file) {
		t.Errorf("%+v, %v", r, err)
	}
	unix.Close(r.FD)
}

// TestClientDeadline: a server that does not answer, or never finishes, costs
// one time limit; a late reply is not taken for another's.
func TestClientDeadline(t *testing.T) {
	for _, part := range []int{0, 1, 15, 16, 31} {
		s := newScripted(t, `{}`)
		if err := s.client.SetTimeout(20 * time.Millisecond); err != nil {
			t.Fatal(err)
		}
		var late []byte
		err := s.during(func() error { _, err := s.client.Info(); return err }, func() {
			header, _, _ := s.read()
			late = answer(binary.LittleEndian.Uint16(header), 4, 16, 3, 9, 5)
			s.write(late[:part])
		})
		var dead *vfiouser.ConnectionError
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &dead) {
			t.Fatalf("%d bytes answered: %v, want os.ErrDeadlineExceeded", part, err)
		}
		s.tryWrite(late[part:])
		if again := s.client.Reset(); again != err {
			t.Errorf("after the time limit: %v", again)
		}
	}
}

// TestClientCommandsWithoutEnd: commands of the server do not extend the time
// limit. All it says lies ready before the request, so that only the look at
// the clock between two messages can notice.
func TestClientCommandsWithoutEnd(t *testing.T) {
	s := newScripted(t, `{}`)
	id := uint16(0)
	if err := s.during(s.client.Reset, func() { id = s.request(13); s.write(answer(id, 13)) }); err != nil {
		t.Fatal(err)
	}
	s.write(cat(message(7, 12, uint64(0), uint64(0)), answer(id+1, 4, 16, 3, 9, 5)))
	if err := s.client.SetTimeout(time.Nanosecond); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Info(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want os.ErrDeadlineExceeded", err)
	}
}

// TestClientServerDoesNotRead: a request that nobody takes is given up too.
func TestClientServerDoesNotRead(t *testing.T) {
	s := newScripted(t, `{}`)
	if err := s.client.SetTimeout(20 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	err := s.client.WriteRegion(0, 0, make([]byte, 1<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want os.ErrDeadlineExceeded", err)
	}
	if d := time.Since(start); d >= vfiouser.DefaultTimeout {
		t.Errorf("given up after %v, not after 20ms", d)
	}
}

// TestClientLargeTransfers: however much a server takes, a message of this end
// has at most 1 MiB of data.
func TestClientLargeTransfers(t *testing.T) {
	s := newScripted(t, `{"capabilities":{"max_data_xfer_size":4294967295}}`)
	err := s.during(func() error { return s.client.WriteRegion(2, 8, make([]byte, 1<<20+4)) }, func() {
		id := s.request(10, uint64(8), 2, 1<<20, make([]byte, 1<<20))
		s.write(answer(id, 10, uint64(8), 2, 1<<20))
		id = s.request(10, uint64(8+1<<20), 2, 4, 0)
		s.write(answer(id, 10, uint64(8+1<<20), 2, 4))
	})
	if err != nil {
		t.Error(err)
	}
}

func TestClientServerEnds(t *testing.T) {
	for part, want := range map[int]error{0: io.EOF, 1: io.ErrUnexpectedEOF, 16: io.ErrUnexpectedEOF, 31: io.ErrUnexpectedEOF} {
		s := newScripted(t, `{}`)
		err := s.during(func() error { _, err := s.client.Info(); return err }, func() {
			header, _, _ := s.read()
			s.write(answer(binary.LittleEndian.Uint16(header), 4, 16, 3, 9, 5)[:part])
			s.close()
		})
		if !errors.Is(err, want) {
			t.Errorf("after %d bytes: %v, want %v", part, err, want)
		}
	}
}

func TestClientIOFDs(t *testing.T) {
	e40 := func(offset, size uint64, index, kind, flags int, data uint64) []byte {
		return cat(offset, size, index, kind, flags, 0, data)
	}
	e48 := func(offset, size uint64, index, kind, flags int, data uint64) []byte {
		return cat(offset, size, index, kind, flags, 0, uint64(77), data)
	}
	reply := func(entries ...[]byte) []byte {
		all := bytes.Join(entries, nil)
		return cat(16+len(all), 0, 0, len(entries), all)
	}
	noFD := max32
	for _, c := range []struct {
		name  string
		reply []byte
		fds   int
		want  string
		list  []vfiouser.IOFD // FD is the index
	}{
		{"none", reply(), 0, "", nil},
		{"40 bytes", reply(e40(12, 4, 0, 0, 1, 5), e40(4092, 4, 1, 0, 0, 6)), 2, "",
			[]vfiouser.IOFD{{Offset: 12, Size: 4, Match: true, Data: 5}, {Offset: 4092, Size: 4, FD: 1}}},
		{"48 bytes", reply(e48(12, 4, 1, 0, 1, 5), e48(4095, 0, 0, 0, 0, 6)), 2, "",
			[]vfiouser.IOFD{{Offset: 12, Size: 4, Match: true, Data: 5, FD: 1}, {Offset: 4095}}},
		{"one shared, one unused descriptor", reply(e40(0, 8, 0, 0, 0, 0), e40(8, 8, 0, 0, 0, 0)), 2, "",
			[]vfiouser.IOFD{{Size: 8}, {Offset: 8, Size: 8}}},
		{"unusable ones", reply(
			e40(0, 4, 0, 1, 0, 0),    // ioregionfd
			e40(0, 4, 0, 2, 0, 0),    // shadow
			e40(0, 4, 0, 99, 0, 0),   // unknown
			e40(0, 4, noFD, 0, 0, 0), // no descriptor
			e40(0, 4, 0, 0, 2, 0),    // port I/O
			e40(0, 4, 0, 0, 4, 0),    // deassign
			e40(0, 0, 0, 0, 1, 0),    // match of any width
			e40(0, 3, 0, 0, 0, 0),    // no such width
			e40(0, 16, 0, 0, 0, 0),
		), 1, "", nil},
		{"index out of range", reply(e40(12, 4, 1, 0, 1, 5)), 1, "descriptors are there", nil},
		{"index 2^32-2", reply(e40(12, 4, noFD-1, 0, 1, 5)), 1, "descriptors are there", nil},
		{"no descriptors", reply(e40(12, 4, 0, 0, 1, 5)), 0, "descriptors are there", nil},
		{"outside the region", reply(e40(4093, 4, 0, 0, 0, 5)), 1, "inside the region", nil},
		{"any width, outside", reply(e40(4096, 0, 0, 0, 0, 5)), 1, "inside the region", nil},
		{"offset 2^64-1", reply(e40(math.MaxUint64, 4, 0, 0, 0, 5)), 1, "inside the region", nil},
		{"size 2^64-1", reply(e40(1, math.MaxUint64, 0, 0, 0, 5)), 1, "inside the region", nil},
		{"another region", cat(16, 0, 1, 0), 1, "region 0", nil},
		{"cut", cat(16, 0, 0), 1, "16 bytes", nil},
		{"stride 44", cat(16+44, 0, 0, 1, make([]byte, 44)), 1, "40 or 48", nil},
		{"stride 39", cat(16+39, 0, 0, 1, make([]byte, 39)), 1, "40 or 48", nil},
		{"stride 80", cat(16+80, 0, 0, 1, make([]byte, 80)), 1, "40 or 48", nil},
		{"count 0 with data", cat(16+40, 0, 0, 0, make([]byte, 40)), 1, "40 or 48", nil},
		{"count 2^32-1", cat(16+40, 0, 0, max32, make([]byte, 40)), 1, "40 or 48", nil},
		{"argsz disagrees", cat(16+80, 0, 0, 2, make([]byte, 40)), 1, "40 or 48", nil},
		{"argsz 0", cat(0, 0, 0, 0), 1, "40 or 48", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScripted(t, `{}`)
			fds := make([]int, c.fds)
			for i := range fds {
				fds[i] = eventfd(t, uint(i)+1)
			}
			var list []vfiouser.IOFD
			err := s.during(func() (err error) { list, err = s.client.IOFDs(0); return err }, func() {
				id := s.request(5, 32, 0, 0, 0, uint64(0), uint64(0))
				s.write(answer(id, 5, 32, 3, 0, 0, uint64(4096), uint64(0)), memfd(t, 1))
				id = s.request(6, 16+48*253, 0, 0, 0)
				s.write(answer(id, 6, c.reply), fds...)
			})
			if c.want != "" {
				s.expectViolation(err, c.want)
				return
			}
			if err != nil || len(list) != len(c.list) {
				t.Fatalf("%+v, %v", list, err)
			}
			seen := map[int]int{} // descriptor: index
			for i, got := range list {
				index, ok := seen[got.FD]
				if !ok {
					index = int(counter(got.FD)) - 1
					seen[got.FD] = index
				}
				got.FD = index
				if got != c.list[i] {
					t.Errorf("entry %d: %+v, want %+v", i, got, c.list[i])
				}
			}
			for fd := range seen {
				unix.Close(fd)
			}
		})
	}
	t.Run("asked for more", func(t *testing.T) {
		s := newScripted(t, `{}`)
		const n = 400
		all := bytes.Repeat(e40(12, 4, noFD, 0, 1, 5), n)
		err := s.during(func() error { _, err := s.client.IOFDs(0); return err }, func() {
			id := s.request(5, 32, 0, 0, 0, uint64(0), uint64(0))
			s.write(answer(id, 5, 32, 3, 0, 0, uint64(4096), uint64(0)))
			id = s.request(6, 16+48*253, 0, 0, 0)
			s.write(answer(id, 6, 16+40*n, 0, 0, n), eventfd(t, 0))
			id = s.request(6, 16+40*n, 0, 0, 0)
			s.write(answer(id, 6, 16+40*n, 0, 0, n, all), eventfd(t, 0))
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("another region's size", func(t *testing.T) {
		s := newScripted(t, `{}`)
		err := s.during(func() error { _, err := s.client.IOFDs(0); return err }, func() {
			id := s.request(5, 32, 0, 0, 0, uint64(0), uint64(0))
			s.write(answer(id, 5, 32, 3, 1, 0, uint64(4096), uint64(0)))
		})
		s.expectViolation(err, "region 0")
	})
}

// TestClientVersion is what a server may answer to the first message.
func TestClientVersion(t *testing.T) {
	for _, c := range []struct {
		name  string
		reply func(id uint16) []byte
		fds   int
		want  string
	}{
		{"no json", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(1)) }, 0, ""},
		{"libvfio-user", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(1), `{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}`, byte(0))
		}, 0, ""},
		{"large transfers", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(0), `{"capabilities":{"max_data_xfer_size":4294967295}}`, byte(0))
		}, 0, ""},
		{"major 1", func(id uint16) []byte { return answer(id, 1, uint16(1), uint16(0)) }, 0, "version 0.0 or 0.1"},
		{"minor 2", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(2)) }, 0, "version 0.0 or 0.1"},
		{"cut", func(id uint16) []byte { return answer(id, 1, uint16(0)) }, 0, "well-formed"},
		{"no NUL", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(0), "{}") }, 0, "well-formed"},
		{"no JSON", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(0), "]\x00") }, 0, "well-formed"},
		{"max_msg_fds", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(0), `{"capabilities":{"max_msg_fds":-1}}`, byte(0))
		}, 0, "well-formed"},
		{"transfers too small", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(0), `{"capabilities":{"max_data_xfer_size":7}}`, byte(0))
		}, 0, "at least 8"},
		{"twin socket", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(0), `{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}`, byte(0))
		}, 0, "twin socket"},
		{"descriptor", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(0)) }, 1, "at most 0 descriptors"},
		{"too long", func(id uint16) []byte { return answer(id, 1, make([]byte, 4081)) }, 0, "a size of 16 to 4096"},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkLeaks(t)
			peer, conn := newPair(t)
			s := &scripted{rawPeer: peer}
			var client *vfiouser.Client
			err := s.during(func() (err error) { client, err = vfiouser.NewClient(conn); return err }, func() {
				fds := make([]int, c.fds)
				for i := range fds {
					fds[i] = eventfd(t, 0)
				}
				s.write(c.reply(s.request(1, uint16(0), uint16(1), ourJSON, byte(0))), fds...)
			})
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				client.Close()
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			s.expectClosed()
		})
	}
}

func TestClientRefused(t *testing.T) {
	checkLeaks(t)
	peer, conn := newPair(t)
	s := &scripted{rawPeer: peer}
	err := s.during(func() error { _, err := vfiouser.NewClient(conn); return err }, func() {
		s.write(errorAnswer(s.request(1, uint16(0), uint16(1), ourJSON, byte(0)), 1, unix.EBUSY))
	})
	if !errors.Is(err, vfiouser.ErrRefused) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("%v, want ErrRefused and EBUSY", err)
	}
	s.expectClosed()
}

func TestClientWithoutDescriptors(t *testing.T) {
	s := newScripted(t, `{"capabilities":{"max_msg_fds":0}}`)
	err := s.client.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger, Count: 1, EventFD: true, FDs: []int{eventfd(t, 0)}})
	if !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("%v, want EOPNOTSUPP", err)
	}
}

// TestDialErrors: the message names the path and what to do.
func TestDialErrors(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	packets := filepath.Join(dir, "packets")
	other, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: packets, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	full := filepath.Join(dir, "full")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: full}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	filler, err := net.Dial("unix", full)
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	long := filepath.Join(dir, strings.Repeat("x", 108-len(dir)-1))
	for _, c := range []struct {
		path string
		want error
		text string
	}{
		{filepath.Join(dir, "nothing"), unix.ENOENT, "start the server"},
		{stale, unix.ECONNREFUSED, "nobody listens"},
		{packets, unix.EPROTOTYPE, "not a stream socket"},
		{full, unix.EAGAIN, "queue is full"},
		{long, unix.ENAMETOOLONG, "107"},
	} {
		_, err := vfiouser.Dial(context.Background(), c.path)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.path) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%v, want %v with %q and the path %s", err, c.want, c.text, c.path)
		}
	}
	if len(long) != 108 {
		t.Fatalf("a path of %d bytes", len(long))
	}
	// One byte less is a path like any other.
	if _, err := vfiouser.Dial(context.Background(), long[:107]); !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v, want ENOENT", err)
	}
}

// TestDialContext: the context ends the wait for a server that accepts and
// says nothing.
func TestDialContext(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		_, err := vfiouser.Dial(ctx, path)
		done <- err
	}()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, 16)); err != nil { // it waits for the reply now
		t.Fatal(err)
	}
	start := time.Now()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	if d := time.Since(start); d >= vfiouser.DefaultTimeout {
		t.Errorf("returned %v later, so not because of the context", d)
	}
}
