package vfiouser_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
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
