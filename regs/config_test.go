package regs_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ivshmem-go/ivshmem/regs"
)

// space makes a configuration space of 256 bytes of rows like
// "40: 09 60 20 00": an offset and the bytes from there on, hexadecimal.
func space(rows string) []byte {
	b := make([]byte, 256)
	for row := range strings.Lines(rows) {
		var at int
		if _, err := fmt.Sscanf(row, "%x:", &at); err != nil {
			continue
		}
		_, text, _ := strings.Cut(strings.TrimSpace(row), ":")
		bytes, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
		if err != nil {
			panic(err)
		}
		copy(b[at:], bytes)
	}
	return b
}

// longSpace is a device as Jailhouse presents it: vendor capability at 40h
// with Base Address, one-shot mode on, 3 peers with sections of 1000h, 9000h
// and 2000h bytes, 16 vectors, protocol type 4001h.
var longSpace = space(`
	00: 0a 11 06 41  00 00 10 00  00 01 40 ff  00 00 00 00
	2c: 0a 11 06 41
	34: 40
	40: 09 60 20 01  00 10 00 00
	48: 00 90 00 00 00 00 00 00
	50: 00 20 00 00 00 00 00 00
	58: 00 00 0f 3f 01 00 00 00
	60: 11 00 0f 80  01 00 00 00  01 01 00 00`)

// shortSpace is a device as QEMU presents it: MSI-X first, vendor capability
// behind it without Base Address, no R/W section, output sections of
// 1_0000_2000h bytes, 3 vectors, virtio console front-end.
var shortSpace = space(`
	00: 0a 11 06 41  06 04 10 00  00 03 80 ff  00 00 00 00
	34: 98
	80: 09 00 18 00  00 20 00 00
	88: 00 00 00 00 00 00 00 00
	90: 00 20 00 00 01 00 00 00
	98: 11 80 02 40  01 00 00 00  01 08 00 00`)

func TestGoldenSpaces(t *testing.T) {
	for _, c := range []struct {
		name     string
		config   []byte
		protocol regs.Protocol
		vendor   regs.VendorCap
		msix     regs.MSIX
	}{
		{"long", longSpace, 0x4001,
			regs.VendorCap{Offset: 0x40, Privileged: 1, StateTable: 0x1000, ReadWrite: 0x9000, Output: 0x2000, HasBase: true, BaseAddress: 0x1_3f0f_0000},
			regs.MSIX{Offset: 0x60, Vectors: 16, Enabled: true}},
		{"short", shortSpace, 0x8003,
			regs.VendorCap{Offset: 0x80, StateTable: 0x2000, Output: 0x1_0000_2000},
			regs.MSIX{Offset: 0x98, Vectors: 3, Masked: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := bytes.Clone(c.config)
			if p, err := regs.ConfigProtocol(c.config); err != nil || p != c.protocol {
				t.Errorf("protocol %04x, %v, want %04x", uint16(p), err, uint16(c.protocol))
			}
			v, err := regs.ParseVendorCap(c.config)
			if d := cmp.Diff(c.vendor, v); d != "" || err != nil {
				t.Errorf("vendor capability: %v\n%s", err, d)
			}
			if got, want := v.PrivilegedControl(), c.vendor.Offset+3; got != want {
				t.Errorf("Privileged Control at %#x, want %#x", got, want)
			}
			m, err := regs.ParseMSIX(c.config)
			if d := cmp.Diff(c.msix, m); d != "" || err != nil {
				t.Errorf("MSI-X capability: %v\n%s", err, d)
			}
			// The encoder gives the same bytes.
			want := c.config[c.vendor.Offset:]
			want = want[:want[2]]
			if got := v.Append(nil, want[1]); !bytes.Equal(got, want) {
				t.Errorf("encoded\n%x, want\n%x", got, want)
			}
			if !bytes.Equal(before, c.config) {
				t.Error("the configuration space was changed")
			}
		})
	}
}

// kind is what an error is, as far as a caller can tell.
func kind(err error) string {
	e, ok := errors.AsType[*regs.ConfigError](err)
	switch {
	case err == nil:
		return "none"
	case errors.Is(err, regs.ErrGone):
		return "gone"
	case errors.Is(err, regs.ErrNoCapability):
		return "no capability"
	case errors.Is(err, regs.ErrConfigShort):
		return "short"
	case ok:
		return "broken " + e.Field
	}
	return "untyped: " + err.Error()
}

// Each prefix of a good space either holds what is asked for, or the error
// says what is missing.
func TestEveryLength(t *testing.T) {
	for _, c := range []struct {
		name                string
		config              []byte
		class, vendor, msix int // ends of what has to be there
	}{
		{"long", longSpace, 0x0c, 0x60, 0x6c},
		{"short", shortSpace, 0x0c, 0x9a, 0xa4}, // 9Ah: the list starts at 98h
	} {
		for n := range len(c.config) + 1 {
			b := c.config[:n:n]
			check := func(what string, err error, end int) {
				// Which field is broken depends on how much is there.
				got, _, _ := strings.Cut(kind(err), " ")
				want := "none"
				switch {
				case n < end && n <= 64:
					want = "short"
				case n < end:
					want = "broken"
				}
				if got != want {
					t.Errorf("%s space of %d bytes: %s: %v, want %s", c.name, n, what, err, want)
				}
				if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("%d bytes", n)) {
					t.Errorf("%s space of %d bytes: %q does not say how long it is", c.name, n, err)
				}
			}
			_, err := regs.ConfigProtocol(b)
			check("protocol", err, c.class)
			_, err = regs.ParseVendorCap(b)
			check("vendor capability", err, c.vendor)
			_, err = regs.ParseMSIX(b)
			check("MSI-X", err, c.msix)
		}
	}
}

func TestCapabilityWalk(t *testing.T) {
	const head = "00: 0a 11 06 41  00 00 10 00\n"
	for _, c := range []struct {
		name string
		rows string
		at   int
		err  string
	}{
		{"first", head + "34: 40\n40: 09 00", 0x40, "none"},
		{"behind others", head + "34: 40\n40: 11 50\n50: 05 f0\nf0: 09 40", 0xf0, "none"},
		{"first of two", head + "34: 40\n40: 09 50\n50: 09 00", 0x40, "none"},
		{"at the very end", head + "34: fc\nfc: 09 00", 0xfc, "none"},
		{"reserved bits of the pointers set", head + "34: 43\n40: 11 51\n50: 09 00", 0x50, "none"},
		{"backwards", head + "34: 80\n80: 11 40\n40: 09 00", 0x40, "none"},
		{"no list", head + "34: 00", 0, "no capability"},
		{"only others", head + "34: 40\n40: 11 50\n50: 05 00", 0, "no capability"},
		{"status bit absent", "00: 0a 11 06 41  00 00 ef ff\n34: 40\n40: 09 00", 0, "no capability"},
		{"pointer into the header", head + "34: 3c\n3c: 09 00", 0, "broken capability pointer"},
		{"pointer to reserved bits only", head + "34: 03", 0, "no capability"},
		{"pointer to 04h", head + "34: 40\n40: 11 04", 0, "broken capability pointer"},
		{"self loop", head + "34: 40\n40: 11 40", 0, "broken capability pointer"},
		{"loop of two", head + "34: 40\n40: 11 50\n50: 05 40", 0, "broken capability pointer"},
		{"all ones behind", head + "34: fc\nfc: ff ff ff ff", 0, "broken capability pointer"},
		{"gone", "00: " + strings.Repeat("ff", 256), 0, "gone"},
		{"empty", "", 0, "no capability"},
	} {
		t.Run(c.name, func(t *testing.T) {
			at, err := regs.FindCapability(space(c.rows), regs.CapVendor)
			if at != c.at || kind(err) != c.err {
				t.Errorf("found at %#x, %v, want at %#x, %s", at, err, c.at, c.err)
			}
		})
	}
	// The longest list there can be.
	b := space(head + "34: 40")
	for at := 0x40; at < 0x100; at += 4 {
		b[at], b[at+1] = 0x05, byte(at+4)
	}
	if _, err := regs.FindCapability(b, regs.CapVendor); kind(err) != "no capability" {
		t.Errorf("list of 48 capabilities: %v", err)
	}
	b[0xfc] = regs.CapVendor
	if at, err := regs.FindCapability(b, regs.CapVendor); at != 0xfc || err != nil {
		t.Errorf("list of 48 capabilities: last one found at %#x, %v", at, err)
	}
	// A pointer behind the end of a space of 80h bytes (Jailhouse).
	b = space(head + "34: 7c\n7c: 11 80\n80: 09 00 18")
	if _, err := regs.FindCapability(b[:0x80], regs.CapVendor); kind(err) != "broken capability" {
		t.Errorf("pointer behind the end: %v", err)
	}
	if _, err := regs.FindCapability(b[:0x81], regs.CapVendor); kind(err) != "broken capability" {
		t.Errorf("pointer to the last byte: %v", err)
	}
}

func TestVendorCapErrors(t *testing.T) {
	edit := func(at int, b ...byte) []byte {
		c := bytes.Clone(longSpace)
		copy(c[at:], b)
		return c
	}
	end := space("00: 0a 11 06 41  00 00 10 00\n34: e0\ne0: 09 00 20 00  00 10")
	for _, c := range []struct {
		name   string
		config []byte
		err    string
		base   bool
	}{
		{"long at the very end", end, "none", true},
		{"short at the very end", space("00: 0a 11 06 41  00 00 10 00\n34: e8\ne8: 09 00 18 00  00 10"), "none", false},
		{"long, 8 bytes too far", space("00: 0a 11 06 41  00 00 10 00\n34: e8\ne8: 09 00 20 00  00 10"), "broken vendor capability", false},
		{"length outside", space("00: 0a 11 06 41  00 00 10 00\n34: fc\nfc: 09 00 18 00"), "broken vendor capability", false},
		{"length 0", edit(0x42, 0), "broken vendor capability length", false},
		{"length 17h", edit(0x42, 0x17), "broken vendor capability length", false},
		{"length 18h", edit(0x42, 0x18), "none", false},
		{"length 1Fh", edit(0x42, 0x1f), "none", false},
		{"length 28h", edit(0x42, 0x28), "none", true},
		{"length FFh", edit(0x42, 0xff), "broken vendor capability", false},
		{"State Table size 0", edit(0x44, 0, 0, 0, 0), "broken State Table size", false},
		{"reserved bits of Privileged Control", edit(0x43, 0xff), "none", true},
	} {
		v, err := regs.ParseVendorCap(c.config)
		if kind(err) != c.err || v.HasBase != c.base {
			t.Errorf("%s: %+v, %v, want %s", c.name, v, err, c.err)
		}
		if v.Privileged&^1 != 0 {
			t.Errorf("%s: reserved bits read as %02x", c.name, v.Privileged)
		}
	}
}

func TestMSIXTableSize(t *testing.T) {
	for control, want := range map[uint16]regs.MSIX{
		0x0000: {Offset: 0x60, Vectors: 1},
		0x07ff: {Offset: 0x60, Vectors: 2048},
		0xffff: {Offset: 0x60, Vectors: 2048, Enabled: true, Masked: true},
		0x3800: {Offset: 0x60, Vectors: 1}, // reserved bits
	} {
		b := bytes.Clone(longSpace)
		b[0x62], b[0x63] = byte(control), byte(control>>8)
		if m, err := regs.ParseMSIX(b); err != nil || m != want {
			t.Errorf("Message Control %04x: %+v, %v, want %+v", control, m, err, want)
		}
	}
	// INTx device: no such capability.
	b := bytes.Clone(longSpace)
	b[0x41] = 0
	if _, err := regs.ParseMSIX(b); kind(err) != "no capability" {
		t.Errorf("device without MSI-X: %v", err)
	}
}

func TestConfigProtocolErrors(t *testing.T) {
	for _, c := range []struct{ name, rows, err string }{
		{"other vendor", "00: f4 1a 06 41\n09: 00 00 ff", "broken vendor and device ID"},
		{"ivshmem 1", "00: f4 1a 10 11\n09: 00 00 05", "broken vendor and device ID"},
		{"other device", "00: 0a 11 07 41\n09: 00 00 ff", "broken vendor and device ID"},
		{"other class", "00: 0a 11 06 41\n09: 01 00 02", "broken class code"},
		{"gone", "00: " + strings.Repeat("ff", 256), "gone"},
	} {
		if p, err := regs.ConfigProtocol(space(c.rows)); kind(err) != c.err {
			t.Errorf("%s: %v, %v, want %s", c.name, p, err, c.err)
		}
	}
}

// What is encoded anywhere in a list is read back.
func TestVendorCapRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := regs.VendorCap{
			Offset:     4 * rapid.IntRange(0x40/4, 0xe0/4).Draw(t, "offset"),
			Privileged: rapid.Uint8Range(0, 1).Draw(t, "privileged"),
			StateTable: rapid.Uint32Min(1).Draw(t, "state table"),
			ReadWrite:  rapid.Uint64().Draw(t, "rw"),
			Output:     rapid.Uint64().Draw(t, "output"),
			HasBase:    rapid.Bool().Draw(t, "has base"),
		}
		if want.HasBase {
			want.BaseAddress = rapid.Uint64().Draw(t, "base")
		}
		b := rapid.SliceOfN(rapid.Byte(), 256, 256).Draw(t, "rest")
		b[0], b[6], b[0x34] = 0x0a, b[6]|0x10, byte(want.Offset)
		n := copy(b[want.Offset:], want.Append(nil, b[want.Offset]))
		if n != int(b[want.Offset+2]) {
			t.Fatalf("%d bytes encoded, length says %d", n, b[want.Offset+2])
		}
		got, err := regs.ParseVendorCap(b)
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Fatalf("%v\n%s", err, d)
		}
	})
}

func TestConfigStrict(t *testing.T) {
	config := make([]byte, 64)
	for subsystem, want := range map[[4]byte]bool{
		{0x0a, 0x11, 0x07, 0x41}: true,
		{0x0a, 0x11, 0x06, 0x41}: false,
		{0xf4, 0x1a, 0x07, 0x41}: false,
		{0x07, 0x41, 0x0a, 0x11}: false,
	} {
		copy(config[0x2c:], subsystem[:])
		if got := regs.ConfigStrict(config); got != want {
			t.Errorf("subsystem % x: %v", subsystem, got)
		}
		if regs.ConfigStrict(config[:0x2f]) {
			t.Error("a space that ends before")
		}
	}
}
