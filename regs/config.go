package regs

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Offsets in PCI configuration space.
const (
	offStatus       = 0x06
	offClass        = 0x09
	offSubsystem    = 0x2c
	offCapabilities = 0x34
	firstCapability = 0x40

	// ConfigSize is the size of the configuration space in bytes.
	ConfigSize = 256
	// ConfigUnprivileged is how much of it Linux shows a process without
	// CAP_SYS_ADMIN; the capabilities lie behind.
	ConfigUnprivileged = 64

	statusCapabilities = 1 << 4
)

// Capability IDs.
const (
	CapVendor = 0x09
	CapMSIX   = 0x11
)

var (
	// ErrNoCapability says that the capability list is sound and does not
	// contain the capability asked for.
	ErrNoCapability = errors.New("capability not present")
	// ErrConfigShort says that a configuration space ends before the bytes
	// that are needed. Linux shows unprivileged processes 64 bytes.
	ErrConfigShort = errors.New("configuration space is cut short; reading all of it needs root (CAP_SYS_ADMIN)")
)

// ConfigError says what is wrong in a configuration space.
type ConfigError struct {
	Offset   int    // in bytes
	Field    string // of the specification
	Expected string
	Found    string
	Err      error // a class such as ErrConfigShort, or nil
}

func (e *ConfigError) Error() string {
	s := fmt.Sprintf("configuration space, %s at %02Xh: expected %s, found %s", e.Field, e.Offset, e.Expected, e.Found)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *ConfigError) Unwrap() error { return e.Err }

func short(config []byte, offset int, field string) error {
	e := &ConfigError{
		Offset: offset, Field: field,
		Expected: "to find it inside the space",
		Found:    fmt.Sprintf("a space of %d bytes", len(config)),
	}
	// A longer space that still ends too early is broken, not restricted.
	if len(config) <= ConfigUnprivileged {
		e.Err = ErrConfigShort
	}
	return e
}

// gone is not nil if nothing answers at the device's address any more: then
// all of the space reads all ones, and no device has the vendor ID FFFFh.
func gone(config []byte) error {
	if len(config) >= 2 && config[0] == 0xff && config[1] == 0xff {
		return fmt.Errorf("configuration space reads all ones: %w", ErrGone)
	}
	return nil
}

// FindCapability walks the capability list of a configuration space and
// returns the offset of the first capability with the given ID. The walk is
// bounded: a list that loops, or leaves the space, is a *[ConfigError]; a
// sound list without the capability is [ErrNoCapability]; a device that does
// not answer is [ErrGone].
func FindCapability(config []byte, id uint8) (int, error) {
	if err := gone(config); err != nil {
		return 0, err
	}
	if len(config) <= offCapabilities {
		return 0, short(config, offCapabilities, "capability pointer")
	}
	if config[offStatus]&statusCapabilities == 0 {
		return 0, fmt.Errorf("capability %02Xh: %w: the Status register says that there is no capability list", id, ErrNoCapability)
	}
	var seen [ConfigSize / 4]bool
	at := offCapabilities
	for {
		// The low two bits of a pointer are reserved (PCI Local Bus
		// specification).
		next := int(config[at]) &^ 3
		if next == 0 {
			return 0, fmt.Errorf("capability %02Xh: %w", id, ErrNoCapability)
		}
		if next < firstCapability {
			return 0, &ConfigError{Offset: at, Field: "capability pointer", Expected: "00h or at least 40h", Found: fmt.Sprintf("%02Xh", next)}
		}
		if next+2 > len(config) {
			return 0, short(config, next, "capability")
		}
		if seen[next/4] {
			return 0, &ConfigError{Offset: at, Field: "capability pointer", Expected: "an end of the list", Found: fmt.Sprintf("a loop to %02Xh", next)}
		}
		seen[next/4] = true
		if config[next] == id {
			return next, nil
		}
		at = next + 1
	}
}

// MSIX is the MSI-X capability as far as a driver needs it.
type MSIX struct {
	Offset  int // of the capability in configuration space
	Vectors int // table size, 1 to 2048
	Enabled bool
	Masked  bool // function mask
}

// Bits of the MSI-X Message Control word, at offset 2 of the capability.
const (
	MSIXControl      = 2
	MSIXEnable       = 1 << 15
	MSIXFunctionMask = 1 << 14
)

// ParseMSIX finds and reads the MSI-X capability.
func ParseMSIX(config []byte) (MSIX, error) {
	at, err := FindCapability(config, CapMSIX)
	if err != nil {
		return MSIX{}, err
	}
	if at+12 > len(config) {
		return MSIX{}, short(config, at, "MSI-X capability")
	}
	c := binary.LittleEndian.Uint16(config[at+MSIXControl:])
	return MSIX{
		Offset:  at,
		Vectors: int(c&0x7ff) + 1,
		Enabled: c&MSIXEnable != 0,
		Masked:  c&MSIXFunctionMask != 0,
	}, nil
}

// ConfigProtocol takes the protocol type from a configuration space, after a
// check of vendor and device ID.
func ConfigProtocol(config []byte) (Protocol, error) {
	if err := gone(config); err != nil {
		return 0, err
	}
	if len(config) < offClass+3 {
		return 0, short(config, offClass, "class code")
	}
	if id := binary.LittleEndian.Uint32(config); id != DeviceID<<16|VendorID {
		return 0, &ConfigError{Field: "vendor and device ID", Expected: "110A:4106", Found: fmt.Sprintf("%04X:%04X", uint16(id), id>>16)}
	}
	return ProtocolOf(binary.LittleEndian.Uint32(config[offClass-1:]) >> 8)
}

// ConfigStrict reports whether a configuration space is of a peer of a strict
// link: its guests reach the State Table and the output sections of others by
// messages to the service, one for each access. It shows in the Subsystem ID,
// which no driver matches on, and which is in the 64 bytes that a process
// without privileges sees.
func ConfigStrict(config []byte) bool {
	return len(config) >= offSubsystem+4 &&
		binary.LittleEndian.Uint32(config[offSubsystem:]) == SubsystemStrict<<16|VendorID
}
