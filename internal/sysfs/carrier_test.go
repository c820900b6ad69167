package sysfs_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

func TestCarrier(t *testing.T) {
	f := newTree(t)
	dir := f.device("0000:00:04.0")
	d, err := f.fs().Device("0000:00:04.0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := f.read(dir + "/enable"); got != "1" {
		t.Errorf("memory decoding of a device without a driver: enable is %q, want 1", got)
	}
	if c.Address() != "0000:00:04.0" || c.Driver() != "sysfs" {
		t.Errorf("address %q, driver %q", c.Address(), c.Driver())
	}
	if i := c.Interrupts(); len(i.FDs) != 0 || i.Gone.Events != 0 {
		t.Errorf("interrupts %+v, want none", i)
	}
	if x, err := c.Load(regs.MaxPeers); x != 3 || err != nil {
		t.Errorf("Maximum Peers: %d, %v", x, err)
	}
	if err := c.Store(regs.State, 0x01020304); err != nil {
		t.Error(err)
	}
	if got := f.read(dir + "/resource0")[0x10:0x14]; got != "\x04\x03\x02\x01" {
		t.Errorf("State is % x", got)
	}
	config, err := c.Config()
	if err != nil || string(config) != f.read(dir+"/config") {
		t.Errorf("configuration space of %d bytes, %v", len(config), err)
	}
	if err := c.WriteConfig(0x43, 1); err != nil {
		t.Error(err)
	}
	config[0x43] = 1
	if f.read(dir+"/config") != string(config) {
		t.Error("a write of one byte of the configuration space changed something else")
	}

	s := c.Sections()
	want := shmem.Layout{StateTable: 0x1000, ReadWrite: 0x9000, Output: 0x2000, Peers: 3}
	if d := cmp.Diff(want, s.Layout); d != "" {
		t.Error(d)
	}
	if x, err := s.States.Load(2); x != 9 || err != nil {
		t.Errorf("state of peer 2: %d, %v", x, err)
	}
	if x, err := s.ReadWrite.Load8(0); x != 0x10 || err != nil {
		t.Errorf("R/W section: %#x, %v", x, err)
	}
	if err := s.Output.Store8(1, 0x42); err != nil {
		t.Error(err)
	}
	if got := f.read(dir + "/resource2")[0xc000:0xc002]; got != "\xa1\x42" {
		t.Errorf("own output section, of peer 1: % x", got)
	}
	in, err := s.Input(2)
	if err != nil {
		t.Fatal(err)
	}
	if x, err := in.Load8(0); x != 0xa2 || err != nil {
		t.Errorf("output section of peer 2: %#x, %v", x, err)
	}

	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if got := f.read(dir + "/enable"); got != "0" {
		t.Errorf("after Close: enable is %q, want 0", got)
	}
	_, loadErr := c.Load(regs.ID)
	_, configErr := c.Config()
	for name, err := range map[string]error{
		"Load": loadErr, "Store": c.Store(regs.State, 1), "Config": configErr, "WriteConfig": c.WriteConfig(0x43, 0),
		"Store8": s.Output.Store8(0, 1),
	} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close: %v, want os.ErrClosed", name, err)
		}
	}
}

// A driver has enabled the device; the carrier leaves that alone.
func TestCarrierBesideDriver(t *testing.T) {
	f := newTree(t)
	dir := f.device("0000:00:04.0")
	f.write("bus/pci/drivers/uio_ivshmem/bind", "")
	f.link(dir+"/driver", "../../../bus/pci/drivers/uio_ivshmem")
	f.write(dir+"/enable", "untouched")
	d, err := f.fs().Device("0000:00:04.0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if got := f.read(dir + "/enable"); got != "untouched" {
		t.Errorf("enable is %q", got)
	}
}

// Whatever is wrong with a device is an error that names it and says what was
// expected; and it is left disabled.
func TestCarrierRefuses(t *testing.T) {
	none := resource(0, 0, 0)
	bar0 := resource(0xfebf1000, 0x1000, 0x40200)
	bar2 := func(size uint64) string { return resource(0x7_0000_0000, size, 0x14220c) }
	ones := strings.Repeat("\xff", 4096)
	for name, c := range map[string]struct {
		file, content string
		is            error
		say           string
	}{
		"BAR0 not assigned":          {"resource", none + none + bar2(0x10000), nil, "BAR0"},
		"no BAR2":                    {"resource", bar0 + none + none, fault.ErrNotSupported, "BAR2"},
		"BAR0 too small":             {"resource", resource(0xfebf1000, 16, 0x40200) + none + bar2(0x10000), nil, "register region"},
		"BAR2 too small":             {"resource", bar0 + none + bar2(0x8000), nil, "region size"},
		"register file too short":    {"resource0", "\x01\x00\x00\x00\x03", nil, "open registers"},
		"memory file too short":      {"resource2", strings.Repeat("x", 0x8000), nil, "map shared memory"},
		"registers read all ones":    {"resource0", ones, regs.ErrGone, "all ones"},
		"ID above all peers":         {"resource0", "\x03\x00\x00\x00\x03" + strings.Repeat("\x00", 4091), nil, "register ID"},
		"no peers":                   {"resource0", strings.Repeat("\x00", 4096), nil, "Maximum Peers"},
		"configuration space gone":   {"config", ones[:256], regs.ErrGone, "all ones"},
		"configuration space short":  {"config", "\x0a\x11\x06\x41" + strings.Repeat("\x00", 60), regs.ErrNoCapability, "Status register"},
		"configuration space absent": {"config", "", regs.ErrConfigShort, "needs root"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newTree(t)
			dir := f.device("0000:00:04.0")
			f.write(dir+"/"+c.file, c.content)
			d, err := f.fs().Device("0000:00:04.0")
			if err != nil {
				t.Fatal(err)
			}
			_, err = d.Open()
			e, ok := errors.AsType[*fault.DeviceError](err)
			if !ok || e.Device != "0000:00:04.0" || !strings.Contains(err.Error(), c.say) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%v, want %v %q", err, c.is, c.say)
			}
			if got := f.read(dir + "/enable"); got != "0" {
				t.Errorf("enable is %q after a failed open", got)
			}
		})
	}
	for _, file := range []string{"resource0", "resource2", "config"} {
		f := newTree(t)
		dir := f.device("0000:00:04.0")
		d, err := f.fs().Device("0000:00:04.0")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(f.root, dir, file)); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Open(); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("without %s: %v", file, err)
		}
	}
}

// Registers in I/O space cannot be mapped: each access is one of its file.
func TestCarrierIORegisters(t *testing.T) {
	f := newTree(t)
	dir := f.device("0000:00:04.0")
	f.write(dir+"/resource", resource(0xc000, 32, 0x40101)+resource(0xfebf2000, 0x1000, 0x40200)+
		resource(0x7_0000_0000, 0x10000, 0x14220c)+strings.Repeat(resource(0, 0, 0), 10))
	f.write(dir+"/resource0", "\x01\x00\x00\x00\x03"+strings.Repeat("\x00", 27))
	d, err := f.fs().Device("0000:00:04.0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if sysfs.Mapped(c) {
		t.Error("a file that the kernel does not let be mapped is mapped")
	}
	if x, err := c.Load(regs.MaxPeers); x != 3 || err != nil {
		t.Errorf("Maximum Peers: %d, %v", x, err)
	}
	if err := c.Store(regs.State, 0x01020304); err != nil {
		t.Error(err)
	}
	if got := f.read(dir + "/resource0")[0x10:0x14]; got != "\x04\x03\x02\x01" {
		t.Errorf("State is % x", got)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Store(regs.State, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v, want os.ErrClosed", err)
	}
}

func TestInterruptPin(t *testing.T) {
	for pin, want := range map[string]bool{"\x00": false, "\x01": true, "\x04": true, "\xff": false, "": false} {
		f := newTree(t)
		dir := f.device("0000:00:04.0")
		f.write(dir+"/config", f.read(dir + "/config")[:0x3d]+pin)
		d, err := f.fs().Device("0000:00:04.0")
		if err != nil {
			t.Fatal(err)
		}
		if got := d.InterruptPin(); got != want {
			t.Errorf("pin % x: %v, want %v", pin, got, want)
		}
		if d.IORegisters() {
			t.Error("registers in memory space are taken for I/O space")
		}
	}
}
