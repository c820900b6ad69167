package regs_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/regs"
)

// follow walks a capability list the plain way, for at most as many steps as
// there are places for a capability, and returns where it came along.
func follow(config []byte) (places []int) {
	if len(config) <= 0x34 {
		return nil
	}
	at := 0x34
	for range 48 {
		next := int(config[at]) / 4 * 4
		if next < 0x40 || next+1 >= len(config) {
			break
		}
		places = append(places, next)
		at = next + 1
	}
	return places
}

func FuzzFindCapability(f *testing.F) {
	f.Add(longSpace, uint8(regs.CapVendor))
	f.Add(shortSpace, uint8(regs.CapMSIX))
	f.Fuzz(func(t *testing.T, config []byte, id uint8) {
		before := bytes.Clone(config)
		at, err := regs.FindCapability(config, id)
		if !bytes.Equal(before, config) {
			t.Fatal("the space was changed")
		}
		list := len(config) > 0x34 && config[6]&0x10 != 0 && (config[0] != 0xff || config[1] != 0xff)
		first := 0
		for _, p := range follow(config) {
			if config[p] == id {
				first = p
				break
			}
		}
		if list && first > 0 {
			if err != nil || at != first {
				t.Fatalf("found at %#x, %v, want at %#x", at, err, first)
			}
			return
		}
		if err == nil {
			t.Fatalf("found at %#x what is not there", at)
		}
		if k := kind(err); strings.HasPrefix(k, "untyped") {
			t.Fatal(k)
		}
	})
}

func FuzzParseVendorCap(f *testing.F) {
	f.Add(longSpace)
	f.Add(shortSpace)
	f.Fuzz(func(t *testing.T, config []byte) {
		c, err := regs.ParseVendorCap(config)
		if err != nil {
			if k := kind(err); strings.HasPrefix(k, "untyped") {
				t.Fatal(k)
			}
			return
		}
		n := int(config[c.Offset+2])
		if c.Offset < 0x40 || n < 0x18 || c.Offset+n > len(config) || c.StateTable == 0 || c.HasBase != (n >= 0x20) {
			t.Fatalf("%+v of length %#x in a space of %d bytes", c, n, len(config))
		}
		// The encoder gives the bytes back, but for reserved bits and a
		// length of no meaning.
		want := bytes.Clone(config[c.Offset : c.Offset+n])
		want[3] &= 1
		want[2] = 0x18
		if n >= 0x20 {
			want[2] = 0x20
		}
		if got := c.Append(nil, want[1]); !bytes.Equal(got, want[:want[2]]) {
			t.Fatalf("read as %+v, encoded as\n%x, was\n%x", c, got, want)
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add(longSpace)
	f.Add(shortSpace)
	f.Add(longSpace[:64])
	f.Fuzz(func(t *testing.T, config []byte) {
		p, err := regs.ConfigProtocol(config)
		if err == nil && !bytes.Equal(config[9:12], []byte{byte(p), byte(p >> 8), 0xff}) {
			t.Fatalf("protocol %04x of class code % x", uint16(p), config[9:12])
		}
		_, err2 := regs.ParseVendorCap(config)
		m, err3 := regs.ParseMSIX(config)
		if err3 == nil && (m.Vectors < 1 || m.Vectors > 2048 || m.Offset+12 > len(config) || config[m.Offset] != 0x11) {
			t.Fatalf("%+v in a space of %d bytes", m, len(config))
		}
		for _, err := range []error{err, err2, err3} {
			if k := kind(err); strings.HasPrefix(k, "untyped") {
				t.Fatal(k)
			}
			if err != nil && len(err.Error()) > 400 {
				t.Fatalf("error of %d bytes", len(err.Error()))
			}
		}
	})
}
