package regs_test

import (
	"errors"
	"testing"

	"github.com/ivshmem-go/ivshmem/regs"
)

func TestDoorbell(t *testing.T) {
	for _, c := range []struct {
		target, vector uint16
		want           uint32
	}{
		{0, 0, 0},
		{0, 1, 0x0000_0001},
		{1, 0, 0x0001_0000},
		{2, 5, 0x0002_0005},
		{0x1234, 0xabcd, 0x1234_abcd},
		{0xffff, 0xffff, 0xffff_ffff},
	} {
		if got := regs.Doorbell(c.target, c.vector); got != c.want {
			t.Errorf("Doorbell(%d, %d) = %08x, want %08x", c.target, c.vector, got, c.want)
		}
		if target, vector := regs.SplitDoorbell(c.want); target != c.target || vector != c.vector {
			t.Errorf("SplitDoorbell(%08x) = %d, %d, want %d, %d", c.want, target, vector, c.target, c.vector)
		}
	}
}

// The numbers are the specification's; a typing error in a constant is found
// here, not in a guest.
func TestNumbers(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want int
	}{
		{"vendor ID", regs.VendorID, 0x110a},
		{"device ID", regs.DeviceID, 0x4106},
		{"ID", int(regs.ID), 0x00},
		{"Maximum Peers", int(regs.MaxPeers), 0x04},
		{"Interrupt Control", int(regs.InterruptControl), 0x08},
		{"Doorbell", int(regs.DoorbellRegister), 0x0c},
		{"State", int(regs.State), 0x10},
		{"interrupt enable", regs.InterruptEnable, 1},
		{"one-shot", regs.OneShot, 1},
		{"fewest peers", regs.MinPeers, 2},
		{"most peers", regs.PeersMax, 65536},
		{"most vectors", regs.VectorsMax, 2048},
		{"vendor capability", regs.CapVendor, 0x09},
		{"MSI-X capability", regs.CapMSIX, 0x11},
		{"short capability", regs.VendorCapShort, 0x18},
		{"long capability", regs.VendorCapLong, 0x20},
	} {
		if c.got != c.want {
			t.Errorf("%s is %#x, want %#x", c.name, c.got, c.want)
		}
	}
}

func TestRegisterString(t *testing.T) {
	for r, want := range map[regs.Register]string{
		0x00: "ID", 0x04: "Maximum Peers", 0x08: "Interrupt Control",
		0x0c: "Doorbell", 0x10: "State", 0x14: "14h", 0x02: "02h", 0xffc: "FFCh",
	} {
		if got := r.String(); got != want {
			t.Errorf("register at %#x is called %q, want %q", uint16(r), got, want)
		}
	}
}

func TestProtocol(t *testing.T) {
	for _, c := range []struct {
		p      regs.Protocol
		name   string
		virtio bool
		peer0  regs.Protocol // class code that peer 0 finds
		peer1  regs.Protocol
	}{
		{0x0000, "undefined", false, 0x0000, 0x0000},
		{0x0001, "virtual Ethernet", false, 0x0001, 0x0001},
		{0x0002, "reserved 0002h", false, 0x0002, 0x0002},
		{0x3fff, "reserved 3FFFh", false, 0x3fff, 0x3fff},
		{0x4000, "user-defined 4000h", false, 0x4000, 0x4000},
		{0x7fff, "user-defined 7FFFh", false, 0x7fff, 0x7fff},
		{0x8000, "virtio device 0 front-end", true, 0xc000, 0x8000},
		{0x8001, "virtio network front-end", true, 0xc001, 0x8001},
		{0xc001, "virtio network back-end", true, 0xc001, 0x8001},
		{0x8002, "virtio block front-end", true, 0xc002, 0x8002},
		{0x8003, "virtio console front-end", true, 0xc003, 0x8003},
		{0xc003, "virtio console back-end", true, 0xc003, 0x8003},
		{0xc004, "virtio entropy back-end", true, 0xc004, 0x8004},
		{0xbfff, "virtio device 16383 front-end", true, 0xffff, 0xbfff},
		{0xffff, "virtio device 16383 back-end", true, 0xffff, 0xbfff},
	} {
		if got := c.p.String(); got != c.name {
			t.Errorf("protocol %04x is called %q, want %q", uint16(c.p), got, c.name)
		}
		if got := c.p.IsVirtio(); got != c.virtio {
			t.Errorf("protocol %04x: IsVirtio is %v", uint16(c.p), got)
		}
		if got := c.p.ForPeer(0); got != c.peer0 {
			t.Errorf("protocol %04x for peer 0 is %04x, want %04x", uint16(c.p), uint16(got), uint16(c.peer0))
		}
		for _, id := range []uint32{1, 2, 65535} {
			if got := c.p.ForPeer(id); got != c.peer1 {
				t.Errorf("protocol %04x for peer %d is %04x, want %04x", uint16(c.p), id, uint16(got), uint16(c.peer1))
			}
		}
	}
}

func TestClassCode(t *testing.T) {
	for _, c := range []struct {
		p     regs.Protocol
		class uint32
	}{
		{0x0000, 0xff0000}, {0x0001, 0xff0001}, {0x4001, 0xff4001}, {0xc003, 0xffc003}, {0xffff, 0xffffff},
	} {
		if got := regs.ClassCode(c.p); got != c.class {
			t.Errorf("class code of protocol %04x is %06x, want %06x", uint16(c.p), got, c.class)
		}
		if got, err := regs.ProtocolOf(c.class); err != nil || got != c.p {
			t.Errorf("protocol of class code %06x is %04x, %v, want %04x", c.class, uint16(got), err, uint16(c.p))
		}
	}
	for _, class := range []uint32{0, 0x000001, 0x020000, 0xfe0001, 0xff, 0x1ff0001} {
		_, err := regs.ProtocolOf(class)
		if e, ok := errors.AsType[*regs.ConfigError](err); !ok || e.Field != "class code" {
			t.Errorf("class code %06x: error %v, want a ConfigError of the class code", class, err)
		}
	}
}

func TestParseProtocol(t *testing.T) {
	for s, want := range map[string]regs.Protocol{"0": 0, "1": 1, "0x4001": 0x4001, "16385": 0x4001, "0xffff": 0xffff} {
		if got, err := regs.ParseProtocol(s); err != nil || got != want {
			t.Errorf("ParseProtocol(%q) = %04x, %v, want %04x", s, uint16(got), err, uint16(want))
		}
	}
	for _, s := range []string{"", "-1", "65536", "0x10000", "4001h", "net", "1 "} {
		if got, err := regs.ParseProtocol(s); err == nil {
			t.Errorf("ParseProtocol(%q) = %04x, want an error", s, uint16(got))
		}
	}
}
