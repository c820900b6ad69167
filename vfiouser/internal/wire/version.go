package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
)

// Defaults of capabilities that the peer does not name.
const (
	DefaultMaxFDs = 1
	// limitMaxFDs is the largest max_msg_fds libvfio-user accepts.
	limitMaxFDs = 1024
)

// VersionSize is the fixed part of a VERSION payload.
const VersionSize = 4

// VersionInfo is a VERSION payload, request or reply: the version and what
// the sender can receive.
type VersionInfo struct {
	Major, Minor uint16
	// MaxFDs is max_msg_fds: descriptors per message.
	MaxFDs int
	// MaxTransfer is max_data_xfer_size: bytes per region access.
	MaxTransfer int64
	// TwinSocket says that the sender supports, or chose, a second socket for
	// the server's commands.
	TwinSocket bool
}

// DecodeVersion reads a payload. Unknown names are ignored. The error says
// which part is malformed, by the rules of libvfio-user plus a range for
// max_data_xfer_size.
func DecodeVersion(p []byte) (VersionInfo, error) {
	v := VersionInfo{MaxFDs: DefaultMaxFDs, MaxTransfer: MaxTransfer}
	if len(p) < VersionSize {
		return v, fmt.Errorf("a payload of %d bytes, need at least %d", len(p), VersionSize)
	}
	v.Major, v.Minor = le.Uint16(p), le.Uint16(p[2:])
	text := p[VersionSize:]
	if len(text) == 0 {
		return v, nil
	}
	if text[len(text)-1] != 0 {
		return v, errors.New("JSON text without a terminating NUL")
	}
	text = text[:bytes.IndexByte(text, 0)] // a C string ends here
	top, err := object(text)
	if err != nil {
		return v, fmt.Errorf("version data: %w", err)
	}
	raw, ok := top["capabilities"]
	if !ok {
		return v, nil
	}
	caps, err := object(raw)
	if err != nil {
		return v, fmt.Errorf("capabilities: %w", err)
	}
	if raw, ok := caps["max_msg_fds"]; ok {
		n, err := integer("max_msg_fds", raw, 0, limitMaxFDs)
		if err != nil {
			return v, err
		}
		v.MaxFDs = int(n)
	}
	if raw, ok := caps["max_data_xfer_size"]; ok {
		if v.MaxTransfer, err = integer("max_data_xfer_size", raw, 1, math.MaxUint32); err != nil {
			return v, err
		}
	}
	if raw, ok := caps["migration"]; ok {
		m, err := object(raw)
		if err != nil {
			return v, fmt.Errorf("migration: %w", err)
		}
		if raw, ok := m["pgsize"]; ok {
			if _, err := integer("migration.pgsize", raw, math.MinInt64, math.MaxInt64); err != nil {
				return v, err
			}
		}
	}
	if raw, ok := caps["twin_socket"]; ok {
		m, err := object(raw)
		if err != nil {
			return v, fmt.Errorf("twin_socket: %w", err)
		}
		if raw, ok := m["supported"]; ok {
			v.TwinSocket = string(raw) == "true"
			if !v.TwinSocket && string(raw) != "false" {
				return v, fmt.Errorf("twin_socket.supported: %.40q is not a boolean", raw)
			}
		}
	}
	return v, nil
}

// Append writes a payload that announces max_msg_fds and
// max_data_xfer_size. Its JSON stays below 100 bytes: QEMU cannot take a reply
// that is longer than its request of 214 bytes.
func (v VersionInfo) Append(b []byte) []byte {
	b = le.AppendUint16(b, v.Major)
	b = le.AppendUint16(b, v.Minor)
	b = fmt.Appendf(b, `{"capabilities":{"max_msg_fds":%d,"max_data_xfer_size":%d}}`, v.MaxFDs, v.MaxTransfer)
	return append(b, 0)
}

// object keeps the names as they are written: decoding into a struct would
// accept them in any case.
func object(text []byte) (map[string]json.RawMessage, error) {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("need a JSON object: %w", err)
	}
	if m == nil {
		return nil, errors.New("need a JSON object, found null")
	}
	return m, nil
}

func integer(name string, raw json.RawMessage, least, most int64) (int64, error) {
	n, err := strconv.ParseInt(string(raw), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %.40q is not an integer", name, raw)
	}
	if n < least || n > most {
		return 0, fmt.Errorf("%s: %d is not in %d to %d", name, n, least, most)
	}
	return n, nil
}
