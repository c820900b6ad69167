package vfiouser_test

import (
	"bytes"
	"math"
	"testing"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

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
