package wire

// Sizes of the DMA messages' payloads.
const (
	DMAMapSize   = 32
	DMAUnmapSize = 24
)

// Flags of DMA_MAP and DMA_UNMAP. The upper two of DMA_MAP are libvfio-user's.
const (
	DMAFlagRead   = 1
	DMAFlagWrite  = 2
	DMAFlagMmap   = 4
	DMAFlagFileIO = 8

	DMAUnmapFlagBitmap = 1
	DMAUnmapFlagAll    = 2
)

// MapDMA is a DMA_MAP request.
type MapDMA struct {
	Argsz, Flags          uint32
	Offset, Address, Size uint64
}

// DecodeMapDMA reads a payload.
func DecodeMapDMA(p []byte) (m MapDMA, ok bool) {
	if len(p) < DMAMapSize {
		return m, false
	}
	return MapDMA{
		Argsz: le.Uint32(p), Flags: le.Uint32(p[4:]),
		Offset: le.Uint64(p[8:]), Address: le.Uint64(p[16:]), Size: le.Uint64(p[24:]),
	}, true
}

// Append writes the payload.
func (m MapDMA) Append(b []byte) []byte {
	b = le.AppendUint32(b, m.Argsz)
	b = le.AppendUint32(b, m.Flags)
	b = le.AppendUint64(b, m.Offset)
	b = le.AppendUint64(b, m.Address)
	return le.AppendUint64(b, m.Size)
}

// UnmapDMA is the fixed part of DMA_UNMAP, request and reply.
type UnmapDMA struct {
	Argsz, Flags  uint32
	Address, Size uint64
}

// DecodeUnmapDMA reads the fixed part of a payload.
func DecodeUnmapDMA(p []byte) (u UnmapDMA, ok bool) {
	if len(p) < DMAUnmapSize {
		return u, false
	}
	return UnmapDMA{
		Argsz: le.Uint32(p), Flags: le.Uint32(p[4:]),
		Address: le.Uint64(p[8:]), Size: le.Uint64(p[16:]),
	}, true
}

// Append writes the fixed part.
func (u UnmapDMA) Append(b []byte) []byte {
	b = le.AppendUint32(b, u.Argsz)
	b = le.AppendUint32(b, u.Flags)
	b = le.AppendUint64(b, u.Address)
	return le.AppendUint64(b, u.Size)
}

// DMAAccess is the fixed part of DMA_READ and DMA_WRITE, request and reply.
type DMAAccess struct{ Address, Count uint64 }

// DecodeDMAAccess reads the fixed part of a payload.
func DecodeDMAAccess(p []byte) (a DMAAccess, ok bool) {
	if len(p) < AccessSize {
		return a, false
	}
	return DMAAccess{le.Uint64(p), le.Uint64(p[8:])}, true
}
