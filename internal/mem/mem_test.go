package mem

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/shmem"
)

// file makes a memfd of n bytes.
func file(t testing.TB, name string, n int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, n); err != nil {
		t.Fatal(err)
	}
	return fd
}

// maps returns the lines of /proc/self/maps that contain s.
func maps(t testing.TB, s string) (lines []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, s) {
			lines = append(lines, line)
		}
	}
	return lines
}

func view(t testing.TB, m *Mapping, n uint64) *shmem.ReadWrite {
	t.Helper()
	v, err := m.Memory.ReadWrite("R/W section", 0, n)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestMap(t *testing.T) {
	page := int64(os.Getpagesize())
	fd := file(t, "ivshmem-test-map", 4*page)
	if _, err := unix.Pwrite(fd, []byte{0x78, 0x56, 0x34, 0x12}, 2*page); err != nil {
		t.Fatal(err)
	}
	m, err := Map(fd, 2*page, uint64(page), true)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	v := view(t, m, uint64(page))
	if x, err := v.Load32(0); x != 0x12345678 || err != nil {
		t.Errorf("load: %#x, %v", x, err)
	}
	if err := v.Store16(8, 0xabcd); err != nil {
		t.Fatal(err)
	}
	var b [4]byte
	if _, err := unix.Pread(fd, b[:], 2*page+8); err != nil || b != [4]byte{0xcd, 0xab} {
		t.Errorf("the store did not reach the file: % x, %v", b, err)
	}
}

func TestMapRefuses(t *testing.T) {
	page := int64(os.Getpagesize())
	fd := file(t, "ivshmem-test-refuse", 4*page)
	pipe := make([]int, 2)
	if err := unix.Pipe(pipe); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	readOnly, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	for _, c := range []struct {
		name   string
		fd     int
		offset int64
		size   uint64
		say    string
	}{
		{"misaligned offset", fd, page / 2, uint64(page), "page size"},
		{"negative offset", fd, -page, uint64(page), "as long"},
		{"nothing", fd, 0, 0, "map 0 bytes"},
		{"more than the file", fd, page, uint64(4 * page), "as long"},
		{"behind the file", fd, 4 * page, uint64(page), "as long"},
		{"far behind the file", fd, 1<<62 - page, 1 << 62, "as long"},
		{"size of all ones", fd, page, 1<<64 - 1, "as long"},
		{"no file", 1 << 20, 0, uint64(page), "bad file"},
		{"a pipe", pipe[0], 0, uint64(page), fmt.Sprintf("map %d bytes", page)},
		{"a read-only file", int(readOnly.Fd()), 0, uint64(page), "denied"},
	} {
		m, err := Map(c.fd, c.offset, c.size, true)
		if err == nil {
			m.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: %v, want an error that contains %q", c.name, err, c.say)
		}
	}
	if left := maps(t, "ivshmem-test-refuse"); len(left) != 0 {
		t.Errorf("left mapped: %q", left)
	}
}

// A section that a peer may only read is mapped so: a stray store, by
// whatever code, faults instead of reaching a hypervisor.
func TestSectionsAreProtected(t *testing.T) {
	for _, c := range []struct {
		name       string
		own        uint32
		stateTable bool
		rw, out    uint64   // sizes in pages
		want       []string // permissions, offset in pages, length in pages
	}{
		{"three peers", 1, true, 3, 2, []string{"r-- 1+1", "rw- 2+3", "r-- 5+6", "rw- 7+2"}},
		{"last peer", 2, true, 3, 2, []string{"r-- 1+1", "rw- 2+3", "r-- 5+6", "rw- 9+2"}},
		{"State Table by messages", 0, false, 3, 2, []string{"rw- 2+3", "r-- 5+6", "rw- 5+2"}},
		{"no R/W section", 0, true, 0, 1, []string{"r-- 1+1", "r-- 2+3", "rw- 2+1"}},
		{"no output sections", 0, true, 1, 0, []string{"r-- 1+1", "rw- 2+1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			page := uint64(os.Getpagesize())
			base := int64(page) // the region need not start with the file
			c.rw, c.out = c.rw*page, c.out*page
			l, err := shmem.NewLayout(page, c.rw, c.out, 3)
			if err != nil {
				t.Fatal(err)
			}
			fd := file(t, "ivshmem-test-sections", base+int64(l.Total()))
			// Something in each section, written by way of the file.
			mark := func(offset uint64, x byte) {
				if _, err := unix.Pwrite(fd, []byte{x}, base+int64(offset)); err != nil {
					t.Fatal(err)
				}
			}
			mark(4, 0x77) // state of peer 1
			if c.rw > 0 {
				mark(l.ReadWriteOffset(), 0x10)
			}
			for peer := range l.Peers {
				if c.out > 0 {
					mark(l.OutputOffset(peer), 0xa0+byte(peer))
				}
			}
			s, err := MapSections(fd, l, places(base, l, c.own, c.stateTable))
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(fd)
			var got []string
			for _, m := range s.maps {
				for _, line := range maps(t, "ivshmem-test-sections") {
					// The kernel may have joined neighbours to one line.
					var from, to, offset uint64
					var perm string
					if _, err := fmt.Sscanf(line, "%x-%x %s %x", &from, &to, &perm, &offset); err != nil {
						t.Fatal(err)
					}
					addr, size := uint64(uintptr(m.addr)), uint64(m.size)
					if from <= addr && addr+size <= to {
						got = append(got, fmt.Sprintf("%s %d+%d", perm[:3], (offset+addr-from)/page, size/page))
					}
				}
			}
			if strings.Join(got, ",") != strings.Join(c.want, ",") {
				t.Errorf("mapped %q, want %q", got, c.want)
			}

			if c.stateTable {
				if x, err := s.Sections.States.Load(1); x != 0x77 || err != nil {
					t.Errorf("state of peer 1: %#x, %v", x, err)
				}
			} else if s.Sections.States != nil {
				t.Error("the State Table is there")
			}
			first := func(name string, v *shmem.ReadOnly, want byte, size uint64) {
				t.Helper()
				if x, err := v.Load8(0); x != want || err != nil || v.Size() != size {
					t.Errorf("%s: first byte %#x, %v, size %#x, want %#x, %#x", name, x, err, v.Size(), want, size)
				}
			}
			if c.rw > 0 {
				first("R/W section", s.Sections.ReadWrite.ReadOnly(), 0x10, c.rw)
			} else if s.Sections.ReadWrite != nil {
				t.Error("an R/W section is there")
			}
			if c.out == 0 {
				if s.Sections.Output != nil || s.Sections.Inputs != nil {
					t.Error("output sections are there")
				}
			} else {
				first("output section", s.Sections.Output.ReadOnly(), 0xa0+byte(c.own), c.out)
				for peer := range l.Peers {
					in, err := s.Sections.Input(peer)
					if err != nil {
						t.Fatal(err)
					}
					first("input section", in, 0xa0+byte(peer), c.out)
				}
				if err := s.Sections.Output.Store8(1, 0x42); err != nil {
					t.Fatal(err)
				}
				in, err := s.Sections.Input(c.own)
				if err != nil {
					t.Fatal(err)
				}
				if x, err := in.Load8(1); x != 0x42 || err != nil {
					t.Errorf("own output section as the others see it: %#x, %v", x, err)
				}
			}
			for range 2 {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
			if c.out > 0 {
				if err := s.Sections.Output.Store8(0, 1); !errors.Is(err, os.ErrClosed) {
					t.Errorf("store after Close: %v, want os.ErrClosed", err)
				}
			}
			if left := maps(t, "ivshmem-test-sections"); len(left) != 0 {
				t.Errorf("mapped after Close: %q", left)
			}
		})
	}
}

// A file that is too short, or no file: nothing stays mapped.
func TestMapSectionsFails(t *testing.T) {
	l, err := shmem.NewLayout(1<<16, 1<<16, 1<<16, 2)
	if err != nil {
		t.Fatal(err)
	}
	for missing, name := range map[int64]string{
		1: shmem.NameInputs, 2<<16 + 1: shmem.NameReadWrite, 4 << 16: shmem.NameStateTable,
	} {
		fd := file(t, "ivshmem-test-short", int64(l.Total())-missing)
		s, err := MapSections(fd, l, Region(0, l, 0))
		if err == nil || s != nil || !strings.HasPrefix(err.Error(), name+":") {
			t.Errorf("file %d bytes too short: %v, want an error of the %s", missing, err, name)
		}
		if left := maps(t, "ivshmem-test-short"); len(left) != 0 {
			t.Errorf("left mapped: %q", left)
		}
	}
	fd := file(t, "ivshmem-test-short", 1<<20)
	for _, base := range []int64{-1 << 16, 1<<63 - 1<<16, 512} {
		if _, err := MapSections(fd, l, Region(base, l, 0)); err == nil {
			t.Errorf("region at %#x: want an error", base)
		}
	}
}

// Close in the middle of accesses: each sees the section, zeros, or
// os.ErrClosed; none faults, and none reaches what is mapped there later.
func TestCloseWhileInUse(t *testing.T) {
	const size = 1 << 16
	fd := file(t, "ivshmem-test-close", size)
	if _, err := unix.Pwrite(fd, bytes.Repeat([]byte{0x55}, size), 0); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		m, err := Map(fd, 0, size, true)
		if err != nil {
			t.Fatal(err)
		}
		v := view(t, m, size)
		var busy, done sync.WaitGroup
		for i := range 4 {
			busy.Add(1)
			done.Go(func() {
				started := sync.OnceFunc(busy.Done)
				p := make([]byte, size)
				for {
					n, err := v.ReadAt(p, 0)
					switch i {
					case 0:
						_, err = v.Load64(512)
					case 1:
						_, err = v.WriteAt(bytes.Repeat([]byte{0x55}, 4096), 8192)
					}
					started()
					if err != nil {
						if !errors.Is(err, os.ErrClosed) {
							t.Error(err)
						}
						return
					}
					if rest := bytes.Trim(p[:n], "\x55\x00"); len(rest) != 0 {
						t.Errorf("read %#x, which was never there", rest[0])
						return
					}
				}
			})
		}
		busy.Wait()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if left := maps(t, "ivshmem-test-close"); len(left) != 0 {
			t.Errorf("mapped after Close: %q", left)
		}
		done.Wait()
	}
}

// After Close the addresses stay taken as long as a view is there, and are
// given back after that.
func TestAddressesComeBack(t *testing.T) {
	const size = 64 << 20
	fd := file(t, "ivshmem-test-addresses", size)
	m, err := Map(fd, 0, size, false)
	if err != nil {
		t.Fatal(err)
	}
	v, err := m.Memory.ReadOnly("State Table", 0, size)
	if err != nil {
		t.Fatal(err)
	}
	from := uintptr(m.addr)
	mapped := func() bool {
		for _, line := range maps(t, "-") {
			var lo, hi uintptr
			if _, err := fmt.Sscanf(line, "%x-%x", &lo, &hi); err != nil {
				t.Fatal(err)
			}
			if lo <= from && from < hi {
				return true
			}
		}
		return false
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = nil
	for range 3 {
		runtime.GC()
		if !mapped() {
			t.Fatal("given back while a view is there")
		}
	}
	if _, err := v.Load8(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("load after Close: %v", err)
	}
	v = nil
	for mapped() {
		runtime.GC() // cleanups run some time after
		runtime.Gosched()
	}
}

func places(base int64, l shmem.Layout, own uint32, stateTable bool) Places {
	p := Region(base, l, own)
	if !stateTable {
		p.StateTable = NotMapped
	}
	return p
}
