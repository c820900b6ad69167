package peer_test

import (
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
)

// TestStrict looks at a strict link from a host process: it is told of the
// mode, and has all sections all the same.
func TestStrict(t *testing.T) {
	for name, c := range map[string]link.Config{
		"all sections":       {Peers: 3, Vectors: 1, ReadWrite: 8192, Output: 4096},
		"no R/W section":     {Peers: 3, Vectors: 1, Output: 4096},
		"no output sections": {Peers: 3, Vectors: 1, ReadWrite: 4096},
		"only a State Table": {Peers: 3, Vectors: 1},
	} {
		t.Run(name, func(t *testing.T) {
			path, stop := ivshmemtest.ServeUntil(t, c, pcidev.Options{Mode: pcidev.ModeStrict})
			t.Cleanup(stop)
			var d [3]*ivshmem.Device
			for i := range d {
				var err error
				if d[i], err = ivshmem.Open(path); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { d[i].Close() })
				if !d[i].InputsTrap() {
					t.Error("the device does not tell that the link is strict")
				}
			}
			if err := d[1].SetState(7); err != nil {
				t.Fatal(err)
			}
			if s, err := d[2].State(1); s != 7 || err != nil {
				t.Errorf("state %d, %v", s, err)
			}
			if c.ReadWrite > 0 {
				if err := d[1].Sections().ReadWrite.Store32(c.ReadWrite-4, 0x1234); err != nil {
					t.Fatal(err)
				}
				if v, err := d[2].Sections().ReadWrite.Load32(c.ReadWrite - 4); v != 0x1234 || err != nil {
					t.Errorf("R/W section: %#x, %v", v, err)
				}
			}
			if c.Output == 0 {
				return
			}
			for i, from := range d {
				if err := from.Sections().Output.Store32(c.Output-4, uint32(i)+1); err != nil {
					t.Fatal(err)
				}
				for _, to := range d {
					in, err := to.Sections().Input(from.ID())
					if err != nil {
						t.Fatal(err)
					}
					if v, err := in.Load32(c.Output - 4); v != uint32(i)+1 || err != nil {
						t.Errorf("output section %d as peer %d sees it: %#x, %v", i, to.ID(), v, err)
					}
				}
			}
		})
	}
	path := ivshmemtest.Serve(t, pair)
	d, err := ivshmem.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if d.InputsTrap() {
		t.Error("a link that is not strict says that it is")
	}
}
