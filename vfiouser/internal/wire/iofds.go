package wire

// Sizes of DEVICE_GET_REGION_IO_FDS payloads: the fixed part, an entry by the
// specification, and an entry as libvfio-user sends it.
const (
	IOFDsSize       = 16
	IOFDEntrySize   = 40
	IOFDShadowEntry = 48
)

// Constants of [IOFDEntry].
const (
	IOFDTypeEventFD  = 0
	IOFDTypeRegionFD = 1
	IOFDTypeShadow   = 2

	IOFDFlagDataMatch = 1

	// NoIOFD is the index of an entry without descriptor.
	NoIOFD = 0xFFFFFFFF
)

// RegionIOFDs is the fixed part of DEVICE_GET_REGION_IO_FDS, request and reply.
type RegionIOFDs struct {
	Argsz, Flags, Index, Count uint32
}

// DecodeRegionIOFDs reads the fixed part of a payload.
func DecodeRegionIOFDs(p []byte) (r RegionIOFDs, ok bool) {
	a, b, c, d, ok := four(p)
	return RegionIOFDs{a, b, c, d}, ok
}

// Append writes the fixed part.
func (r RegionIOFDs) Append(b []byte) []byte {
	return appendFour(b, r.Argsz, r.Flags, r.Index, r.Count)
}

// IOFDEntry stands for one write that an eventfd replaces.
type IOFDEntry struct {
	Offset    uint64
	Size      uint64
	FDIndex   uint32
	Type      uint32
	Flags     uint32
	DataMatch uint64
}

// Append writes the entry in the specification's 40-byte layout.
func (e IOFDEntry) Append(b []byte) []byte {
	b = le.AppendUint64(b, e.Offset)
	b = le.AppendUint64(b, e.Size)
	b = appendFour(b, e.FDIndex, e.Type, e.Flags, 0)
	return le.AppendUint64(b, e.DataMatch)
}

// DecodeIOFDEntries reads the entries that follow the fixed part r of the
// payload p, in either layout. ok is false when p does not have the size that
// r states, or that size fits neither layout.
func DecodeIOFDEntries(p []byte, r RegionIOFDs) (entries []IOFDEntry, ok bool) {
	if uint64(len(p)) != uint64(r.Argsz) || len(p) < IOFDsSize {
		return nil, false
	}
	p = p[IOFDsSize:]
	if r.Count == 0 {
		return nil, len(p) == 0
	}
	stride := len(p) / IOFDEntrySize // an upper bound of the number, for now
	if uint64(r.Count) > uint64(stride) {
		return nil, false
	}
	n := int(r.Count)
	stride = len(p) / n
	if len(p)%n != 0 || stride != IOFDEntrySize && stride != IOFDShadowEntry {
		return nil, false
	}
	entries = make([]IOFDEntry, n)
	for i := range entries {
		e := p[i*stride : (i+1)*stride]
		entries[i] = IOFDEntry{
			Offset: le.Uint64(e), Size: le.Uint64(e[8:]),
			FDIndex: le.Uint32(e[16:]), Type: le.Uint32(e[20:]), Flags: le.Uint32(e[24:]),
			DataMatch: le.Uint64(e[stride-8:]),
		}
	}
	return entries, true
}

func four(p []byte) (a, b, c, d uint32, ok bool) {
	if len(p) < 16 {
		return 0, 0, 0, 0, false
	}
	return le.Uint32(p), le.Uint32(p[4:]), le.Uint32(p[8:]), le.Uint32(p[12:]), true
}

func appendFour(b []byte, v, w, x, y uint32) []byte {
	b = le.AppendUint32(b, v)
	b = le.AppendUint32(b, w)
	b = le.AppendUint32(b, x)
	return le.AppendUint32(b, y)
}
