package wire

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// Each message as bytes written out by hand from the specification's tables,
// every field with a value of its own.

func TestHeader(t *testing.T) {
	b := []byte{0x34, 0x12, 0x0a, 0, 0x20, 0, 0, 0, 0x21, 0, 0, 0, 0x16, 0, 0, 0}
	want := Header{ID: 0x1234, Command: RegionWrite, Size: 32, Flags: TypeReply | Error, Errno: 22}
	got, ok := DecodeHeader(b)
	if !ok || got != want {
		t.Errorf("%+v, %v", got, ok)
	}
	out := make([]byte, HeaderSize)
	want.Put(out)
	if !bytes.Equal(out, b) {
		t.Errorf("%x", out)
	}
	if _, ok := DecodeHeader(b[:15]); ok {
		t.Error("15 bytes are a header")
	}
}

func TestCommandNames(t *testing.T) {
	for c, want := range map[Command]string{
		Version: "VERSION", MigDataWrite: "MIG_DATA_WRITE", DeviceReset: "DEVICE_RESET",
		0: "command 0", 14: "command 14", 19: "command 19", 0xffff: "command 65535",
	} {
		if got := c.String(); got != want {
			t.Errorf("%d: %s, want %s", uint16(c), got, want)
		}
	}
}

// layout is one message: its bytes, its value, both directions. Append is nil
// for messages that this package only reads.
type layout struct {
	name   string
	bytes  []byte
	want   any
	decode func([]byte) (any, bool)
	append []byte
}

func TestLayouts(t *testing.T) {
	u64 := func(low byte) []byte { return []byte{low, 0, 0, 0, 0, 0, 0, 0x80} } // low + 2^63
	const high = 1 << 63
	four := []byte{1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0}
	join := func(b ...[]byte) []byte { return bytes.Join(b, nil) }
	for _, l := range []layout{
		{"DEVICE_GET_INFO", four, DeviceInfo{1, 2, 3, 4},
			func(p []byte) (any, bool) { v, ok := DecodeDeviceInfo(p); return v, ok },
			DeviceInfo{1, 2, 3, 4}.Append(nil)},
		{"DEVICE_GET_IRQ_INFO", four, IRQInfo{Argsz: 1, Flags: 2, Index: 3, Count: 4},
			func(p []byte) (any, bool) { v, ok := DecodeIRQInfo(p); return v, ok },
			IRQInfo{1, 2, 3, 4}.Append(nil)},
		{"DEVICE_GET_REGION_IO_FDS", four, RegionIOFDs{Argsz: 1, Flags: 2, Index: 3, Count: 4},
			func(p []byte) (any, bool) { v, ok := DecodeRegionIOFDs(p); return v, ok },
			RegionIOFDs{1, 2, 3, 4}.Append(nil)},
		{"DEVICE_SET_IRQS", join(four, []byte{5, 0, 0, 0}), SetIRQs{Argsz: 1, Flags: 2, Index: 3, Start: 4, Count: 5},
			func(p []byte) (any, bool) { v, ok := DecodeSetIRQs(p); return v, ok },
			SetIRQs{1, 2, 3, 4, 5}.Append(nil)},
		{"DEVICE_GET_REGION_INFO", join(four, u64(5), u64(6)),
			RegionInfo{Argsz: 1, Flags: 2, Index: 3, CapOffset: 4, Size: high + 5, Offset: high + 6},
			func(p []byte) (any, bool) { v, ok := DecodeRegionInfo(p); return v, ok },
			RegionInfo{1, 2, 3, 4, high + 5, high + 6}.Append(nil)},
		{"REGION_READ", join(u64(1), []byte{2, 0, 0, 0, 3, 0, 0, 0}), RegionAccess{Offset: high + 1, Region: 2, Count: 3},
			func(p []byte) (any, bool) { v, ok := DecodeRegionAccess(p); return v, ok },
			RegionAccess{high + 1, 2, 3}.Append(nil)},
		{"DMA_READ", join(u64(1), u64(2)), DMAAccess{Address: high + 1, Count: high + 2},
			func(p []byte) (any, bool) { v, ok := DecodeDMAAccess(p); return v, ok }, nil},
		{"DMA_MAP", join(four[:8], u64(3), u64(4), u64(5)),
			MapDMA{Argsz: 1, Flags: 2, Offset: high + 3, Address: high + 4, Size: high + 5},
			func(p []byte) (any, bool) { v, ok := DecodeMapDMA(p); return v, ok },
			MapDMA{1, 2, high + 3, high + 4, high + 5}.Append(nil)},
		{"DMA_UNMAP", join(four[:8], u64(3), u64(4)), UnmapDMA{Argsz: 1, Flags: 2, Address: high + 3, Size: high + 4},
			func(p []byte) (any, bool) { v, ok := DecodeUnmapDMA(p); return v, ok },
			UnmapDMA{1, 2, high + 3, high + 4}.Append(nil)},
		{"DEVICE_FEATURE", four[:8], Feature{Argsz: 1, Flags: 2},
			func(p []byte) (any, bool) { v, ok := DecodeFeature(p); return v, ok }, nil},
		{"MIG_DATA_READ", four[:8], MigData{Argsz: 1, Size: 2},
			func(p []byte) (any, bool) { v, ok := DecodeMigData(p); return v, ok }, nil},
		{"REGION_WRITE_MULTI", join([]byte{1, 0, 0, 0, 0, 0, 0, 0}, u64(1), []byte{2, 0, 0, 0, 3, 0, 0, 0}, []byte("abcdefgh")),
			WriteMulti{RegionAccess{high + 1, 2, 3}, [8]byte([]byte("abcdefgh"))},
			func(p []byte) (any, bool) { v, ok := DecodeWriteMulti(p, 0); return v, ok }, nil},
	} {
		if got, ok := l.decode(l.bytes); !ok || got != l.want {
			t.Errorf("%s: %+v, %v, want %+v", l.name, got, ok, l.want)
		}
		if l.append != nil && !bytes.Equal(l.append, l.bytes) {
			t.Errorf("%s: %x, want %x", l.name, l.append, l.bytes)
		}
		for n := range l.bytes {
			if _, ok := l.decode(l.bytes[:n:n]); ok {
				t.Errorf("%s: %d of %d bytes are enough", l.name, n, len(l.bytes))
			}
		}
	}
}

func TestWriteMulti(t *testing.T) {
	two := append([]byte{2, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 48)...)
	two[8+24] = 7
	if w, ok := DecodeWriteMulti(two, 1); !ok || w.Offset != 7 {
		t.Errorf("%+v, %v", w, ok)
	}
	if _, ok := DecodeWriteMulti(two, 2); ok {
		t.Error("a third entry")
	}
	// A number whose product with the entry size overflows to the real size.
	for _, n := range []byte{0, 1, 3} {
		two[0] = n
		if _, ok := DecodeWriteMulti(two, 0); ok {
			t.Errorf("%d entries in %d bytes", n, len(two))
		}
	}
	two[0], two[7] = 2, 0x20
	if _, ok := DecodeWriteMulti(two, 0); ok {
		t.Error("2^61 + 2 entries")
	}
}

func TestSparseMmap(t *testing.T) {
	want := []Area{{0x1000, 0x2000}, {0x8000, 0x1000}}
	b := []byte{
		1, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0,
		0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0,
		0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0,
	}
	if got := AppendSparseMmap(nil, want); !bytes.Equal(got, b) || len(got) != SparseMmapSize(2) {
		t.Errorf("%x", got)
	}
	p := append(make([]byte, RegionInfoSize), b...)
	if got, found, ok := DecodeSparseMmap(p, 32); !ok || !found || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v, %v", got, found, ok)
	}
	if _, found, ok := DecodeSparseMmap(p, 0); !ok || found {
		t.Error("no chain at all")
	}
}

func TestIOFDEntry(t *testing.T) {
	e := IOFDEntry{Offset: 1, Size: 2, FDIndex: 3, Type: 4, Flags: 5, DataMatch: 6}
	b := []byte{
		1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0,
		3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0,
		6, 0, 0, 0, 0, 0, 0, 0,
	}
	if got := e.Append(nil); !bytes.Equal(got, b) {
		t.Errorf("%x", got)
	}
	r := RegionIOFDs{Argsz: 56, Count: 1}
	if got, ok := DecodeIOFDEntries(append(r.Append(nil), b...), r); !ok || len(got) != 1 || got[0] != e {
		t.Errorf("%+v, %v", got, ok)
	}
	// libvfio-user's layout has eight bytes more before the value.
	wide := append(append(b[:32:32], 9, 9, 9, 9, 9, 9, 9, 9), b[32:]...)
	r.Argsz = 64
	if got, ok := DecodeIOFDEntries(append(r.Append(nil), wide...), r); !ok || len(got) != 1 || got[0] != e {
		t.Errorf("%+v, %v", got, ok)
	}
}

func TestVersion(t *testing.T) {
	v := VersionInfo{Major: 0, Minor: 1, MaxFDs: 253, MaxTransfer: 1 << 20}
	b := v.Append(nil)
	if string(b) != "\x00\x00\x01\x00"+`{"capabilities":{"max_msg_fds":253,"max_data_xfer_size":1048576}}`+"\x00" {
		t.Errorf("%q", b)
	}
	if got, err := DecodeVersion(b); err != nil || got != v {
		t.Errorf("%+v, %v", got, err)
	}
	widest := VersionInfo{Major: 0xffff, Minor: 0xffff, MaxFDs: 1024, MaxTransfer: 1<<32 - 1}.Append(nil)
	if n := len(widest) - VersionSize; n >= 100 {
		t.Errorf("%d bytes of JSON", n)
	}
	// What is wrong is in the message.
	_, err := DecodeVersion([]byte("\x00\x00\x00\x00" + `{"capabilities":{"max_msg_fds":1025}}` + "\x00"))
	if err == nil || !strings.Contains(err.Error(), "max_msg_fds: 1025 is not in 0 to 1024") {
		t.Error(err)
	}
	// The text is a C string: what follows its end does not count.
	if _, err := DecodeVersion([]byte("\x00\x00\x00\x00{}\x00rubbish\x00")); err != nil {
		t.Error(err)
	}
}
