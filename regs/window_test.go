package regs_test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/ivshmem-go/ivshmem/regs"
)

// window maps a file of 4096 bytes in the place of a register region.
func window(t testing.TB) (*regs.Window, *os.File) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "resource0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	w, err := regs.MapWindow(f.Fd(), 0, regs.RegionSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w, f
}

func TestWindow(t *testing.T) {
	w, f := window(t)
	var raw [4096]byte
	for i, r := range []regs.Register{regs.ID, regs.MaxPeers, regs.InterruptControl, regs.DoorbellRegister, regs.State, 0xffc} {
		v := 0x8765_4321 + uint32(i)
		if err := w.Store(r, v); err != nil {
			t.Fatal(err)
		}
		// The bytes of the file, not what Load says: little-endian, these
		// four and no others.
		want := raw
		binary.LittleEndian.PutUint32(want[r:], v)
		raw = want
		if _, err := f.ReadAt(want[:], 0); err != nil {
			t.Fatal(err)
		}
		if want != raw {
			t.Errorf("store to %v: other bytes changed, or not these", r)
		}
		if got, err := w.Load(r); err != nil || got != v {
			t.Errorf("load of %v: %#x, %v, want %#x", r, got, err, v)
		}
	}
	if _, err := f.WriteAt([]byte{0x78, 0x56, 0x34, 0x12}, 4); err != nil {
		t.Fatal(err)
	}
	if got, err := w.Load(regs.MaxPeers); err != nil || got != 0x12345678 {
		t.Errorf("load of foreign bytes: %#x, %v, want 0x12345678", got, err)
	}
}

func TestWindowRefuses(t *testing.T) {
	w, f := window(t)
	for _, r := range []regs.Register{1, 2, 3, 5, 0x0e, 0xffd, 0xffe, 0x1000, 0xfffc, 0xffff} {
		if v, err := w.Load(r); err == nil {
			t.Errorf("load at %#x: %#x, want an error", uint16(r), v)
		}
		if err := w.Store(r, 0xffffffff); err == nil {
			t.Errorf("store at %#x: want an error", uint16(r))
		} else if !strings.Contains(err.Error(), r.String()) {
			t.Errorf("store at %#x: %q does not name the register", uint16(r), err)
		}
	}
	raw, err := os.ReadFile(f.Name())
	if err != nil || strings.Trim(string(raw), "\x00") != "" {
		t.Errorf("a refused store changed the region: %v", err)
	}
	for _, c := range []struct {
		name   string
		fd     uintptr
		offset int64
		size   int
	}{
		{"too small for the registers", f.Fd(), 0, 16},
		{"negative", f.Fd(), 0, -1},
		{"larger than the file", f.Fd(), 0, 8192},
		{"behind the file", f.Fd(), 4096, 4096},
		{"offset below 0", f.Fd(), -4096, 4096},
		{"offset misaligned", f.Fd(), 4, 4092},
		{"closed descriptor", 1 << 20, 0, 4096},
	} {
		if w, err := regs.MapWindow(c.fd, c.offset, c.size); err == nil {
			w.Close()
			t.Errorf("map, %s: want an error", c.name)
		}
	}
}

func TestWindowClosed(t *testing.T) {
	w, f := window(t)
	f.Close() // the mapping does not need it
	if err := w.Store(regs.State, 7); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Load(regs.State); !errors.Is(err, os.ErrClosed) {
		t.Errorf("load: %v, want os.ErrClosed", err)
	}
	if err := w.Store(regs.State, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("store: %v, want os.ErrClosed", err)
	}
	if _, err := w.Load(1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("misaligned load: %v, want os.ErrClosed", err)
	}
}

// Close takes the mapping away under accesses of other goroutines. One that
// was not held off would end the test by a fault.
func TestWindowConcurrentClose(t *testing.T) {
	for range 50 {
		w, _ := window(t)
		var busy, done sync.WaitGroup
		for i := range 4 {
			busy.Add(1)
			done.Go(func() {
				started := sync.OnceFunc(busy.Done)
				for {
					_, err := w.Load(regs.State)
					if err == nil && i%2 == 0 {
						err = w.Store(regs.State, uint32(i))
					}
					started()
					if err != nil {
						if !errors.Is(err, os.ErrClosed) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		busy.Wait()
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		done.Wait()
	}
}

func TestWindowAllocates(t *testing.T) {
	w, _ := window(t)
	if n := testing.AllocsPerRun(100, func() {
		w.Store(regs.State, 1)
		w.Load(regs.State)
	}); n != 0 {
		t.Errorf("%v allocations per access, want 0", n)
	}
}
