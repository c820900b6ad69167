package pcidev

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// Offsets of registers in BAR0 and numbers of regions, from the
// specifications and not from our own packages.
const (
	regID, regMaxPeers, regControl, regDoorbell, regState = 0x00, 0x04, 0x08, 0x0c, 0x10

	bar0, bar1, bar2, config = 0, 1, 2, 7
)

func newLink(t *testing.T, c link.Config) *link.Link {
	t.Helper()
	l, err := link.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func newFunction(t *testing.T, l *link.Link, o Options) *Function {
	t.Helper()
	f, err := New(l, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

func (f *Function) read(t *testing.T, region uint32, offset uint64, n int) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xaa}, n)
	if err := f.ReadRegion(region, offset, p); err != nil {
		t.Fatal(err)
	}
	return p
}

func (f *Function) write(t *testing.T, region uint32, offset uint64, p ...byte) {
	t.Helper()
	if err := f.WriteRegion(region, offset, p); err != nil {
		t.Fatal(err)
	}
}

func (f *Function) get(t *testing.T, offset uint64) uint32 {
	t.Helper()
	return binary.LittleEndian.Uint32(f.read(t, bar0, offset, 4))
}

func (f *Function) set(t *testing.T, offset uint64, v uint32) {
	t.Helper()
	f.write(t, bar0, offset, binary.LittleEndian.AppendUint32(nil, v)...)
}

var smallLink = link.Config{Peers: 3, Vectors: 5, Protocol: 0x4321, ReadWrite: 0x2000, Output: 0x1000}

// TestConfigSpace compares the whole configuration space with one that was
// written down by hand from the specification.
func TestConfigSpace(t *testing.T) {
	want := parseHex(t, `
00: 0a 11 06 41 00 00 10 00 00 21 43 ff 00 00 00 00
10: 00 00 00 00 00 00 00 00 0c 00 00 00 00 00 00 00
20: 00 00 00 00 00 00 00 00 00 00 00 00 0a 11 06 41
30: 00 00 00 00 40 00 00 00 00 00 00 00 00 00 00 00
40: 09 60 18 00 00 10 00 00 00 20 00 00 00 00 00 00
50: 00 10 00 00 00 00 00 00 00 00 00 00 00 00 00 00
60: 11 00 04 00 01 00 00 00 01 01 00 00 00 00 00 00
`)
	f := newFunction(t, newLink(t, smallLink), Options{})
	if diff := cmp.Diff(hex.Dump(want), hex.Dump(f.read(t, config, 0, 256))); diff != "" {
		t.Errorf("configuration space (-want +got):\n%s", diff)
	}
	f = newFunction(t, newLink(t, smallLink), Options{Subsystem: Subsystem{0x1af4, 0x1100}})
	if got := f.read(t, config, 0x2c, 4); !bytes.Equal(got, []byte{0xf4, 0x1a, 0x00, 0x11}) {
		t.Errorf("subsystem: got % x", got)
	}
}

func parseHex(t *testing.T, s string) []byte {
	t.Helper()
	b := make([]byte, 256)
	for line := range strings.Lines(strings.TrimSpace(s)) {
		at, rest, _ := strings.Cut(line, ":")
		offset, err := hex.DecodeString(at)
		if err != nil {
			t.Fatal(err)
		}
		row, err := hex.DecodeString(strings.Join(strings.Fields(rest), ""))
		if err != nil {
			t.Fatal(err)
		}
		copy(b[offset[0]:], row)
	}
	return b
}

// TestConfigWritable writes ones to every bit, and zeros again.
func TestConfigWritable(t *testing.T) {
	f := newFunction(t, newLink(t, smallLink), Options{})
	before := f.read(t, config, 0, 256)
	want := map[int]byte{
		0x04: 0x06, 0x05: 0x04, // memory space, bus master, INTx disable
		0x11: 0xf0, 0x12: 0xff, 0x13: 0xff, // BAR0: 4 KiB
		0x15: 0xf0, 0x16: 0xff, 0x17: 0xff, // BAR1: 4 KiB
		0x19: 0x80, 0x1a: 0xff, 0x1b: 0xff, // BAR2: 32 KiB, 64 bits
		0x1c: 0xff, 0x1d: 0xff, 0x1e: 0xff, 0x1f: 0xff,
		0x43: 0x01, // one-shot
		0x63: 0xc0, // MSI-X enable, function mask
	}
	f.write(t, config, 0, bytes.Repeat([]byte{0xff}, 256)...)
	after := f.read(t, config, 0, 256)
	for i := range after {
		if got := after[i] &^ before[i]; got != want[i] {
			t.Errorf("byte %02x: bits %02x can be set, want %02x", i, got, want[i])
		}
		if lost := before[i] &^ after[i]; lost != 0 {
			t.Errorf("byte %02x: bits %02x were cleared by writing ones", i, lost)
		}
	}
	f.write(t, config, 0, make([]byte, 256)...)
	if diff := cmp.Diff(hex.Dump(before), hex.Dump(f.read(t, config, 0, 256))); diff != "" {
		t.Errorf("after writing zeros (-want +got):\n%s", diff)
	}
}

func TestVirtioProtocolByPeer(t *testing.T) {
	c := smallLink
	c.Protocol = 0x8003
	l := newLink(t, c)
	for id, want := range []byte{0xc0, 0x80, 0x80} {
		f := newFunction(t, l, Options{})
		if got := f.read(t, config, 9, 3); !bytes.Equal(got, []byte{0x03, want, 0xff}) {
			t.Errorf("peer %d: class % x, want 03 %02x ff", id, got, want)
		}
	}
}

func TestRegisters(t *testing.T) {
	l := newLink(t, smallLink)
	newFunction(t, l, Options{})
	f := newFunction(t, l, Options{})
	for offset, want := range map[uint64]uint32{regID: 1, regMaxPeers: 3, regControl: 0, regDoorbell: 0, regState: 0, 0x14: 0, 0xffc: 0} {
		if got := f.get(t, offset); got != want {
			t.Errorf("register %#x: got %d, want %d", offset, got, want)
		}
	}
	f.set(t, regState, 0x01020304)
	// Everything but aligned 32-bit accesses reads 0 and is ignored.
	for _, c := range []struct {
		offset uint64
		n      int
	}{{regState, 1}, {regState, 2}, {regState, 8}, {regState + 1, 4}, {regState + 2, 2}, {regID, 8}, {0x110, 4}, {regState, 3}} {
		if got := f.read(t, bar0, c.offset, c.n); !bytes.Equal(got, make([]byte, c.n)) {
			t.Errorf("read of %d bytes at %#x: got % x, want zeros", c.n, c.offset, got)
		}
		f.write(t, bar0, c.offset, bytes.Repeat([]byte{0x55}, c.n)...)
		if got := f.get(t, regState); got != 0x01020304 {
			t.Fatalf("write of %d bytes at %#x changed State to %#x", c.n, c.offset, got)
		}
	}
}

func TestRegions(t *testing.T) {
	l := newLink(t, smallLink) // 0x1000 + 0x2000 + 3 * 0x1000 = 0x6000 bytes
	f := newFunction(t, l, Options{})
	want := [9]vfiouser.Region{
		bar0:   {Flags: 3, Size: 0x1000},
		bar1:   {Flags: 3, Size: 0x1000},
		bar2:   {Flags: 7, Size: 0x8000, Areas: []vfiouser.Area{{Offset: 0x1000, Size: 0x5000}}, FD: l.FD()},
		config: {Flags: 3, Size: 256, FD: -1},
	}
	for i := range want {
		if diff := cmp.Diff(want[i], f.Region(uint32(i))); diff != "" {
			t.Errorf("region %d (-want +got):\n%s", i, diff)
		}
	}
	f = newFunction(t, l, Options{Mode: ModeShared})
	if diff := cmp.Diff([]vfiouser.Area{{Offset: 0, Size: 0x6000}}, f.Region(bar2).Areas); diff != "" {
		t.Errorf("areas in shared mode (-want +got):\n%s", diff)
	}
	// The MSI-X structures fit into BAR1 at every number of vectors.
	for _, v := range []uint16{1, 16, 17, 64, 65, 128, 1024, 2048} {
		table, pba := msixTable(v)
		size := bar1Size(v)
		if table != 0 || pba < 16*uint32(v) || uint64(pba)+(uint64(v)+63)/64*8 > size || size&(size-1) != 0 || pba%8 != 0 {
			t.Errorf("%d vectors: table %#x, pending bits %#x, BAR1 %#x", v, table, pba, size)
		}
	}
	// A link that is only a State Table has nothing to map.
	f = newFunction(t, newLink(t, link.Config{Peers: 2, Vectors: 1}), Options{})
	if got := f.Region(bar2); got.Flags != 3 || got.Size != 0x1000 {
		t.Errorf("only a State Table: %+v", got)
	}
}

// TestTrappedMemory reads and writes shared memory by messages.
func TestTrappedMemory(t *testing.T) {
	l := newLink(t, smallLink)
	f := newFunction(t, l, Options{})
	g := newFunction(t, l, Options{})
	f.set(t, regState, 0xa1b2c3d4)
	g.set(t, regState, 0x11121314)

	// The State Table comes from the states, whatever was scribbled there.
	m, err := l.Memory().ReadWrite("all", 0, 0x6000)
	if err != nil {
		t.Fatal(err)
	}
	m.Store64(0, 0xffffffffffffffff)
	if got, want := f.read(t, bar2, 0, 14), []byte{0xd4, 0xc3, 0xb2, 0xa1, 0x14, 0x13, 0x12, 0x11, 0, 0, 0, 0, 0, 0}; !bytes.Equal(got, want) {
		t.Errorf("State Table: got % x, want % x", got, want)
	}
	if got := f.read(t, bar2, 3, 3); !bytes.Equal(got, []byte{0xa1, 0x14, 0x13}) {
		t.Errorf("three bytes across entries: got % x", got)
	}
	f.write(t, bar2, 0, 9, 9, 9, 9)
	if got := f.read(t, bar2, 0, 4); !bytes.Equal(got, []byte{0xd4, 0xc3, 0xb2, 0xa1}) {
		t.Errorf("State Table after a write: got % x", got)
	}

	for _, c := range []struct {
		name    string
		offset  uint64
		p       []byte
		written []byte // what is there afterwards
	}{
		{"R/W section", 0x1000, []byte{1, 2, 3, 4}, []byte{1, 2, 3, 4}},
		{"64 bits", 0x1008, []byte{1, 2, 3, 4, 5, 6, 7, 8}, []byte{1, 2, 3, 4, 5, 6, 7, 8}},
		{"16 bits", 0x1012, []byte{1, 2}, []byte{1, 2}},
		{"unaligned", 0x1021, []byte{1, 2, 3, 4, 5}, []byte{1, 2, 3, 4, 5}},
		{"own output section", 0x3000, []byte{5, 6, 7, 8}, []byte{5, 6, 7, 8}},
		{"end of own output section", 0x3ffe, []byte{5, 6, 7, 8}, []byte{5, 6, 0, 0}},
		{"foreign output section", 0x4000, []byte{1, 2, 3, 4}, []byte{0, 0, 0, 0}},
		{"from the State Table into the R/W section", 0x0ffe, []byte{9, 9, 8, 7}, []byte{0, 0, 8, 7}},
		{"behind the sections", 0x6000, []byte{1, 2, 3, 4}, []byte{0, 0, 0, 0}},
		{"across the end", 0x5ffe, []byte{1, 2, 3, 4}, []byte{0, 0, 0, 0}},
	} {
		f.write(t, bar2, c.offset, c.p...)
		if got := f.read(t, bar2, c.offset, len(c.p)); !bytes.Equal(got, c.written) {
			t.Errorf("%s: got % x, want % x", c.name, got, c.written)
		}
	}
	if got := g.read(t, bar2, 0x3000, 4); !bytes.Equal(got, []byte{5, 6, 7, 8}) {
		t.Errorf("the other peer sees % x in the first one's output section", got)
	}
}

func TestReset(t *testing.T) {
	f := newFunction(t, newLink(t, smallLink), Options{})
	before := f.read(t, config, 0, 256)
	f.write(t, config, 0, bytes.Repeat([]byte{0xff}, 256)...)
	f.set(t, regControl, 1)
	f.set(t, regState, 5)
	f.Reset()
	if diff := cmp.Diff(hex.Dump(before), hex.Dump(f.read(t, config, 0, 256))); diff != "" {
		t.Errorf("configuration space (-want +got):\n%s", diff)
	}
	if c, s := f.get(t, regControl), f.get(t, regState); c != 0 || s != 0 {
		t.Errorf("Interrupt Control %d, State %d, want 0 and 0", c, s)
	}
}

func TestPBAReadsZero(t *testing.T) {
	f := newFunction(t, newLink(t, smallLink), Options{})
	f.write(t, bar1, 0, bytes.Repeat([]byte{0xff}, 0x200)...)
	if got := f.read(t, bar1, 0x100, 8); !bytes.Equal(got, make([]byte, 8)) {
		t.Errorf("pending bits: got % x", got)
	}
}
