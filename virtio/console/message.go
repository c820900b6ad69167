package console

import (
	"bytes"
	"encoding/binary"
	"unicode/utf8"
)

// Wire is how the two sides talk. Nothing in the features tells Multiport from
// Original: both sides have to be configured alike.
type Wire int

const (
	// Multiport is the interface of the virtio specification with control
	// queues, a pair of queues for each port, and ports that come and go.
	// Linux's driver speaks it.
	Multiport Wire = iota
	// Single is one port, a console, without control messages.
	Single
	// Original is the wire of the proposal of October 2009: all ports share one
	// pair of queues. It needs few vectors and little of the R/W section.
	Original
)

func (w Wire) String() string {
	switch w {
	case Multiport:
		return "multiport"
	case Single:
		return "single"
	case Original:
		return "original"
	}
	return "unknown wire"
}

// Features of the device (virtio specification, "Console Device", "Feature
// bits").
const (
	featureSize      = 1 << 0 // cols and rows are valid
	featureMultiport = 1 << 1
	featureEmergency = 1 << 2
)

// Configuration space, little-endian.
const (
	configCols      = 0 // 2 bytes
	configRows      = 2 // 2
	configPorts     = 4 // 4: max_nr_ports; nr_active_ports on the original wire
	configEmergency = 8 // 4
	configSize      = 12
	configOriginal  = 8 // size on the original wire
)

// Events of control messages of the multiport interface (specification,
// "Multiport Device Operation").
const (
	eventDeviceReady = iota
	eventPortAdd
	eventPortRemove
	eventPortReady
	eventConsolePort
	eventResize
	eventPortOpen
	eventPortName
)

// Events of the original wire.
const (
	originalOpen = iota
	originalName
	originalConsole
	originalCache
	originalThrottle
	originalLimit
)

const (
	controlHeader  = 8  // id 4, event 2, value 2
	originalHeader = 12 // id 4, flags 4, size 4
	originalEvent  = 4  // event 2, value 2
	flagControl    = 1  // of the original header

	// bufferSize is that of Linux's buffers, and the least of ours.
	bufferSize = 4096
	// mostSize is that of ours where there is room.
	mostSize = 32 << 10
	maxName  = bufferSize - controlHeader
)

// message is a control message, on either wire.
type message struct {
	id           uint32
	event, value uint16
	payload      []byte
}

// bytes is the message on the multiport wire.
func (m message) bytes() []byte {
	b := binary.LittleEndian.AppendUint32(make([]byte, 0, controlHeader+len(m.payload)), m.id)
	b = binary.LittleEndian.AppendUint16(b, m.event)
	b = binary.LittleEndian.AppendUint16(b, m.value)
	return append(b, m.payload...)
}

func parseMessage(b []byte) (message, error) {
	if len(b) < controlHeader {
		return message{}, &MessageError{"length", uint64(len(b)), "at least 8 bytes"}
	}
	le := binary.LittleEndian
	return message{le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[controlHeader:]}, nil
}

// original is the message on the original wire.
func (m message) original() []byte {
	b := appendOriginal(nil, m.id, flagControl, originalEvent+len(m.payload))
	b = binary.LittleEndian.AppendUint16(b, m.event)
	b = binary.LittleEndian.AppendUint16(b, m.value)
	return append(b, m.payload...)
}

// appendOriginal appends the header of a buffer that is a request by itself.
func appendOriginal(b []byte, id, flags uint32, size int) []byte {
	b = binary.LittleEndian.AppendUint32(b, id)
	b = binary.LittleEndian.AppendUint32(b, flags)
	return binary.LittleEndian.AppendUint32(b, uint32(size))
}

// text is the name in a message, with or without a 0 at its end.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b[:min(len(b), maxName)])
}

// usable reports whether a name can be told on all wires.
func usable(name string) bool {
	return len(name) <= 255 && utf8.ValidString(name) && bytes.IndexByte([]byte(name), 0) < 0
}

// bytes is the payload of RESIZE. Linux reads rows first, against the
// specification, in all but two releases.
func (s Size) bytes(colsFirst bool) []byte {
	a, b := s.Rows, s.Cols
	if colsFirst {
		a, b = b, a
	}
	return binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, a), b)
}

func parseSize(b []byte, colsFirst bool) Size {
	s := Size{Rows: binary.LittleEndian.Uint16(b), Cols: binary.LittleEndian.Uint16(b[2:])}
	if colsFirst {
		s.Rows, s.Cols = s.Cols, s.Rows
	}
	return s
}
