// Package uio carries an ivshmem v2 device through a UIO driver: uio_ivshmem,
// out of tree or the project's own (kmod/), which offers the sections as maps
// with names; or a driver that knows nothing of the device ([Generic]).
//
// With uio_ivshmem one counter serves all vectors, the driver has one-shot mode
// on, sections are mapped write-back and read-only where they have to be, and
// the kernel sets State 0 when the last reference to the file goes away. The
// file is opened exactly once for that reason.
package uio

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Backend is an open device. It implements the back end interface of the root
// package.
type Backend struct {
	dev     *sysfs.Device
	node    *Node
	window  *regs.Window
	set     *mem.Set
	vectors int

	mu sync.RWMutex // held for writing by Close
	fd int          // -1 once closed
}

// Carries reports whether a device is bound to a driver with the maps of
// uio_ivshmem, or of its namesake for the first version of the device, which
// Open refuses.
func Carries(dev *sysfs.Device) bool {
	n, err := findNode(dev.FullPath)
	if err != nil {
		return false
	}
	_, sections := n.byName(mapStateTable)
	_, old := n.byName(mapVersion1)
	return sections || old
}

// Open opens the device with a full PCI address. It has to be bound to
// uio_ivshmem. The file in /dev is opened once; whoever opens it besides, and
// closes it again, sets State 0.
func Open(address string) (*Backend, error) {
	dev, err := sysfs.Root.Device(address)
	if err != nil {
		return nil, err
	}
	return open(dev)
}

func open(dev *sysfs.Device) (*Backend, error) {
	b := &Backend{dev: dev, fd: -1}
	if err := b.open(); err != nil {
		b.Close()
		e := &fault.DeviceError{Device: dev.Addr, Op: "open through UIO", Err: err}
		if errors.Is(err, os.ErrPermission) {
			e.Remedy = fmt.Sprintf("run as root, or with access rights to /dev/uio%d: `ivshctl udev` prints rules for a group", b.number())
		}
		return nil, e
	}
	return b, nil
}

func (b *Backend) number() int {
	if b.node == nil {
		return 0
	}
	return b.node.Number
}

func (b *Backend) open() error {
	var err error
	if b.node, err = findNode(b.dev.FullPath); err != nil {
		return err
	}
	if _, old := b.node.byName(mapVersion1); old {
		return fmt.Errorf("%w: driver %s is the one for the first version of the device (its maps are called %s and ivshmem-shmem): unload it, and bind the device to uio_ivshmem for version 2, or to vfio-pci", fault.ErrNotSupported, b.dev.Driver, mapVersion1)
	}
	if b.fd, err = b.node.open(); err != nil {
		return err
	}
	b.vectors = vectors(b.dev.FullPath)
	registers, ok := b.node.byName(mapRegisters)
	if !ok {
		return b.missing(mapRegisters)
	}
	if err := b.check(registers); err != nil {
		return err
	}
	if b.window, err = regs.MapWindow(uintptr(b.fd), place(registers), int(min(registers.Size, regs.RegionSize))); err != nil {
		return err
	}
	return b.mapSections()
}

func (b *Backend) missing(name string) error {
	return fmt.Errorf("UIO device %d (%s): expected a map %q, found none", b.node.Number, b.node.Name, name)
}

func (b *Backend) check(m Map) error {
	if m.Offset != 0 {
		return fmt.Errorf("UIO device %d, map %q: expected offset 0 in its page, found %#x", b.node.Number, m.Name, m.Offset)
	}
	return nil
}

// place is the offset for mmap that selects a map (UIO howto: map N is at N
// pages).
func place(m Map) int64 { return int64(m.Index) * int64(os.Getpagesize()) }

// mapSections takes the layout from the sizes of the maps, which an ordinary
// user sees too, and maps what is there.
func (b *Backend) mapSections() error {
	table, ok := b.node.byName(mapStateTable)
	if !ok {
		return b.missing(mapStateTable)
	}
	readWrite, _ := b.node.byName(mapReadWrite)
	inputs, hasInputs := b.node.byName(mapInputs)
	output, hasOutput := b.node.byName(mapOutput)
	if hasInputs != hasOutput {
		return fmt.Errorf("UIO device %d: expected both maps %q and %q, or neither", b.node.Number, mapInputs, mapOutput)
	}
	for _, m := range []Map{table, readWrite, inputs, output} {
		if err := b.check(m); err != nil {
			return err
		}
	}
	layout, _, err := mem.Layout(table.Size, readWrite.Size, output.Size, b.window.Load)
	if err != nil {
		return err
	}
	if all := uint64(layout.Peers) * output.Size; inputs.Size != all {
		return fmt.Errorf("UIO device %d, map %q: expected %d bytes, for %d peers with output sections of %d, found %d", b.node.Number, mapInputs, all, layout.Peers, output.Size, inputs.Size)
	}
	b.set, err = mem.MapSections(b.fd, layout, mem.Places{
		StateTable: place(table), ReadWrite: place(readWrite), Inputs: place(inputs), Output: place(output),
	})
	return err
}

// Address is the PCI address.
func (b *Backend) Address() string { return b.dev.Addr }

// Driver is the name of the kernel driver.
func (b *Backend) Driver() string { return b.dev.Driver }

// Config reads the configuration space.
func (b *Backend) Config() ([]byte, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.fd < 0 {
		return nil, os.ErrClosed
	}
	return b.dev.ReadConfig()
}

// WriteConfig writes one byte of the configuration space, which needs root.
func (b *Backend) WriteConfig(offset int, v uint8) error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.fd < 0 {
		return os.ErrClosed
	}
	return b.dev.WriteConfig(offset, v)
}

// Load reads a register.
func (b *Backend) Load(r regs.Register) (uint32, error) { return b.window.Load(r) }

// Store writes a register.
func (b *Backend) Store(r regs.Register, v uint32) error { return b.window.Store(r, v) }

// EndsState says that the driver sets State 0 when the file is closed.
func (b *Backend) EndsState() bool { return true }

// Sections is the shared memory.
func (b *Backend) Sections() *shmem.Sections { return &b.set.Sections }

// Interrupts is the UIO file, whose counter all vectors share.
func (b *Backend) Interrupts() evfd.Interrupts {
	return evfd.Interrupts{FDs: []int{b.fd}, UIO: true, Shared: true, Vectors: b.vectors}
}

// Close unmaps the device and closes the file: the driver sets State 0.
func (b *Backend) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fd < 0 {
		return nil
	}
	var errs []error
	if b.window != nil {
		errs = append(errs, b.window.Close())
	}
	if b.set != nil {
		errs = append(errs, b.set.Close())
	}
	errs = append(errs, unix.Close(b.fd))
	b.fd = -1
	return errors.Join(errs...)
}

// ParseName takes "uio3" or "/dev/uio3" apart.
func ParseName(s string) (number int, ok bool) {
	s = strings.TrimPrefix(s, "/dev/")
	m := nodeName.FindStringSubmatch(s)
	if m == nil {
		return 0, false
	}
	_, err := fmt.Sscan(m[1], &number)
	return number, err == nil
}
