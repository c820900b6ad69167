package regs

import (
	"fmt"
	"strconv"
)

// Protocol is the protocol type that a link is configured with: the lower 16
// bits of the PCI class code.
type Protocol uint16

// Protocol types (specification, "Protocols").
const (
	ProtocolUndefined Protocol = 0x0000
	ProtocolEthernet  Protocol = 0x0001 // virtual peer-to-peer Ethernet
	ProtocolUserFirst Protocol = 0x4000 // 4000h to 7FFFh: user-defined
	ProtocolUserLast  Protocol = 0x7fff
	// ProtocolVirtio is the first of the virtio protocols, 8000h to FFFFh:
	// the virtio device ID in bits 13 to 0.
	ProtocolVirtio Protocol = 0x8000
	// VirtioBackEnd, bit 14, tells the two ends of a virtio link apart: 0 is
	// the front-end (driver), 1 the back-end (device).
	VirtioBackEnd Protocol = 0x4000
)

// IsVirtio reports whether p is one of the virtio protocols.
func (p Protocol) IsVirtio() bool { return p&ProtocolVirtio != 0 }

// ForPeer is the protocol type that the peer id finds in its class code on a
// link configured with p. It is p, except on virtio links: there peer 0 is the
// back-end and every other the front-end, whichever of the two p names.
func (p Protocol) ForPeer(id uint32) Protocol {
	if !p.IsVirtio() {
		return p
	}
	p &^= VirtioBackEnd
	if id == 0 {
		p |= VirtioBackEnd
	}
	return p
}

// Names of virtio device IDs (virtio specification, "Device Types").
var virtioNames = map[Protocol]string{
	1: "network", 2: "block", 3: "console", 4: "entropy",
}

// String is the name of the protocol type, such as "undefined",
// "virtio console front-end" or "user-defined 4001h".
func (p Protocol) String() string {
	switch {
	case p == ProtocolUndefined:
		return "undefined"
	case p == ProtocolEthernet:
		return "virtual Ethernet"
	case p < ProtocolUserFirst:
		return fmt.Sprintf("reserved %04Xh", uint16(p))
	case p <= ProtocolUserLast:
		return fmt.Sprintf("user-defined %04Xh", uint16(p))
	}
	end := "front-end"
	if p&VirtioBackEnd != 0 {
		end = "back-end"
	}
	id := p &^ (ProtocolVirtio | VirtioBackEnd)
	name, ok := virtioNames[id]
	if !ok {
		name = fmt.Sprintf("device %d", uint16(id))
	}
	return "virtio " + name + " " + end
}

// ParseProtocol reads a protocol type in C notation: decimal, or hexadecimal
// with 0x in front.
func ParseProtocol(s string) (Protocol, error) {
	v, err := strconv.ParseUint(s, 0, 16)
	if err != nil {
		return 0, fmt.Errorf("protocol %q: expected a number from 0 to 0xffff", s)
	}
	return Protocol(v), nil
}

// ClassCode is the 24-bit PCI class code of a device with protocol p.
func ClassCode(p Protocol) uint32 { return BaseClass<<16 | uint32(p) }

// ProtocolOf takes the protocol type from a 24-bit class code.
func ProtocolOf(class uint32) (Protocol, error) {
	if class>>16 != BaseClass {
		return 0, &ConfigError{Offset: offClass, Field: "class code", Expected: "FFxxxxh", Found: fmt.Sprintf("%06Xh", class)}
	}
	return Protocol(class), nil
}
