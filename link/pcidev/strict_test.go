package pcidev

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

func TestParseMode(t *testing.T) {
	for name, want := range map[string]Mode{"state": ModeState, "shared": ModeShared, "strict": ModeStrict} {
		if got, err := ParseMode(name); got != want || err != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if _, err := ParseMode("lax"); err == nil {
		t.Error("lax: expected an error")
	}
}

// TestStrictAreas looks at what of BAR2 is mapped into each peer.
func TestStrictAreas(t *testing.T) {
	for _, c := range []struct {
		name string
		link link.Config
		want [][]vfiouser.Area // by peer ID
	}{
		{"all sections", link.Config{Peers: 3, Vectors: 1, ReadWrite: 0x2000, Output: 0x1000}, [][]vfiouser.Area{
			{{Offset: 0x1000, Size: 0x2000}, {Offset: 0x3000, Size: 0x1000}},
			{{Offset: 0x1000, Size: 0x2000}, {Offset: 0x4000, Size: 0x1000}},
			{{Offset: 0x1000, Size: 0x2000}, {Offset: 0x5000, Size: 0x1000}},
		}},
		{"no R/W section", link.Config{Peers: 2, Vectors: 1, Output: 0x3000}, [][]vfiouser.Area{
			{{Offset: 0x1000, Size: 0x3000}}, {{Offset: 0x4000, Size: 0x3000}},
		}},
		{"no output sections", link.Config{Peers: 2, Vectors: 1, ReadWrite: 0x3000}, [][]vfiouser.Area{
			{{Offset: 0x1000, Size: 0x3000}}, {{Offset: 0x1000, Size: 0x3000}},
		}},
		{"only a State Table", link.Config{Peers: 2, Vectors: 1}, [][]vfiouser.Area{nil, nil}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLink(t, c.link)
			for id, want := range c.want {
				f := newFunction(t, l, Options{Mode: ModeStrict})
				got := f.Region(bar2)
				if diff := cmp.Diff(want, got.Areas); len(want)+len(got.Areas) > 0 && diff != "" {
					t.Errorf("peer %d (-want +got):\n%s", id, diff)
				}
				if mapped := got.Flags&vfiouser.RegionMmap != 0; mapped != (len(want) > 0) {
					t.Errorf("peer %d: flags %#x", id, got.Flags)
				}
			}
		})
	}
}

// TestStrictShows looks for what tells a guest of the mode.
func TestStrictShows(t *testing.T) {
	l := newLink(t, smallLink)
	for mode, want := range map[Mode][]byte{
		ModeState:  {0x0a, 0x11, 0x06, 0x41},
		ModeShared: {0x0a, 0x11, 0x06, 0x41},
		ModeStrict: {0x0a, 0x11, 0x07, 0x41},
	} {
		f := newFunction(t, l, Options{Mode: mode})
		if got := f.read(t, config, 0x2c, 4); !bytes.Equal(got, want) {
			t.Errorf("mode %d: subsystem % x, want % x", mode, got, want)
		}
	}
	for _, o := range []Options{
		{Mode: ModeStrict, Subsystem: Subsystem{0x1af4, 0x1100}},
		{Mode: ModeStrict, BaseAddress: 1 << 32},
	} {
		if o.Check(smallLink) == nil {
			t.Errorf("%+v: expected an error", o)
		}
	}
}
