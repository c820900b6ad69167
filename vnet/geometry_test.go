package vnet_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// geometries is the table of the protocol page.
var geometries = []struct {
	output          uint64
	entries         uint32
	header, data    uint64
	mtu, max        int
	avail, usedEvnt uint64
	used, availEvnt uint64
}{
	{0x1000, 32, 0x700, 2304, 144, 576, 0x200, 0x244, 0x280, 0x384},
	{0x2000, 32, 0x700, 6400, 400, 1600, 0x200, 0x244, 0x280, 0x384},
	{0x4000, 64, 0x700, 14592, 912, 3648, 0x400, 0x484, 0x4C0, 0x6C4},
	{0x8000, 128, 0xD80, 29312, 1832, 7328, 0x800, 0x904, 0x940, 0xD44},
	{0x10000, 256, 0x1A80, 58752, 3672, 14688, 0x1000, 0x1204, 0x1240, 0x1A44},
	{0x20000, 512, 0x3480, 117632, 7352, 29408, 0x2000, 0x2404, 0x2440, 0x3444},
	{0x40000, 1024, 0x6880, 235392, 14712, 58848, 0x4000, 0x4804, 0x4840, 0x6844},
	{0x7F000, 2048, 0xD080, 466816, 16384, 65535, 0x8000, 0x9004, 0x9040, 0xD044},
	{0xD0000, 2048, 0xD080, 0xD0000 - 53376, 16384, 65535, 0x8000, 0x9004, 0x9040, 0xD044},
	{0xD1000, 4096, 0x1A080, 0xD1000 - 106624, 16384, 65535, 0x10000, 0x12004, 0x12040, 0x1A044},
	{0x100000, 4096, 0x1A080, 0x100000 - 106624, 16384, 65535, 0x10000, 0x12004, 0x12040, 0x1A044},
	{1 << 40, 4096, 0x1A080, 1<<40 - 106624, 16384, 65535, 0x10000, 0x12004, 0x12040, 0x1A044},
	{1<<63 - 4096, 4096, 0x1A080, 1<<63 - 4096 - 106624, 16384, 65535, 0x10000, 0x12004, 0x12040, 0x1A044},
	// Sizes that no link has: the smallest of all, and those around where the
	// next number of entries begins.
	{1792 + 272, 32, 0x700, 272, 68, 68, 0x200, 0x244, 0x280, 0x384},
	{8*1792 + 7, 32, 0x700, 8*1792 + 7 - 1792, 784, 3137, 0x200, 0x244, 0x280, 0x384},
	{8*1792 + 8, 64, 0x700, 8*1792 + 8 - 1792, 784, 3138, 0x400, 0x484, 0x4C0, 0x6C4},
	{8*3456 + 7, 64, 0x700, 8*3456 + 7 - 1792, 1616, 6465, 0x400, 0x484, 0x4C0, 0x6C4},
	{8*3456 + 8, 128, 0xD80, 8*3456 + 8 - 3456, 1512, 6050, 0x800, 0x904, 0x940, 0xD44},
}

func TestGeometry(t *testing.T) {
	for _, c := range geometries {
		g, err := vnet.NewGeometry(c.output)
		if err != nil {
			t.Errorf("%#x: %v", c.output, err)
			continue
		}
		if g.Output != c.output || g.Entries != c.entries || g.Header != c.header || g.Data() != c.data || g.DefaultMTU() != c.mtu || g.MaxMTU() != c.max {
			t.Errorf("%#x: %+v, data %d, MTU %d, at most %d; want %+v", c.output, g, g.Data(), g.DefaultMTU(), g.MaxMTU(), c)
		}
	}
	for _, output := range []uint64{0, 1, 271, 1791, 1792, 1792 + 271} {
		_, err := vnet.NewGeometry(output)
		var small *vnet.SizeError
		if !errors.As(err, &small) || *small != (vnet.SizeError{Output: output, Header: 1792}) || !errors.Is(err, vnet.ErrUnsuitable) || !strings.Contains(err.Error(), "2064") {
			t.Errorf("%d bytes: %v", output, err)
		}
	}
}

func TestMTU(t *testing.T) {
	for _, c := range []struct {
		output    uint64
		mtu, want int // 0: refused
	}{
		{0x1000, 0, 144}, {0x1000, 68, 68}, {0x1000, 576, 576}, {0x1000, 67, 0}, {0x1000, 577, 0}, {0x1000, -1, 0},
		{0x2000, 1500, 1500}, {0x2000, 1601, 0},
		{0x100000, 0, 16384}, {0x100000, 65535, 65535}, {0x100000, 65536, 0}, {0x100000, 1 << 40, 0},
	} {
		l, err := vnet.Open(newBoard(t, c.output, 2).Device(t, 0, apart), vnet.Config{MTU: c.mtu})
		if c.want == 0 {
			var e *vnet.MTUError
			if !errors.As(err, &e) || e.MTU != c.mtu || e.Max == 0 || e.Data == 0 {
				t.Errorf("MTU %d in %#x: %v", c.mtu, c.output, err)
			}
			continue
		}
		if err != nil || l.MTU() != c.want {
			t.Errorf("MTU %d in %#x: %v, want %d", c.mtu, c.output, err, c.want)
			continue
		}
		l.Close()
	}
}
