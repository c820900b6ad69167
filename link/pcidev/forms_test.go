package pcidev

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// formLink has one vector, which every form can have.
var formLink = link.Config{Peers: 3, Vectors: 1, Protocol: 0x4321, ReadWrite: 0x2000, Output: 0x1000}

// TestForms compares the configuration space of each form of the device with
// one that was written down by hand from the specification; and what a guest
// can write of it, and the BARs.
func TestForms(t *testing.T) {
	for _, c := range []struct {
		name     string
		options  Options
		config   string
		writable map[int]byte // beside Privileged Control, where it is not 0
		regions  [8]vfiouser.Region
	}{
		{"INTx", Options{INTx: true}, `
00: 0a 11 06 41 00 00 10 00 00 21 43 ff 00 00 00 00
10: 00 00 00 00 00 00 00 00 0c 00 00 00 00 00 00 00
20: 00 00 00 00 00 00 00 00 00 00 00 00 0a 11 06 41
30: 00 00 00 00 40 00 00 00 00 00 00 00 00 01 00 00
40: 09 00 18 00 00 10 00 00 00 20 00 00 00 00 00 00
50: 00 10 00 00 00 00 00 00 00 00 00 00 00 00 00 00
`, map[int]byte{
			0x04: 0x06, 0x05: 0x04,
			0x11: 0xf0, 0x12: 0xff, 0x13: 0xff,
			0x19: 0x80, 0x1a: 0xff, 0x1b: 0xff, 0x1c: 0xff, 0x1d: 0xff, 0x1e: 0xff, 0x1f: 0xff,
		}, [8]vfiouser.Region{bar0: {Flags: 3, Size: 0x1000}, bar2: {Flags: 7, Size: 0x8000}, config: {Flags: 3, Size: 256}}},

		{"Base Address", Options{BaseAddress: 0x1_2345_6000}, `
00: 0a 11 06 41 00 00 10 00 00 21 43 ff 00 00 00 00
10: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
20: 00 00 00 00 00 00 00 00 00 00 00 00 0a 11 06 41
30: 00 00 00 00 40 00 00 00 00 00 00 00 00 00 00 00
40: 09 60 20 00 00 10 00 00 00 20 00 00 00 00 00 00
50: 00 10 00 00 00 00 00 00 00 60 45 23 01 00 00 00
60: 11 00 00 00 01 00 00 00 01 01 00 00 00 00 00 00
`, map[int]byte{
			0x04: 0x06, 0x05: 0x04,
			0x11: 0xf0, 0x12: 0xff, 0x13: 0xff,
			0x15: 0xf0, 0x16: 0xff, 0x17: 0xff,
			0x63: 0xc0,
		}, [8]vfiouser.Region{bar0: {Flags: 3, Size: 0x1000}, bar1: {Flags: 3, Size: 0x1000}, config: {Flags: 7, Size: 256}}},

		{"registers in I/O space", Options{IORegisters: true}, `
00: 0a 11 06 41 00 00 10 00 00 21 43 ff 00 00 00 00
10: 01 00 00 00 00 00 00 00 0c 00 00 00 00 00 00 00
20: 00 00 00 00 00 00 00 00 00 00 00 00 0a 11 06 41
30: 00 00 00 00 40 00 00 00 00 00 00 00 00 00 00 00
40: 09 60 18 00 00 10 00 00 00 20 00 00 00 00 00 00
50: 00 10 00 00 00 00 00 00 00 00 00 00 00 00 00 00
60: 11 00 00 00 01 00 00 00 01 01 00 00 00 00 00 00
`, map[int]byte{
			0x04: 0x07, 0x05: 0x04,
			0x10: 0xe0, 0x11: 0xff, 0x12: 0xff, 0x13: 0xff,
			0x15: 0xf0, 0x16: 0xff, 0x17: 0xff,
			0x19: 0x80, 0x1a: 0xff, 0x1b: 0xff, 0x1c: 0xff, 0x1d: 0xff, 0x1e: 0xff, 0x1f: 0xff,
			0x63: 0xc0,
		}, [8]vfiouser.Region{bar0: {Flags: 3, Size: 0x20}, bar1: {Flags: 3, Size: 0x1000}, bar2: {Flags: 7, Size: 0x8000}, config: {Flags: 3, Size: 256}}},

		{"all of them", Options{INTx: true, BaseAddress: 0x1_0000_0000, IORegisters: true}, `
00: 0a 11 06 41 00 00 10 00 00 21 43 ff 00 00 00 00
10: 01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
20: 00 00 00 00 00 00 00 00 00 00 00 00 0a 11 06 41
30: 00 00 00 00 40 00 00 00 00 00 00 00 00 01 00 00
40: 09 00 20 00 00 10 00 00 00 20 00 00 00 00 00 00
50: 00 10 00 00 00 00 00 00 00 00 00 00 01 00 00 00
`, map[int]byte{
			0x04: 0x07, 0x05: 0x04,
			0x10: 0xe0, 0x11: 0xff, 0x12: 0xff, 0x13: 0xff,
		}, [8]vfiouser.Region{bar0: {Flags: 3, Size: 0x20}, config: {Flags: 7, Size: 256}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFunction(t, newLink(t, formLink), c.options)
			want := parseHex(t, c.config)
			if diff := cmp.Diff(hex.Dump(want), hex.Dump(f.read(t, config, 0, 256))); diff != "" {
				t.Errorf("configuration space (-want +got):\n%s", diff)
			}
			f.write(t, config, 0, bytes.Repeat([]byte{0xff}, 256)...)
			want[0x43] |= 1
			for at, bits := range c.writable {
				want[at] |= bits
			}
			if diff := cmp.Diff(hex.Dump(want), hex.Dump(f.read(t, config, 0, 256))); diff != "" {
				t.Errorf("after all ones (-want +got):\n%s", diff)
			}
			for i, want := range c.regions {
				// Something is mappable in any case, and configuration space has
				// no file for it.
				if got := f.Region(uint32(i)); got.Flags != want.Flags || got.Size != want.Size || i == config && got.FD != -1 {
					t.Errorf("region %d: %+v, want %+v", i, got, want)
				}
			}
			// The registers are where they always are.
			f.set(t, regState, 0x55)
			if id, peers, state := f.get(t, regID), f.get(t, regMaxPeers), f.get(t, regState); id != 0 || peers != 3 || state != 0x55 {
				t.Errorf("ID %d, Maximum Peers %d, State %#x", id, peers, state)
			}
		})
	}
}

func TestFormsRefused(t *testing.T) {
	for _, c := range []struct {
		options Options
		link    link.Config
		say     string
	}{
		{Options{INTx: true}, link.Config{Peers: 2, Vectors: 2}, "vectors: expected 1"},
		{Options{BaseAddress: 0x1000800}, formLink, "base address: expected a multiple of 4096"},
		{Options{BaseAddress: 1<<64 - 0x1000}, formLink, "base address: expected 24576 bytes"},
	} {
		f, err := New(newLink(t, c.link), c.options)
		if err == nil {
			f.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%+v: %v, want %q", c.options, err, c.say)
		}
	}
}

// pin is a function with INTx whose interrupts are enabled, its client, and a
// peer that rings it.
type pin struct {
	*irqRig
}

func newPin(t *testing.T) *pin {
	l := newLink(t, formLink)
	o := Options{INTx: true}
	r := &irqRig{t: t, f: newFunction(t, l, o), far: newFunction(t, l, o)}
	for i := range r.fds {
		r.fds[i] = eventfd(t, 0, unix.EFD_NONBLOCK)
	}
	p := &pin{r}
	p.connect()
	p.enable(1)
	return p
}

func (p *pin) irqs(s vfiouser.IRQSet) {
	p.t.Helper()
	if err := p.f.SetIRQs(s); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pin) connect() {
	p.t.Helper()
	d, err := unix.Dup(p.fds[0])
	if err != nil {
		p.t.Fatal(err)
	}
	p.irqs(vfiouser.IRQSet{Index: 0, Action: vfiouser.IRQTrigger, EventFD: true, Count: 1, FDs: []int{d}})
}

func (p *pin) unmask() { p.irqs(vfiouser.IRQSet{Index: 0, Action: vfiouser.IRQUnmask, Count: 1}) }

// disable writes Command: Interrupt Disable, and memory space.
func (p *pin) disable(on bool) {
	p.t.Helper()
	high := byte(0)
	if on {
		high = 4
	}
	p.f.write(p.t, config, 4, 2, high)
}

// expect1 checks how often it was raised since the last look, and Interrupt
// Status.
func (p *pin) expect1(what string, raised uint64, status bool) {
	p.t.Helper()
	p.expect(what, raised)
	want := byte(0x10)
	if status {
		want |= 8
	}
	if got := p.f.read(p.t, config, 6, 1)[0]; got != want {
		p.t.Errorf("%s: Status %#x, want %#x", what, got, want)
	}
}

func TestINTx(t *testing.T) {
	t.Run("what is announced", func(t *testing.T) {
		p := newPin(t)
		for i := range uint32(5) {
			want := vfiouser.IRQ{}
			if i == 0 {
				want = vfiouser.IRQ{Flags: 7, Count: 1}
			}
			if got := p.f.IRQ(i); got != want {
				t.Errorf("interrupt type %d: %+v, want %+v", i, got, want)
			}
			if err := p.f.SetIRQs(vfiouser.IRQSet{Index: i, Action: vfiouser.IRQTrigger, Count: 0}); (err == nil) != (i == 0) {
				t.Errorf("interrupt type %d: %v", i, err)
			}
		}
	})
	// A driver's way: look at Status, disable, access a register, enable.
	t.Run("delivery", func(t *testing.T) {
		p := newPin(t)
		p.expect1("at first", 0, false)
		for range 3 {
			p.ring(0)
			p.expect1("rung", 1, true)
			p.disable(true)
			p.expect1("disabled", 0, false)
			p.unmask() // QEMU, when a register is accessed
			p.disable(false)
			p.expect1("enabled", 0, false)
		}
		// Status in an access of the whole first row.
		p.ring(0)
		if got := p.f.read(t, config, 0, 16); got[6] != 0x18 || got[5] != 0 || got[7] != 0 {
			t.Errorf("first row: % x", got)
		}
		if got := p.f.read(t, config, 7, 4); got[0] != 0 {
			t.Errorf("behind Status: % x", got)
		}
	})
	t.Run("interrupts disabled in the device", func(t *testing.T) {
		p := newPin(t)
		p.enable(0)
		p.ring(0)
		p.enable(1)
		p.expect1("after enabling", 0, false)
	})
	t.Run("masked by delivery", func(t *testing.T) {
		p := newPin(t)
		p.ring(0)
		p.expect1("first", 1, true)
		p.ring(0)
		p.ring(0)
		p.expect1("while masked", 0, true)
		p.unmask()
		p.expect1("unmasked", 1, true)
		p.unmask()
		p.expect1("unmasked again", 0, true)
	})
	// QEMU drops a line that is raised while the guest has it disabled.
	t.Run("disabled in Command", func(t *testing.T) {
		p := newPin(t)
		p.disable(true)
		p.ring(0)
		p.expect1("while disabled", 0, false)
		p.unmask()
		p.expect1("unmasked", 0, false)
		p.disable(false)
		p.expect1("enabled", 1, true)
	})
	t.Run("disabled and masked", func(t *testing.T) {
		p := newPin(t)
		p.ring(0)
		p.disable(true)
		p.expect1("first", 1, false)
		p.ring(0)
		p.disable(false)
		p.expect1("enabled, but masked", 0, false)
		p.unmask()
		p.expect1("unmasked", 1, true)
	})
	t.Run("masked by the client", func(t *testing.T) {
		p := newPin(t)
		p.irqs(vfiouser.IRQSet{Index: 0, Action: vfiouser.IRQMask, Count: 1, Bools: []byte{0}})
		p.ring(0)
		p.expect1("not masked after all", 1, true)
		p.unmask()
		p.irqs(vfiouser.IRQSet{Index: 0, Action: vfiouser.IRQMask, Count: 1, Bools: []byte{1}})
		p.ring(0)
		p.expect1("masked", 0, true)
		p.unmask()
		p.expect1("unmasked", 1, true)
	})
	// QEMU takes any access to a BAR for the end of the interrupt, also one
	// that came before the guest took it.
	t.Run("unmasked before the driver acknowledged", func(t *testing.T) {
		p := newPin(t)
		p.ring(0)
		p.disable(true)
		p.unmask()
		p.disable(false)
		p.ring(0)
		p.expect1("rung twice", 2, true)
		for range raisedAgain {
			p.unmask()
			p.expect1("unmasked, not acknowledged", 1, true)
		}
		p.unmask()
		p.expect1("a driver that does not acknowledge any more", 0, true)
		p.ring(0)
		p.disable(true)
		p.expect1("acknowledged", 1, false)
		p.unmask()
		p.disable(false)
		p.expect1("after that", 0, false)
	})
	t.Run("reset", func(t *testing.T) {
		p := newPin(t)
		p.ring(0)
		p.ring(0)
		p.f.Reset()
		p.expect1("reset", 1, false)
		p.enable(1)
		p.ring(0)
		p.expect1("after it", 1, true)
	})
	t.Run("withdrawn", func(t *testing.T) {
		p := newPin(t)
		p.ring(0)
		p.ring(0)
		p.irqs(vfiouser.IRQSet{Index: 0, Action: vfiouser.IRQTrigger})
		p.ring(0)
		p.expect1("withdrawn", 1, true)
		p.connect()
		p.expect1("what came before is delivered", 1, true)
	})
}
