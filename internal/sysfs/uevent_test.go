package sysfs

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestParseUevent(t *testing.T) {
	text := func(fields ...string) []byte { return []byte(strings.Join(fields, "\x00") + "\x00") }
	for _, c := range []struct {
		name string
		in   []byte
		want Event
		ok   bool
	}{
		{"a device appears", text("add@/devices/pci0000:00/0000:00:0e.0", "ACTION=add", "SUBSYSTEM=pci", "PCI_ID=110A:4106", "PCI_SLOT_NAME=0000:00:0e.0"),
			Event{"add", "0000:00:0e.0", ""}, true},
		{"a driver binds", text("bind@/x", "ACTION=bind", "SUBSYSTEM=pci", "DRIVER=vfio-pci", "PCI_ID=110A:4106", "PCI_SLOT_NAME=0000:00:0e.0"),
			Event{"bind", "0000:00:0e.0", "vfio-pci"}, true},
		{"another device", text("add@/x", "ACTION=add", "SUBSYSTEM=pci", "PCI_ID=8086:4106", "PCI_SLOT_NAME=0000:00:0e.0"), Event{}, false},
		{"another subsystem", text("add@/x", "ACTION=add", "SUBSYSTEM=uio", "PCI_ID=110A:4106", "PCI_SLOT_NAME=0000:00:0e.0"), Event{}, false},
		{"no address", text("add@/x", "ACTION=add", "SUBSYSTEM=pci", "PCI_ID=110A:4106"), Event{}, false},
		{"nothing", nil, Event{}, false},
		{"no key", text("=", "ACTION"), Event{}, false},
	} {
		if got, ok := parseUevent(c.in); ok != c.ok || ok && got != c.want {
			t.Errorf("%s: got %+v, %v", c.name, got, ok)
		}
	}
}

func TestWatchEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	err := Watch(ctx, func() error { cancel(); return nil }, func(Event) error { return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}
