package wire

// InfoSize is the payload of DEVICE_GET_INFO and DEVICE_GET_IRQ_INFO.
const InfoSize = 16

// Device flags.
const (
	DeviceFlagReset = 1
	DeviceFlagPCI   = 2
)

// DeviceInfo is DEVICE_GET_INFO, request and reply.
type DeviceInfo struct {
	Argsz, Flags, NumRegions, NumIRQs uint32
}

// DecodeDeviceInfo reads a payload.
func DecodeDeviceInfo(p []byte) (d DeviceInfo, ok bool) {
	a, b, c, e, ok := four(p)
	return DeviceInfo{a, b, c, e}, ok
}

// Append writes the payload.
func (d DeviceInfo) Append(b []byte) []byte {
	return appendFour(b, d.Argsz, d.Flags, d.NumRegions, d.NumIRQs)
}

// IRQInfo is DEVICE_GET_IRQ_INFO, request and reply.
type IRQInfo struct {
	Argsz, Flags, Index, Count uint32
}

// DecodeIRQInfo reads a payload.
func DecodeIRQInfo(p []byte) (i IRQInfo, ok bool) {
	a, b, c, d, ok := four(p)
	return IRQInfo{a, b, c, d}, ok
}

// Append writes the payload.
func (i IRQInfo) Append(b []byte) []byte {
	return appendFour(b, i.Argsz, i.Flags, i.Index, i.Count)
}

// SetIRQsSize is the fixed part of DEVICE_SET_IRQS.
const SetIRQsSize = 20

// Flags of DEVICE_SET_IRQS: one data type, one action.
const (
	IRQDataNone      = 1
	IRQDataBool      = 2
	IRQDataEventFD   = 4
	IRQActionMask    = 8
	IRQActionUnmask  = 16
	IRQActionTrigger = 32
)

// SetIRQs is the fixed part of a DEVICE_SET_IRQS request; with IRQDataBool,
// Count bytes follow.
type SetIRQs struct {
	Argsz, Flags, Index, Start, Count uint32
}

// DecodeSetIRQs reads the fixed part of a payload.
func DecodeSetIRQs(p []byte) (s SetIRQs, ok bool) {
	if len(p) < SetIRQsSize {
		return s, false
	}
	a, b, c, d, _ := four(p)
	return SetIRQs{a, b, c, d, le.Uint32(p[16:])}, true
}

// Append writes the fixed part.
func (s SetIRQs) Append(b []byte) []byte {
	return le.AppendUint32(appendFour(b, s.Argsz, s.Flags, s.Index, s.Start), s.Count)
}

// FeatureSize is the fixed part of DEVICE_FEATURE.
const FeatureSize = 8

// Feature is the fixed part of DEVICE_FEATURE, request and reply: bits 0 to 15
// of Flags name the feature, 16 is get, 17 set, 18 probe.
type Feature struct{ Argsz, Flags uint32 }

// DecodeFeature reads the fixed part of a payload.
func DecodeFeature(p []byte) (f Feature, ok bool) {
	if len(p) < FeatureSize {
		return f, false
	}
	return Feature{le.Uint32(p), le.Uint32(p[4:])}, true
}

// MigDataSize is the fixed part of MIG_DATA_READ and MIG_DATA_WRITE.
const MigDataSize = 8

// MigData is the fixed part of MIG_DATA_READ (request and reply) and
// MIG_DATA_WRITE.
type MigData struct{ Argsz, Size uint32 }

// DecodeMigData reads the fixed part of a payload.
func DecodeMigData(p []byte) (m MigData, ok bool) {
	if len(p) < MigDataSize {
		return m, false
	}
	return MigData{le.Uint32(p), le.Uint32(p[4:])}, true
}
