package console_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// FuzzControl lets buffers arrive at both sides of both wires that have control
// messages. A buffer is a byte of length and its bytes. Each is taken or
// refused with a *MessageError; ports, unread data and answers stay bounded.
func FuzzControl(f *testing.F) {
	const ports = 4
	piece := func(s string) []byte {
		b := raw(f, s)
		return append([]byte{byte(len(b))}, b...)
	}
	all := func(s ...string) (b []byte) {
		for _, s := range s {
			b = append(b, piece(s)...)
		}
		return b
	}
	f.Add([]byte{})
	f.Add(all("ffffffff 0000 0100", "00000000 0300 0100", "00000000 0600 0100", "00000000 0600 0000"))
	f.Add(all("ffffffff 0000 0100", "01000000 0300 0000", "00000000 0300 0100", "00000000 0300 0100"))
	f.Add(all("03000000 0100 0100", "03000000 0700 0100 6e616d6500", "03000000 0400 0100", "03000000 0500 0000 19005000", "03000000 0200 0100"))
	f.Add(all("04000000 0100 0100", "00000000 0500 0000 19", "00", ""))
	f.Add(all("00000000 01000000 04000000 0100 0000", "00000000 01000000 04000000 0000 0100", "00000000 00000000 03000000 616263"))
	f.Add(all("00000000 01000000 04000000 0300 0100", "00000000 01000000 04000000 0400 0100", "00000000 01000000 04000000 0500 ffff"))
	f.Add(all("ffffffff 01000000 04000000 0500 ffff", "00000000 ffffffff 00000000 00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, w := range []console.Wire{console.Multiport, console.Original} {
			for _, device := range []bool{true, false} {
				c := console.NewControl(w, device, ports)
				for rest := data; len(rest) > 0; {
					n := min(int(rest[0]), len(rest)-1)
					b := rest[1 : 1+n]
					rest = rest[1+n:]
					err := c.Arrive(bytes.NewReader(b), b)
					var m *console.MessageError
					if err != nil && !errors.As(err, &m) && err != context.Canceled {
						t.Fatalf("%x: %v", b, err)
					}
					for i := 0; c.Answer() != nil; i++ {
						// Console, name, open, size, or their like, for each port.
						if i > 8*ports {
							t.Fatalf("%x: answers without end", b)
						}
					}
				}
				all := c.Ports()
				if len(all) > ports {
					t.Errorf("%d ports", len(all))
				}
				for _, p := range all {
					if p.ID() >= ports || len(p.Name()) > 4088 || p.Unread() > 64<<20 {
						t.Errorf("port %d, %d bytes of name, %d unread", p.ID(), len(p.Name()), p.Unread())
					}
				}
			}
		}
	})
}
