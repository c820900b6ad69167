package ivshmem

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// fakeBackend is a back end of nothing but what a test sets.
type fakeBackend struct {
	config     []byte
	registers  map[regs.Register]uint32
	sections   shmem.Sections
	interrupts Interrupts
	closed     int
}

func (b *fakeBackend) Address() string                       { return "fake" }
func (b *fakeBackend) Driver() string                        { return "fake" }
func (b *fakeBackend) WriteConfig(int, uint8) error          { return nil }
func (b *fakeBackend) Load(r regs.Register) (uint32, error)  { return b.registers[r], nil }
func (b *fakeBackend) Store(r regs.Register, v uint32) error { return nil }
func (b *fakeBackend) Sections() *shmem.Sections             { return &b.sections }
func (b *fakeBackend) Interrupts() Interrupts                { return b.interrupts }
func (b *fakeBackend) Close() error                          { b.closed++; return nil }
func (b *fakeBackend) Config() ([]byte, error) {
	if b.config == nil {
		return nil, errors.New("no configuration space")
	}
	return b.config, nil
}

// newFake is peer 0 of 2, with 2 vectors.
func newFake(t *testing.T) *fakeBackend {
	t.Helper()
	b := &fakeBackend{
		config:     make([]byte, 256),
		registers:  map[regs.Register]uint32{0x04: 2},
		interrupts: Interrupts{},
	}
	for at, row := range map[int]string{
		0x00: "0a110641 00001000 000000ff", 0x34: "40",
		0x40: "09601800 00100000", // State Table of 1000h bytes
		0x60: "11000100",          // MSI-X, 2 vectors
	} {
		p, err := hex.DecodeString(strings.ReplaceAll(row, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		copy(b.config[at:], p)
	}
	var err error
	if b.sections.Layout, err = shmem.NewLayout(0x1000, 0, 0, 2); err != nil {
		t.Fatal(err)
	}
	return b
}

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestNewFails lets New fail early: it must close the back end, and no
// descriptor that is not its own.
func TestNewFails(t *testing.T) {
	stdin, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		unix.Dup2(stdin, 0)
		unix.Close(stdin)
	}()
	b := &fakeBackend{interrupts: Interrupts{}}
	if _, err := New(b); err == nil {
		t.Fatal("a device without configuration space was accepted")
	}
	if b.closed != 1 {
		t.Errorf("the back end was closed %d times, want once", b.closed)
	}
	if _, err := unix.FcntlInt(0, unix.F_GETFD, 0); err != nil {
		t.Errorf("standard input: %v", err)
	}
}

// TestNewInterruptCount gives New a back end with other numbers of interrupt
// descriptors than the device has vectors: too many are a mistake, with fewer
// some vectors cannot be waited for.
func TestNewInterruptCount(t *testing.T) {
	b := newFake(t)
	b.interrupts.FDs = []int{eventfd(t), eventfd(t), eventfd(t)}
	if _, err := New(b); err == nil || !strings.Contains(err.Error(), "expected at most 2 descriptors") {
		t.Errorf("3 descriptors for 2 vectors: got %v", err)
	}
	for _, n := range []int{1, 2} {
		b := newFake(t)
		for range n {
			b.interrupts.FDs = append(b.interrupts.FDs, eventfd(t))
		}
		d, err := New(b)
		if err != nil {
			t.Fatal(err)
		}
		err = d.Wait(t.Context(), []int{1}, func() bool { return true })
		if refused := errors.Is(err, ErrNotSupported); refused != (n == 1) {
			t.Errorf("wait for vector 1 with %d descriptors: %v", n, err)
		}
		if err := d.Wait(t.Context(), []int{0}, func() bool { return true }); err != nil {
			t.Errorf("wait for vector 0 with %d descriptors: %v", n, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestUnprivileged opens a back end that shows 64 bytes of configuration
// space, but whose driver knows the rest.
func TestUnprivileged(t *testing.T) {
	b := newFake(t)
	b.config = b.config[:64]
	if _, err := New(b); !errors.Is(err, ErrConfigShort) {
		t.Errorf("nobody knows: got %v, want ErrConfigShort", err)
	}
	b.interrupts = Interrupts{FDs: []int{eventfd(t)}, Shared: true, Vectors: 5}
	d, err := New(b)
	if err != nil {
		t.Fatal(err)
	}
	if d.Vectors() != 5 || !d.OneShot() || d.VectorsApart() {
		t.Errorf("vectors %d, one-shot %v, apart %v; want 5, true, false", d.Vectors(), d.OneShot(), d.VectorsApart())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	// Nobody switched one-shot mode off, and nobody here can.
	b.interrupts.Shared = false
	if _, err := New(b); !errors.Is(err, ErrConfigShort) {
		t.Errorf("one-shot mode unknown: got %v, want ErrConfigShort", err)
	}
}

// TestInfoGone looks at a device whose registers read all ones since it was
// opened: Interrupt Control is not on then, but unknown.
func TestInfoGone(t *testing.T) {
	b := newFake(t)
	d, err := New(b, AsObserver())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	b.registers[regs.InterruptControl] = 0xffffffff
	var i Info
	d.Sections().States = gone{}
	i.device(d)
	if i.InterruptControl != nil {
		t.Errorf("Interrupt Control: got %v, want unknown", *i.InterruptControl)
	}
	if all := strings.Join(i.Missing, "\n"); !strings.Contains(all, "Interrupt Control: ") || !strings.Contains(all, "all ones") {
		t.Errorf("missing: got %q", all)
	}
}

// gone is a State Table that cannot be read.
type gone struct{}

func (gone) Load(uint32) (uint32, error) { return 0, os.ErrClosed }

// lineBackend has INTx: it records what is done to let interrupts through.
type lineBackend struct {
	*fakeBackend
	done []string
	fail error
}

func (b *lineBackend) Store(r regs.Register, v uint32) error {
	b.done = append(b.done, fmt.Sprintf("%v=%d", r, v))
	return nil
}

func (b *lineBackend) WriteConfig(offset int, v uint8) error {
	b.done = append(b.done, fmt.Sprintf("%02Xh=%d", offset, v))
	return nil
}

// TestRearm: an interrupt is let through again after a write to Interrupt
// Control, and before the condition is asked. The other order makes a storm of
// interrupts in QEMU.
func TestRearm(t *testing.T) {
	fd := eventfd(t)
	b := &lineBackend{fakeBackend: newFake(t)}
	b.config[0x41] = 0 // no MSI-X
	b.interrupts = Interrupts{FDs: []int{fd}, Rearm: func() error {
		b.done = append(b.done, "rearm")
		return b.fail
	}}
	d, err := New(b)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	expect := func(want ...string) {
		t.Helper()
		if !slices.Equal(b.done, want) {
			t.Errorf("got %q, want %q", b.done, want)
		}
		b.done = nil
	}
	expect("43h=1", "State=0", "Interrupt Control=1", "rearm")
	if !d.OneShot() {
		t.Error("one-shot mode is off, so nothing writes Interrupt Control")
	}
	wait := func() error {
		before := d.Interrupts(0)
		evfd.Signal(fd)
		return d.Wait(t.Context(), nil, func() bool {
			b.done = append(b.done, "ask")
			return d.Interrupts(0) > before
		})
	}
	if err := wait(); err != nil {
		t.Fatal(err)
	}
	expect("ask", "ask", "Interrupt Control=1", "rearm", "ask")
	b.fail = unix.EIO
	if err := wait(); !errors.Is(err, unix.EIO) {
		t.Errorf("wait without rearming: %v, want EIO", err)
	}
}
