package uio

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Names of the maps (uio_ivshmem).
const (
	mapRegisters  = "registers"
	mapStateTable = "state_table"
	mapReadWrite  = "rw_section"
	mapInputs     = "input_sections"
	mapOutput     = "output_section"

	// The driver of the same name for the first version of the device.
	mapVersion1 = "ivshmem-mmr"
)

// Node is a UIO device as sysfs shows it.
type Node struct {
	Number int
	Name   string // of the driver's choice: "uio_ivshmem[0000:00:04.0]"
	Maps   []Map
	dir    string
}

// Map is a piece of memory that a UIO device offers.
type Map struct {
	Index  int
	Name   string
	Size   uint64 // bytes
	Offset uint64 // of the data in the first page
}

var nodeName = regexp.MustCompile(`^uio([0-9]+)$`)

// findNode finds the UIO device of a PCI device's folder in sysfs.
func findNode(pciDir string) (*Node, error) {
	entries, err := os.ReadDir(filepath.Join(pciDir, "uio"))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if m := nodeName.FindStringSubmatch(e.Name()); m != nil {
			n, err := strconv.Atoi(m[1])
			if err != nil {
				return nil, err
			}
			return readNode(filepath.Join(pciDir, "uio", e.Name()), n)
		}
	}
	return nil, fmt.Errorf("%s: %w", filepath.Join(pciDir, "uio"), os.ErrNotExist)
}

// AddressOf is the PCI address of UIO device number n ("uio0" is 0).
func AddressOf(sysfs string, n int) (string, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(sysfs, "class/uio", fmt.Sprintf("uio%d", n), "device"))
	if err != nil {
		return "", err
	}
	return filepath.Base(dir), nil
}

func readNode(dir string, number int) (*Node, error) {
	n := &Node{Number: number, dir: dir}
	var err error
	if n.Name, err = readLine(dir, "name"); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(filepath.Join(dir, "maps"))
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), "map")
		if !ok {
			continue
		}
		m := Map{}
		if m.Index, err = strconv.Atoi(digits); err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, "maps", e.Name()), err)
		}
		at := filepath.Join(dir, "maps", e.Name())
		if m.Name, err = readLine(at, "name"); err != nil {
			return nil, err
		}
		if m.Size, err = readHex(at, "size"); err != nil {
			return nil, err
		}
		if m.Offset, err = readHex(at, "offset"); err != nil {
			return nil, err
		}
		n.Maps = append(n.Maps, m)
	}
	slices.SortFunc(n.Maps, func(a, b Map) int { return a.Index - b.Index })
	return n, nil
}

func readLine(dir, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	return strings.TrimSuffix(string(b), "\n"), err
}

func readHex(dir, name string) (uint64, error) {
	s, err := readLine(dir, name)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseUint(s, 0, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: expected a number, found %q", filepath.Join(dir, name), s)
	}
	return v, nil
}

// open opens the device's file, for reading interrupts without blocking.
func (n *Node) open() (fd int, err error) {
	path := fmt.Sprintf("/dev/uio%d", n.Number)
	if fd, err = unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// byName finds a map. Absent sections are skipped in the numbering, so only
// the name tells what a map is.
func (n *Node) byName(name string) (Map, bool) {
	i := slices.IndexFunc(n.Maps, func(m Map) bool { return m.Name == name })
	if i < 0 {
		return Map{}, false
	}
	return n.Maps[i], true
}

// vectors is the number of MSI-X vectors that the driver allocated; 1 where
// there are none, with INTx.
func vectors(pciDir string) int {
	entries, err := os.ReadDir(filepath.Join(pciDir, "msi_irqs"))
	if err != nil {
		return 1
	}
	return max(len(entries), 1)
}
