package sysfs_test

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/regs"
)

func TestFullAddress(t *testing.T) {
	for s, want := range map[string]string{
		"0000:00:04.0": "0000:00:04.0", "00:04.0": "0000:00:04.0", "0000:FF:1F.7": "0000:ff:1f.7",
		"10000:e1:00.0": "10000:e1:00.0",
	} {
		if got, ok := sysfs.FullAddress(s); got != want || !ok {
			t.Errorf("%q: %q, %v, want %q", s, got, ok, want)
		}
	}
	for _, s := range []string{
		"", "0", "04.0", "00:04", "00:04.8", "00:20.0", "000:00:04.0", "0000:00:04.0.", " 00:04.0", "00:04.0\n",
		"0000:00:04:0", "gg:04.0", "/tmp/link", "../0000:00:04.0", "0000:00:04.0/..", "123456789:00:04.0",
	} {
		if got, ok := sysfs.FullAddress(s); ok {
			t.Errorf("%q is taken for the PCI address %q", s, got)
		}
	}
}

func addresses(devices []*sysfs.Device) (a []string) {
	for _, d := range devices {
		a = append(a, d.Addr)
	}
	return a
}

// The scan finds the ivshmem devices in order; what is wrong with others does
// not matter, and what is wrong with one of them leaves the rest in the list.
func TestDevices(t *testing.T) {
	f := newTree(t)
	f.device("10000:01:00.0")
	f.device("0000:00:05.0")
	dir := f.device("0000:00:04.0")
	f.write("bus/pci/drivers/vfio-pci/bind", "")
	f.link(dir+"/driver", "../../../bus/pci/drivers/vfio-pci")
	f.write("kernel/iommu_groups/17/type", "DMA")
	f.link(dir+"/iommu_group", "../../../kernel/iommu_groups/17")

	f.foreign("0000:00:00.0", map[string]string{"vendor": "0x8086\n", "device": "0x29c0\n"})
	f.foreign("0000:00:01.0", map[string]string{"vendor": "0x110a\n", "device": "0x4107\n"})
	f.foreign("0000:00:02.0", map[string]string{"vendor": "0x1af4\n", "device": "0x4106\n"})
	f.foreign("0000:00:03.0", map[string]string{"vendor": "rubbish"})
	f.foreign("0000:00:06.0", nil)                                     // going away: the link points nowhere
	f.foreign("0000:00:07.0", map[string]string{"device": "0x4106\n"}) // no vendor

	devices, err := f.fs().Devices()
	if err != nil {
		t.Error(err)
	}
	if got, want := addresses(devices), []string{"0000:00:04.0", "0000:00:05.0", "10000:01:00.0"}; !slices.Equal(got, want) {
		t.Fatalf("found %v, want %v", got, want)
	}
	d := devices[0]
	if d.Driver != "vfio-pci" || d.IOMMUGroup != "17" || d.Class != 0xff4001 {
		t.Errorf("driver %q, IOMMU group %q, class %06x", d.Driver, d.IOMMUGroup, d.Class)
	}
	if d := devices[1]; d.Driver != "" || d.IOMMUGroup != "" {
		t.Errorf("driver %q, IOMMU group %q, want none", d.Driver, d.IOMMUGroup)
	}

	// Two ivshmem devices that cannot be read.
	f.foreign("0000:00:08.0", map[string]string{"vendor": "0x110a\n", "device": "0x4106\n"})
	f.foreign("0000:00:09.0", map[string]string{"vendor": "0x110a\n", "device": "0x4106\n", "class": "0xff0000\n", "irq": "0\n", "resource": "one two\n"})
	again, err := f.fs().Devices()
	if got, want := addresses(again), addresses(devices); !slices.Equal(got, want) {
		t.Errorf("beside broken ones found %v, want %v", got, want)
	}
	for _, address := range []string{"0000:00:08.0", "0000:00:09.0"} {
		if err == nil || !strings.Contains(err.Error(), "device "+address) {
			t.Errorf("%v does not name %s", err, address)
		}
	}
	if _, ok := errors.AsType[*fault.DeviceError](err); !ok {
		t.Errorf("untyped error %v", err)
	}
}

func TestNoBus(t *testing.T) {
	if devices, err := sysfs.FS(t.TempDir()).Devices(); len(devices) != 0 || err != nil {
		t.Errorf("machine without PCI: %v, %v", devices, err)
	}
	if devices, err := newTree(t).fs().Devices(); len(devices) != 0 || err != nil {
		t.Errorf("empty bus: %v, %v", devices, err)
	}
}

func TestDevice(t *testing.T) {
	f := newTree(t)
	f.device("0000:00:04.0")
	f.foreign("0000:00:00.0", map[string]string{"vendor": "0x8086\n", "device": "0x29c0\n"})
	f.foreign("0000:00:08.0", map[string]string{"vendor": "0x110a\n", "device": "0x4106\n"})
	if d, err := f.fs().Device("0000:00:04.0"); err != nil || d.Addr != "0000:00:04.0" {
		t.Errorf("%+v, %v", d, err)
	}
	for address, c := range map[string]struct {
		say      string
		notFound bool
	}{
		"0000:00:0b.0": {"no such device", true},
		"0000:00:00.0": {"found 8086:29c0", true},
		"0000:00:08.0": {"class", false},
	} {
		_, err := f.fs().Device(address)
		e, ok := errors.AsType[*fault.DeviceError](err)
		if !ok || e.Device != address || errors.Is(err, fault.ErrNotFound) != c.notFound || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: %v, want %q", address, err, c.say)
		}
	}
}

// BARS of the library leaves out what has no address; BAR goes by index.
func TestBAR(t *testing.T) {
	f := newTree(t)
	dir := f.device("0000:00:04.0")
	none := resource(0, 0, 0)
	type bar struct {
		base, size uint64
		ok         bool
	}
	for name, c := range map[string]struct {
		lines string
		want  [4]bar
	}{
		"all": {resource(0xfebf1000, 0x1000, 0x40200) + resource(0xfebf2000, 0x2000, 0x40200) + resource(0x7_0000_0000, 1<<33, 0x14220c) + none,
			[4]bar{{0xfebf1000, 0x1000, true}, {0xfebf2000, 0x2000, true}, {0x7_0000_0000, 1 << 33, true}, {}}},
		"no BAR2":           {resource(0xfebf1000, 0x1000, 0x40200) + none + none, [4]bar{{0xfebf1000, 0x1000, true}}},
		"BAR0 not assigned": {none + none + resource(0x7_0000_0000, 0x10000, 0x14220c), [4]bar{2: {0x7_0000_0000, 0x10000, true}}},
		"nothing assigned":  {none + none + none, [4]bar{}},
		"end before start":  {"0x2000 0x1000 0x200\n" + none, [4]bar{}},
	} {
		f.write(dir+"/resource", c.lines)
		d, err := f.fs().Device("0000:00:04.0")
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range c.want {
			if base, size, ok := d.BAR(i); (bar{base, size, ok}) != want {
				t.Errorf("%s: BAR%d is %#x, %#x, %v, want %+v", name, i, base, size, ok, want)
			}
		}
	}
}

func TestReadConfig(t *testing.T) {
	f := newTree(t)
	dir := f.device("0000:00:04.0")
	d, err := f.fs().Device("0000:00:04.0")
	if err != nil {
		t.Fatal(err)
	}
	whole := f.read(dir + "/config")
	for n, want := range map[int]string{
		256: "", 64: "needs root", 63: "cut short", 0: "cut short", 0x50: "a space of 80 bytes",
	} {
		f.write(dir+"/config", whole[:n])
		b, err := d.ReadConfig()
		if err != nil || string(b) != whole[:n] {
			t.Errorf("space of %d bytes: read %d, %v", n, len(b), err)
		}
		if _, err := regs.ParseVendorCap(b); want == "" != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("space of %d bytes: %v, want %q", n, err, want)
		}
	}
	// PCI Express has 4096 bytes; what we know is in the first 256.
	f.write(dir+"/config", whole+strings.Repeat("x", 4096-256))
	if b, err := d.ReadConfig(); err != nil || string(b) != whole {
		t.Errorf("space of 4096 bytes: read %d, %v", len(b), err)
	}
	if err := os.Remove(filepath.Join(f.root, dir, "config")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadConfig(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("device gone: %v", err)
	}
	if _, err := d.Own(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("own a device that is gone: %v", err)
	}
	if o, ok := d.Owner(); ok {
		t.Errorf("a device that is gone is owned by %v", o)
	}
}

func TestOwn(t *testing.T) {
	f := newTree(t)
	f.device("0000:00:04.0")
	f.device("0000:00:05.0")
	d, err := f.fs().Device("0000:00:04.0")
	if err != nil {
		t.Fatal(err)
	}
	other, err := f.fs().Device("0000:00:05.0")
	if err != nil {
		t.Fatal(err)
	}
	if o, ok := d.Owner(); ok {
		t.Errorf("owned by %v at first", o)
	}
	release, err := d.Own()
	if err != nil {
		t.Fatal(err)
	}
	if o, ok := d.Owner(); !ok || o.PID != os.Getpid() || o.Command == "" {
		t.Errorf("owner %+v, %v, want this process, %d", o, ok, os.Getpid())
	}
	if o, ok := other.Owner(); ok {
		t.Errorf("the other device is owned by %v", o)
	}
	if _, err := d.Own(); !errors.Is(err, fault.ErrBusy) {
		t.Errorf("owned twice: %v, want ErrBusy", err)
	}
	if release2, err := other.Own(); err != nil {
		t.Errorf("the other device: %v", err)
	} else {
		release2()
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	if o, ok := d.Owner(); ok {
		t.Errorf("owned by %v after release", o)
	}
	release, err = d.Own()
	if err != nil {
		t.Fatal(err)
	}
	release()
}

// TestMain lets the test be the second process, which owns a device until it
// is killed.
func TestMain(m *testing.M) {
	root := os.Getenv("IVSHMEM_TEST_OWN")
	if root == "" {
		os.Exit(m.Run())
	}
	d, err := sysfs.FS(root).Device("0000:00:04.0")
	if err == nil {
		_, err = d.Own()
	}
	if err != nil {
		os.Stdout.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	os.Stdout.WriteString("owned\n")
	io.Copy(io.Discard, os.Stdin)
}

func TestOwnerIsAnotherProcess(t *testing.T) {
	f := newTree(t)
	f.device("0000:00:04.0")
	d, err := f.fs().Device("0000:00:04.0")
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), "IVSHMEM_TEST_OWN="+f.root)
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	defer c.Process.Kill()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "owned\n" {
		t.Fatalf("second process: %q, %v", line, err)
	}
	o, ok := d.Owner()
	if !ok || o.PID != c.Process.Pid || !strings.HasPrefix(filepath.Base(os.Args[0]), o.Command) || o.Command == "" {
		t.Errorf("owner %+v, %v, want process %d", o, ok, c.Process.Pid)
	}
	_, err = d.Own()
	if !errors.Is(err, fault.ErrBusy) || !strings.Contains(err.Error(), o.String()) {
		t.Errorf("own: %v, want ErrBusy and the name of %v", err, o)
	}
	// The lock dies with its holder, whatever kills it.
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	release, err := d.Own()
	if err != nil {
		t.Fatalf("after the owner was killed: %v", err)
	}
	release()
}
