package wire

// RegionInfoSize is the fixed part of a DEVICE_GET_REGION_INFO payload.
const RegionInfoSize = 32

// Region flags.
const (
	RegionFlagRead  = 1
	RegionFlagWrite = 2
	RegionFlagMmap  = 4
	RegionFlagCaps  = 8
)

// RegionInfo is the fixed part of DEVICE_GET_REGION_INFO, request and reply.
type RegionInfo struct {
	Argsz     uint32
	Flags     uint32
	Index     uint32
	CapOffset uint32 // from the start of the payload; 0 = none
	Size      uint64
	Offset    uint64 // of the region in the descriptor's file
}

// DecodeRegionInfo reads the fixed part of a payload.
func DecodeRegionInfo(p []byte) (r RegionInfo, ok bool) {
	if len(p) < RegionInfoSize {
		return r, false
	}
	return RegionInfo{
		Argsz: le.Uint32(p), Flags: le.Uint32(p[4:]), Index: le.Uint32(p[8:]),
		CapOffset: le.Uint32(p[12:]), Size: le.Uint64(p[16:]), Offset: le.Uint64(p[24:]),
	}, true
}

// Append writes the fixed part.
func (r RegionInfo) Append(b []byte) []byte {
	b = le.AppendUint32(b, r.Argsz)
	b = le.AppendUint32(b, r.Flags)
	b = le.AppendUint32(b, r.Index)
	b = le.AppendUint32(b, r.CapOffset)
	b = le.AppendUint64(b, r.Size)
	return le.AppendUint64(b, r.Offset)
}

// CapSparseMmap is the capability that lists the mappable areas of a region.
const CapSparseMmap = 1

// Area is one mappable part of a region, in bytes from the region's start.
type Area struct{ Offset, Size uint64 }

// SparseMmapSize is the size of a sparse mmap capability with n areas.
func SparseMmapSize(n int) int { return 16 + 16*n }

// AppendSparseMmap writes a sparse mmap capability, version 1, as the last of
// its chain.
func AppendSparseMmap(b []byte, areas []Area) []byte {
	b = le.AppendUint16(b, CapSparseMmap)
	b = le.AppendUint16(b, 1)
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, uint32(len(areas)))
	b = le.AppendUint32(b, 0)
	for _, a := range areas {
		b = le.AppendUint64(b, a.Offset)
		b = le.AppendUint64(b, a.Size)
	}
	return b
}

// DecodeSparseMmap walks the capability chain that starts at capOffset of the
// reply payload p and returns the areas of its sparse mmap capability; found
// is false when the chain has none. ok is false when the chain leaves the
// payload, touches the fixed part, goes backwards (so it cannot loop), or the
// capability is of another version than 1 or appears twice.
func DecodeSparseMmap(p []byte, capOffset uint32) (areas []Area, found, ok bool) {
	size := uint64(len(p))
	least := uint64(RegionInfoSize)
	for at := uint64(capOffset); at != 0; {
		if at < least || at+8 > size {
			return nil, false, false
		}
		id, version, next := le.Uint16(p[at:]), le.Uint16(p[at+2:]), le.Uint32(p[at+4:])
		if id == CapSparseMmap {
			if found || version != 1 || at+16 > size {
				return nil, false, false
			}
			n := uint64(le.Uint32(p[at+8:]))
			if at+16+16*n > size { // n < 2^32: no overflow
				return nil, false, false
			}
			areas = make([]Area, n)
			for i := range areas {
				a := p[at+16+16*uint64(i):]
				areas[i] = Area{Offset: le.Uint64(a), Size: le.Uint64(a[8:])}
			}
			found = true
		}
		least = at + 8
		at = uint64(next)
	}
	return areas, found, true
}

// AccessSize is the fixed part of a REGION_READ, REGION_WRITE, DMA_READ or
// DMA_WRITE payload.
const AccessSize = 16

// RegionAccess is the fixed part of REGION_READ and REGION_WRITE, request and
// reply. Count bytes of data follow in a READ reply and in a WRITE request.
type RegionAccess struct {
	Offset uint64
	Region uint32
	Count  uint32
}

// DecodeRegionAccess reads the fixed part of a payload.
func DecodeRegionAccess(p []byte) (a RegionAccess, ok bool) {
	if len(p) < AccessSize {
		return a, false
	}
	return RegionAccess{Offset: le.Uint64(p), Region: le.Uint32(p[8:]), Count: le.Uint32(p[12:])}, true
}

// Append writes the fixed part.
func (a RegionAccess) Append(b []byte) []byte {
	b = le.AppendUint64(b, a.Offset)
	b = le.AppendUint32(b, a.Region)
	return le.AppendUint32(b, a.Count)
}

// WriteMultiEntrySize is the size of one entry of REGION_WRITE_MULTI.
const WriteMultiEntrySize = 24

// WriteMulti is one entry of REGION_WRITE_MULTI: a write of up to 8 bytes.
type WriteMulti struct {
	RegionAccess
	Data [8]byte
}

// DecodeWriteMulti reads entry i of a REGION_WRITE_MULTI request; ok is false
// when there is no such entry, or the payload's size does not agree with the
// number of entries it states.
func DecodeWriteMulti(p []byte, i uint64) (w WriteMulti, ok bool) {
	if len(p) < 8 || (len(p)-8)%WriteMultiEntrySize != 0 {
		return w, false
	}
	n := uint64(len(p)-8) / WriteMultiEntrySize
	if le.Uint64(p) != n || i >= n {
		return w, false
	}
	p = p[8+i*WriteMultiEntrySize:]
	w.RegionAccess, _ = DecodeRegionAccess(p)
	copy(w.Data[:], p[AccessSize:])
	return w, true
}
