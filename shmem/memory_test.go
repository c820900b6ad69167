package shmem_test

import (
	"bytes"
	"errors"
	"io"
	"math"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"pgregory.net/rapid"

	"github.com/ivshmem-go/ivshmem/shmem"
)

// memory returns n bytes of shared memory, and the bytes themselves.
func memory(t testing.TB, n int) (*shmem.Memory, []byte) {
	t.Helper()
	words := make([]uint64, (n+7)/8)
	b := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), n)
	m, err := shmem.NewMemory(b)
	if err != nil {
		t.Fatal(err)
	}
	if m.Size() != uint64(n) {
		t.Fatalf("size %d, want %d", m.Size(), n)
	}
	return m, b
}

func view(t testing.TB, m *shmem.Memory, offset, n uint64) *shmem.ReadWrite {
	t.Helper()
	v, err := m.ReadWrite("R/W section", offset, n)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

var (
	_ io.ReaderAt = (*shmem.ReadOnly)(nil)
	_ io.ReaderAt = (*shmem.ReadWrite)(nil)
	_ io.WriterAt = (*shmem.ReadWrite)(nil)
)

// A stray store to a section of another peer stops the CPU on some
// hypervisors: the type of such sections must not have a way to store.
func TestInputHasNoStore(t *testing.T) {
	input := reflect.TypeFor[*shmem.ReadOnly]()
	var got []string
	for i := range input.NumMethod() {
		got = append(got, input.Method(i).Name)
	}
	want := []string{"Load16", "Load32", "Load64", "Load8", "Name", "ReadAt", "Size", "UnsafeBytes", "View", "Words"}
	if !slices.Equal(got, want) {
		t.Errorf("ReadOnly has the methods %v, expected %v", got, want)
	}
	if v, _ := input.MethodByName("View"); v.Type.Out(0) != input {
		t.Errorf("a view of a read-only view is %v", v.Type.Out(0))
	}
	sections := reflect.TypeFor[shmem.Sections]()
	for name, want := range map[string]reflect.Type{
		"Inputs": input, "Output": reflect.TypeFor[*shmem.ReadWrite](), "ReadWrite": reflect.TypeFor[*shmem.ReadWrite](),
	} {
		if f, ok := sections.FieldByName(name); !ok || f.Type != want {
			t.Errorf("Sections.%s is %v, expected %v", name, f.Type, want)
		}
	}
	if m, _ := reflect.TypeFor[*shmem.Sections]().MethodByName("Input"); m.Type.Out(0) != input {
		t.Errorf("Sections.Input returns %v", m.Type.Out(0))
	}
	states := reflect.TypeFor[shmem.States]()
	if states.NumMethod() != 1 || states.Method(0).Name != "Load" {
		t.Errorf("States is %v", states)
	}
}

func TestLittleEndian(t *testing.T) {
	m, b := memory(t, 32)
	v := view(t, m, 8, 16)
	copy(b[8:], []byte{0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99})
	if x, err := v.Load8(1); x != 0x22 || err != nil {
		t.Errorf("Load8: %#x, %v", x, err)
	}
	if x, err := v.Load16(2); x != 0x4433 || err != nil {
		t.Errorf("Load16: %#x, %v", x, err)
	}
	if x, err := v.Load32(4); x != 0x88776655 || err != nil {
		t.Errorf("Load32: %#x, %v", x, err)
	}
	if x, err := v.Load64(0); x != 0x8877665544332211 || err != nil {
		t.Errorf("Load64: %#x, %v", x, err)
	}
	for _, c := range []struct {
		name  string
		store func() error
		at    int // in b
		want  []byte
	}{
		{"Store8", func() error { return v.Store8(3, 0xa1) }, 11, []byte{0xa1}},
		{"Store8 last", func() error { return v.Store8(15, 0xa1) }, 23, []byte{0xa1}},
		{"Store16", func() error { return v.Store16(6, 0xa1b2) }, 14, []byte{0xb2, 0xa1}},
		{"Store16 last", func() error { return v.Store16(14, 0xa1b2) }, 22, []byte{0xb2, 0xa1}},
		{"Store32", func() error { return v.Store32(4, 0xa1b2c3d4) }, 12, []byte{0xd4, 0xc3, 0xb2, 0xa1}},
		{"Store32 last", func() error { return v.Store32(12, 0xa1b2c3d4) }, 20, []byte{0xd4, 0xc3, 0xb2, 0xa1}},
		{"Store64", func() error { return v.Store64(0, 0x0102030405060708) }, 8, []byte{8, 7, 6, 5, 4, 3, 2, 1}},
		{"Store64 last", func() error { return v.Store64(8, 0x0102030405060708) }, 16, []byte{8, 7, 6, 5, 4, 3, 2, 1}},
		{"WriteAt", func() error { _, err := v.WriteAt([]byte{1, 2, 3}, 7); return err }, 15, []byte{1, 2, 3}},
	} {
		for i := range b {
			b[i] = 0x5a
		}
		want := bytes.Clone(b)
		copy(want[c.at:], c.want)
		if err := c.store(); err != nil || !bytes.Equal(b, want) {
			t.Errorf("%s: %v\n% x, want\n% x", c.name, err, b, want)
		}
	}
}

// access is one access of each kind, at an offset.
type access struct {
	name  string
	width uint64
	align uint64
	do    func(v *shmem.ReadWrite, offset uint64) error
}

func accesses(bulk int) []access {
	return []access{
		{"Load8", 1, 1, func(v *shmem.ReadWrite, o uint64) error { _, err := v.Load8(o); return err }},
		{"Load16", 2, 2, func(v *shmem.ReadWrite, o uint64) error { _, err := v.Load16(o); return err }},
		{"Load32", 4, 4, func(v *shmem.ReadWrite, o uint64) error { _, err := v.Load32(o); return err }},
		{"Load64", 8, 8, func(v *shmem.ReadWrite, o uint64) error { _, err := v.Load64(o); return err }},
		{"Store8", 1, 1, func(v *shmem.ReadWrite, o uint64) error { return v.Store8(o, 1) }},
		{"Store16", 2, 2, func(v *shmem.ReadWrite, o uint64) error { return v.Store16(o, 1) }},
		{"Store32", 4, 4, func(v *shmem.ReadWrite, o uint64) error { return v.Store32(o, 1) }},
		{"Store64", 8, 8, func(v *shmem.ReadWrite, o uint64) error { return v.Store64(o, 1) }},
		{"ReadAt", uint64(bulk), 1, func(v *shmem.ReadWrite, o uint64) error {
			_, err := v.ReadAt(make([]byte, bulk), int64(o))
			return err
		}},
		{"WriteAt", uint64(bulk), 1, func(v *shmem.ReadWrite, o uint64) error {
			_, err := v.WriteAt(bytes.Repeat([]byte{1}, bulk), int64(o))
			return err
		}},
		{"View", uint64(bulk), 8, func(v *shmem.ReadWrite, o uint64) error { _, err := v.View(o, uint64(bulk)); return err }},
	}
}

// Each access, at each offset that could be mistaken, is allowed, or refused
// by the right type of error without a trace in the memory.
func TestBoundsAndAlignment(t *testing.T) {
	m, b := memory(t, 64)
	const size = 40 // of the view; guard bytes on both sides
	v := view(t, m, 16, size)
	var offsets []uint64
	for o := range uint64(size + 20) {
		offsets = append(offsets, o)
	}
	for d := range uint64(20) {
		offsets = append(offsets, 1<<31-d, 1<<32-d, 1<<32+d, 1<<63-d, 1<<63+d, -d)
	}
	for _, bulk := range []int{0, 1, 3, 8, 17, 40, 41} {
		for _, a := range accesses(bulk) {
			for _, o := range offsets {
				clear(b)
				err := a.do(v, o)
				inside := o <= size && a.width <= size-o
				bounds, isBounds := errors.AsType[*shmem.BoundsError](err)
				align, isAlign := errors.AsType[*shmem.AlignmentError](err)
				switch {
				case inside && o%a.align == 0:
					if err != nil {
						t.Errorf("%s at %#x: %v", a.name, o, err)
					}
				case inside:
					if !isAlign || align.Offset != o || align.Width != a.align || align.Section != "R/W section" {
						t.Errorf("%s at %#x: %v, want an AlignmentError", a.name, o, err)
					}
				default:
					if !isBounds || bounds.Offset != o || bounds.Width != a.width || bounds.Size != size || bounds.Section != "R/W section" {
						t.Errorf("%s at %#x: %v, want a BoundsError", a.name, o, err)
					}
				}
				if guards := slices.Concat(b[:16], b[16+size:]); strings.Trim(string(guards), "\x00") != "" {
					t.Fatalf("%s at %#x stored outside", a.name, o)
				}
				if err != nil && strings.Trim(string(b), "\x00") != "" {
					t.Fatalf("%s at %#x was refused and stored", a.name, o)
				}
			}
		}
	}
	// Negative offsets of io.ReaderAt and io.WriterAt.
	for _, o := range []int64{-1, -8, math.MinInt64} {
		for _, p := range [][]byte{nil, make([]byte, 1), make([]byte, 64)} {
			if n, err := v.ReadAt(p, o); n != 0 || err == nil {
				t.Errorf("ReadAt %d: %d, %v", o, n, err)
			}
			if n, err := v.WriteAt(p, o); n != 0 || err == nil {
				t.Errorf("WriteAt %d: %d, %v", o, n, err)
			}
		}
	}
	// Views from the memory itself.
	for _, c := range [][2]uint64{{0, 65}, {65, 0}, {64, 1}, {8, math.MaxUint64 - 3}, {math.MaxUint64 - 7, 8}, {math.MaxUint64, math.MaxUint64}} {
		if v, err := m.ReadOnly("x", c[0], c[1]); v != nil || err == nil {
			t.Errorf("view of %#x bytes at %#x: %v", c[1], c[0], err)
		}
		if v, err := m.ReadWrite("x", c[0], c[1]); v != nil || err == nil {
			t.Errorf("view of %#x bytes at %#x: %v", c[1], c[0], err)
		}
	}
	if _, err := m.ReadOnly("x", 4, 8); err == nil {
		t.Error("view at offset 4: want an AlignmentError")
	}
	if _, err := m.ReadOnly("x", 64, 0); err != nil {
		t.Errorf("empty view at the end: %v", err)
	}
}

func TestNewMemoryMisaligned(t *testing.T) {
	_, b := memory(t, 16)
	for i := 1; i < 8; i++ {
		if _, err := shmem.NewMemory(b[i:]); err == nil {
			t.Errorf("memory %d bytes off alignment: want an error", i)
		}
	}
	m, err := shmem.NewMemory(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.ReadOnly("x", 0, 1); err == nil {
		t.Error("a byte of no memory: want an error")
	}
}

func TestSubViews(t *testing.T) {
	m, b := memory(t, 64)
	v := view(t, m, 8, 48)
	w, err := v.View(16, 16) // bytes 24 to 39 of the memory
	if err != nil {
		t.Fatal(err)
	}
	if w.Size() != 16 || w.Name() != "R/W section" {
		t.Errorf("view %q of %d bytes", w.Name(), w.Size())
	}
	r, err := w.ReadOnly().View(8, 8)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Store32(8, 0x01020304); err != nil {
		t.Fatal(err)
	}
	if b[32] != 4 || b[35] != 1 {
		t.Errorf("stored elsewhere: % x", b)
	}
	if x, err := r.Load32(0); x != 0x01020304 || err != nil {
		t.Errorf("view of a view: %#x, %v", x, err)
	}
	if _, err := w.View(8, 16); err == nil {
		t.Error("a view larger than its parent: want an error")
	}
	if _, err := r.Load8(8); err == nil {
		t.Error("a view shows more than its own bytes")
	}
	if _, err := v.View(16, 16); err != nil {
		t.Errorf("the parent was changed: %v", err)
	}
}

func TestClosed(t *testing.T) {
	m, b := memory(t, 64)
	v := view(t, m, 0, 64)
	w, err := v.View(8, 40)
	if err != nil {
		t.Fatal(err)
	}
	table, err := shmem.NewStateTable(v.ReadOnly(), 16)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	m.Close()
	for _, v := range []*shmem.ReadWrite{v, w} {
		for _, a := range accesses(8) {
			for _, offset := range []uint64{0, 1, 1 << 40} { // good, misaligned, outside
				if err := a.do(v, offset); !errors.Is(err, os.ErrClosed) || !strings.Contains(err.Error(), "R/W section") {
					t.Errorf("%s at %#x after Close: %v, want os.ErrClosed", a.name, offset, err)
				}
			}
		}
	}
	if _, err := table.Load(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("State Table after Close: %v, want os.ErrClosed", err)
	}
	if strings.Trim(string(b), "\x00") != "" {
		t.Error("a store after Close reached the memory")
	}
}

// ReadAt and WriteAt against a plain slice.
func TestBulkAgainstSlice(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m, b := memory(t, 256)
		v := view(t, m, 64, 128)
		model := bytes.Clone(b)
		for range 20 {
			p := rapid.SliceOfN(rapid.Byte(), 0, 140).Draw(rt, "bytes")
			o := rapid.Int64Range(-10, 140).Draw(rt, "offset")
			good := o >= 0 && o+int64(len(p)) <= 128
			n, err := v.WriteAt(p, o)
			if good != (err == nil) || good != (n == len(p) && err == nil) {
				rt.Fatalf("WriteAt %d: %d, %v", o, n, err)
			}
			if good {
				copy(model[64+o:], p)
			}
			got := bytes.Repeat([]byte{0xcc}, len(p))
			if _, err := v.ReadAt(got, o); good != (err == nil) || good && !bytes.Equal(got, p) {
				rt.Fatalf("ReadAt %d: %v\n% x, want\n% x", o, err, got, p)
			}
			if !good && len(bytes.Trim(got, "\xcc")) != 0 {
				rt.Fatal("a refused ReadAt changed its buffer")
			}
			if !bytes.Equal(b, model) {
				rt.Fatalf("memory\n% x, want\n% x", b, model)
			}
		}
	})
}

func TestSectionReader(t *testing.T) {
	m, b := memory(t, 64)
	for i := range b {
		b[i] = byte(i)
	}
	v := view(t, m, 8, 48)
	got, err := io.ReadAll(io.NewSectionReader(v, 0, int64(v.Size())))
	if err != nil || !bytes.Equal(got, b[8:56]) {
		t.Errorf("%v, % x", err, got)
	}
}

func TestAllocates(t *testing.T) {
	m, _ := memory(t, 64)
	v := view(t, m, 0, 64)
	table, err := shmem.NewStateTable(v.ReadOnly(), 2)
	if err != nil {
		t.Fatal(err)
	}
	var p [24]byte
	if n := testing.AllocsPerRun(100, func() {
		v.Load8(1)
		v.Load16(2)
		v.Load32(4)
		v.Load64(8)
		v.Store8(1, 1)
		v.Store16(2, 1)
		v.Store32(4, 1)
		v.Store64(8, 1)
		v.ReadAt(p[:], 3)
		v.WriteAt(p[:], 3)
		table.Load(1)
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// anonymous returns memory that the race detector does not know: as with two
// processes, only the order of the accesses keeps it in order.
func anonymous(t testing.TB, n int) []byte {
	t.Helper()
	b, err := syscall.Mmap(-1, 0, n, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED|syscall.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Munmap(b) })
	return b
}

// poll asks until there is an answer.
func poll(ready func() (bool, error)) error {
	for {
		if ok, err := ready(); ok || err != nil {
			return err
		}
		runtime.Gosched()
	}
}

// What was written before a store is visible to whoever loads what was
// stored: for each width of the store, with and without a bulk copy before.
func TestMessagePassing(t *testing.T) {
	const rounds = 20000
	for _, c := range []struct {
		name  string
		store func(v *shmem.ReadWrite, x uint64) error
		load  func(v *shmem.ReadWrite) (uint64, error)
	}{
		{"8 bits", func(v *shmem.ReadWrite, x uint64) error { return v.Store8(64, uint8(x)) },
			func(v *shmem.ReadWrite) (uint64, error) { x, err := v.Load8(64); return uint64(x), err }},
		{"16 bits", func(v *shmem.ReadWrite, x uint64) error { return v.Store16(64, uint16(x)) },
			func(v *shmem.ReadWrite) (uint64, error) { x, err := v.Load16(64); return uint64(x), err }},
		{"32 bits", func(v *shmem.ReadWrite, x uint64) error { return v.Store32(64, uint32(x)) },
			func(v *shmem.ReadWrite) (uint64, error) { x, err := v.Load32(64); return uint64(x), err }},
		{"64 bits", func(v *shmem.ReadWrite, x uint64) error { return v.Store64(64, x) },
			func(v *shmem.ReadWrite) (uint64, error) { return v.Load64(64) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, err := shmem.NewMemory(anonymous(t, 4096))
			if err != nil {
				t.Fatal(err)
			}
			v := view(t, m, 0, 4096)
			done := make(chan error, 1)
			go func() { // answers at 128 with what it read
				var p [13]byte
				for i := uint64(1); i <= rounds; i++ {
					if err := poll(func() (bool, error) {
						x, err := c.load(v)
						return x == i&0x7f, err
					}); err != nil {
						done <- err
						return
					}
					v.ReadAt(p[:], 3)
					if p != [13]byte{byte(i), 1: byte(i), 12: byte(i)} {
						done <- errors.New("the message came behind its announcement")
						return
					}
					if err := v.Store64(128, i); err != nil {
						done <- err
						return
					}
				}
				done <- nil
			}()
			for i := uint64(1); i <= rounds; i++ {
				p := [13]byte{byte(i), 1: byte(i), 12: byte(i)}
				v.WriteAt(p[:], 3)
				if err := c.store(v, i&0x7f); err != nil {
					t.Fatal(err)
				}
				err := poll(func() (bool, error) {
					select {
					case err := <-done:
						done <- err
						return true, err
					default:
					}
					x, err := v.Load64(128)
					return x == i, err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}
