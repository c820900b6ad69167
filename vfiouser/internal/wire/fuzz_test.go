package wire

import (
	"bytes"
	"testing"
)

// FuzzDecode feeds every decoder with the same bytes. What one accepts must
// come out of its encoder unchanged, and must lie inside the bytes.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{})
	f.Add(Header{ID: 1, Command: RegionRead, Size: 32}.append(nil))
	f.Add(AppendSparseMmap(RegionInfo{Argsz: 80, Flags: 15, CapOffset: 32, Size: 1 << 20}.Append(nil), []Area{{0, 4096}, {8192, 4096}}))
	f.Add(IOFDEntry{Offset: 12, Size: 4, Flags: 1, DataMatch: 5}.Append(RegionIOFDs{Argsz: 56, Count: 1}.Append(nil)))
	f.Add(VersionInfo{MaxFDs: 16, MaxTransfer: 1 << 20}.Append(nil))
	f.Add(SetIRQs{Argsz: 20, Flags: 36, Index: 2, Count: 1}.Append(nil))
	f.Fuzz(func(t *testing.T, p []byte) {
		p = p[:len(p):len(p)] // a step beyond the end is a fault, not luck
		same := func(name string, ok bool, size int, again []byte) {
			if ok != (len(p) >= size) || ok && !bytes.Equal(again, p[:size]) {
				t.Errorf("%s: %v, %x became %x", name, ok, p, again)
			}
		}
		h, ok := DecodeHeader(p)
		same("header", ok, HeaderSize, h.append(nil))
		_ = h.Command.String()
		d, ok := DecodeDeviceInfo(p)
		same("device info", ok, InfoSize, d.Append(nil))
		i, ok := DecodeIRQInfo(p)
		same("irq info", ok, InfoSize, i.Append(nil))
		s, ok := DecodeSetIRQs(p)
		same("set irqs", ok, SetIRQsSize, s.Append(nil))
		a, ok := DecodeRegionAccess(p)
		same("region access", ok, AccessSize, a.Append(nil))
		m, ok := DecodeMapDMA(p)
		same("dma map", ok, DMAMapSize, m.Append(nil))
		u, ok := DecodeUnmapDMA(p)
		same("dma unmap", ok, DMAUnmapSize, u.Append(nil))
		DecodeDMAAccess(p)
		DecodeFeature(p)
		DecodeMigData(p)
		r, ok := DecodeRegionInfo(p)
		same("region info", ok, RegionInfoSize, r.Append(nil))
		if areas, found, ok := DecodeSparseMmap(p, r.CapOffset); ok && found && 16*len(areas) > len(p) {
			t.Errorf("%d areas in %d bytes", len(areas), len(p))
		}
		x, ok := DecodeRegionIOFDs(p)
		same("io fds", ok, IOFDsSize, x.Append(nil))
		if list, ok := DecodeIOFDEntries(p, x); ok && uint64(len(list)) != uint64(x.Count) {
			t.Errorf("%d entries, not %d", len(list), x.Count)
		}
		for n := range uint64(3) {
			DecodeWriteMulti(p, n)
		}
		if v, err := DecodeVersion(p); err == nil {
			if v.MaxFDs < 0 || v.MaxFDs > limitMaxFDs || v.MaxTransfer < 1 || v.MaxTransfer > 1<<32-1 {
				t.Errorf("%+v", v)
			}
			if again, err := DecodeVersion(v.Append(nil)); err != nil || again.MaxFDs != v.MaxFDs || again.MaxTransfer != v.MaxTransfer {
				t.Errorf("%+v became %+v, %v", v, again, err)
			}
		}
	})
}

func (h Header) append(b []byte) []byte {
	var out [HeaderSize]byte
	h.Put(out[:])
	return append(b, out[:]...)
}
