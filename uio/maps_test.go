package uio

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/u-root/u-root/pkg/pci"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
)

// fakeNode writes the sysfs folder of a UIO device under a PCI device's, as
// the kernel does it: sizes in zero-padded hexadecimal, lines ended.
func fakeNode(t *testing.T, name string, maps ...string) string {
	t.Helper()
	dir := t.TempDir()
	write := func(path, text string) {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("uio/uio7/name", name)
	for i, m := range maps {
		name, size, _ := strings.Cut(m, " ")
		write(fmt.Sprintf("uio/uio7/maps/map%d/name", i), name)
		write(fmt.Sprintf("uio/uio7/maps/map%d/size", i), size)
		write(fmt.Sprintf("uio/uio7/maps/map%d/offset", i), "0x0")
	}
	return dir
}

func TestFindNode(t *testing.T) {
	dir := fakeNode(t, "uio_ivshmem[0000:00:0e.0]", "registers 0x0000000000001000", "state_table 0x0000000000001000",
		"input_sections 0x0000000000006000", "output_section 0x0000000000002000")
	n, err := findNode(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := &Node{Number: 7, Name: "uio_ivshmem[0000:00:0e.0]", Maps: []Map{
		{0, "registers", 0x1000, 0}, {1, "state_table", 0x1000, 0}, {2, "input_sections", 0x6000, 0}, {3, "output_section", 0x2000, 0},
	}}
	if diff := cmp.Diff(want, n, cmpopts.IgnoreUnexported(Node{})); diff != "" {
		t.Errorf("node (-want +got):\n%s", diff)
	}
	// The R/W section is absent, and the following maps moved up.
	if _, ok := n.byName("rw_section"); ok {
		t.Error("found a map that is not there")
	}
	if m, ok := n.byName("output_section"); !ok || m.Index != 3 {
		t.Errorf("output_section: got %+v, %v", m, ok)
	}
}

func TestFindNodeBroken(t *testing.T) {
	if _, err := findNode(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no UIO device: got %v", err)
	}
	if _, err := findNode(fakeNode(t, "x", "registers nonsense")); err == nil || !strings.Contains(err.Error(), `"nonsense"`) {
		t.Errorf("a size that is no number: got %v", err)
	}
}

func TestCarries(t *testing.T) {
	for _, c := range []struct {
		name               string
		maps               []string
		carries, isGeneric bool
	}{
		{"uio_ivshmem[0000:00:0e.0]", []string{"registers 0x1000", "state_table 0x1000"}, true, false},
		{"another name", []string{"registers 0x1000", "state_table 0x1000"}, true, false},
		{"uio_ivshmem", []string{"ivshmem-mmr 0x1000", "ivshmem-shmem 0x100000"}, true, false},
		{"igb_uio", []string{"BAR0 0x1000", "BAR2 0x100000"}, false, true},
		{"uio_pci_generic", nil, false, false},
		{"uio_pci_generic", []string{"pin"}, false, true},
		{"another driver", []string{"pin"}, false, false},
	} {
		pin := byte(0)
		if slices.Contains(c.maps, "pin") {
			c.maps, pin = nil, 1
		}
		dev := &sysfs.Device{PCI: &pci.PCI{FullPath: fakeNode(t, c.name, c.maps...)}}
		config := make([]byte, 64)
		config[0x3d] = pin
		if err := os.WriteFile(filepath.Join(dev.FullPath, "config"), config, 0o644); err != nil {
			t.Fatal(err)
		}
		if got := Carries(dev); got != c.carries {
			t.Errorf("%s %v: Carries is %v", c.name, c.maps, got)
		}
		if got := IsGeneric(dev); got != c.isGeneric {
			t.Errorf("%s %v: IsGeneric is %v", c.name, c.maps, got)
		}
	}
}

// TestVersion1 meets the driver of the same name for the first version of the
// device.
func TestVersion1(t *testing.T) {
	dev := &sysfs.Device{PCI: &pci.PCI{Addr: "0000:00:0e.0", FullPath: fakeNode(t, "uio_ivshmem", "ivshmem-mmr 0x1000", "ivshmem-shmem 0x100000")}, Driver: "uio_ivshmem"}
	_, err := open(dev)
	if !errors.Is(err, fault.ErrNotSupported) || !strings.Contains(err.Error(), "first version") {
		t.Errorf("got %v", err)
	}
}

func TestVectors(t *testing.T) {
	dir := t.TempDir()
	if got := vectors(dir); got != 1 {
		t.Errorf("without MSI-X: got %d vectors, want 1", got)
	}
	for _, irq := range []string{"24", "25", "26"} {
		if err := os.MkdirAll(filepath.Join(dir, "msi_irqs", irq), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if got := vectors(dir); got != 3 {
		t.Errorf("got %d vectors, want 3", got)
	}
}

func TestParseName(t *testing.T) {
	for s, want := range map[string]int{"uio0": 0, "/dev/uio12": 12} {
		if n, ok := ParseName(s); !ok || n != want {
			t.Errorf("%q: got %d, %v", s, n, ok)
		}
	}
	for _, s := range []string{"", "uio", "uio1x", "/dev/uio", "/tmp/uio0", "0000:00:0e.0", "uio99999999999999999999"} {
		if n, ok := ParseName(s); ok {
			t.Errorf("%q: got %d", s, n)
		}
	}
}
