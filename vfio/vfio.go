// Package vfio carries an ivshmem v2 device that is bound to vfio-pci: the
// only back end that keeps interrupt vectors apart in a guest without a
// driver of its own.
//
// The device is had through its own character device and an iommufd, through
// its IOMMU group, or in no-IOMMU mode ([FindWay]); after that there is no
// difference.
//
// # State at the end of a program
//
// Behind a PCI Express root port the kernel resets the device when its file is
// closed, so State is 0 however the program ended. On the root bus it cannot:
// there State 0 is what the program itself writes by closing the device, as
// deferred calls do at a return, and at a panic in their own goroutine. A
// panic in another goroutine, like SIGKILL, runs none, and State stays until
// the next owner, a reset of the guest, or the end of QEMU.
package vfio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Driver is the name of the kernel driver.
const Driver = "vfio-pci"

// Backend is an open device. It implements the back end interface of the
// root package.
type Backend struct {
	address   string
	way       Way
	files     []int // of the way; each is closed once
	device    int   // -1 if not open; may be one of files
	config    regionInfo
	registers registers
	set       *mem.Set
	irq       uint32 // index of the interrupts: MSI-X or INTx
	vectors   []int
	gone      evfd.Source // eventfd of the kernel's device request

	mu     sync.RWMutex // held for writing by Close
	closed bool
}

// Open opens the device with a full PCI address. It has to be bound to
// vfio-pci, and all of its IOMMU group to vfio-pci or nothing.
func Open(address string) (*Backend, error) {
	b := &Backend{address: address, device: -1}
	if err := b.open(); err != nil {
		b.Close()
		return nil, b.failed(err)
	}
	return b, nil
}

func (b *Backend) failed(err error) error {
	if e := (*fault.DeviceError)(nil); errors.As(err, &e) {
		return err
	}
	e := &fault.DeviceError{Device: b.address, Op: "open through vfio-pci", Err: err}
	switch r := (*fault.Reason)(nil); {
	case errors.As(err, &r) && err == error(r):
		e.Err, e.Remedy = r.Err, r.Remedy
	case errors.As(err, &r): // its remedy is in the text
	case errors.Is(err, os.ErrPermission):
		e.Remedy = "run as root, or get access rights by the rules that `ivshctl udev` prints"
	}
	return e
}

func (b *Backend) open() error {
	dev, err := sysfs.Root.Device(b.address)
	if err != nil {
		return err
	}
	if dev.Driver != Driver {
		return &fault.DeviceError{Device: b.address, Op: "open through vfio-pci",
			Err:    fmt.Errorf("expected driver %s, found %q", Driver, dev.Driver),
			Remedy: "run `ivshctl bind`"}
	}
	if b.way, err = FindWay(dev); err != nil {
		return err
	}
	if b.files, err = b.way.openFiles(); err != nil {
		return err
	}
	if b.device, err = b.way.open(b.files, b.address); err != nil {
		return err
	}
	if err := b.enable(); err != nil {
		return err
	}
	if b.registers, err = openRegisters(b.device); err != nil {
		return err
	}
	config, err := b.Config()
	if err != nil {
		return err
	}
	layout, own, err := mem.Geometry(config, b.registers.Load)
	if err != nil {
		return err
	}
	r, err := regionOf(b.device, regionBAR2)
	if err != nil {
		return err
	}
	if r.size == 0 {
		return &fault.Reason{
			Err:    fmt.Errorf("%w: the device has no BAR2, its shared memory can be reached through the kernel driver uio_ivshmem (kmod/) only", fault.ErrNotSupported),
			Remedy: "run `ivshctl bind --driver uio_ivshmem`",
		}
	}
	if r.flags&regionFlagMmap == 0 {
		return fmt.Errorf("%w: the kernel does not let BAR2 be mapped", fault.ErrNotSupported)
	}
	if err := layout.CheckRegion(r.size); err != nil {
		return err
	}
	if b.set, err = mem.MapSections(b.device, layout, mem.Region(int64(r.offset), layout, own)); err != nil {
		return err
	}
	return b.connectVectors()
}

// enable switches decoding and bus master on; without the latter no MSI-X
// message leaves the device.
func (b *Backend) enable() error {
	const command, bar0 = 0x04, 0x10
	const inIO = 1 << 0 // of a base address register
	const io, memory, busMaster = 1 << 0, 1 << 1, 1 << 2
	var err error
	if b.config, err = regionOf(b.device, regionConfig); err != nil {
		return err
	}
	config, err := b.Config()
	if err != nil {
		return err
	}
	if len(config) < regs.ConfigUnprivileged {
		return fmt.Errorf("%w: expected at least %d bytes, found %d", regs.ErrConfigShort, regs.ConfigUnprivileged, len(config))
	}
	on := uint16(memory | busMaster)
	if config[bar0]&inIO != 0 {
		on |= io
	}
	c := binary.LittleEndian.AppendUint16(nil, binary.LittleEndian.Uint16(config[command:])|on)
	if _, err := unix.Pwrite(b.device, c, int64(b.config.offset)+command); err != nil {
		return fmt.Errorf("write Command register: %w", err)
	}
	return nil
}

// connectVectors gives each MSI-X vector, or INTx, an eventfd of its own, and
// one to the kernel's notice that it wants the device back.
func (b *Backend) connectVectors() error {
	b.irq = irqMSIX
	n, err := irqCount(b.device, b.irq)
	if err == nil && n == 0 {
		b.irq = irqINTx
		n, err = irqCount(b.device, b.irq)
	}
	if err != nil {
		return err
	}
	if n > regs.VectorsMax {
		return fmt.Errorf("interrupt vectors: expected at most %d, found %d", regs.VectorsMax, n)
	}
	for range n {
		fd, err := evfd.New()
		if err != nil {
			return err
		}
		b.vectors = append(b.vectors, fd)
	}
	if n > 0 {
		if err := setEventFDs(b.device, b.irq, b.vectors); err != nil {
			return fmt.Errorf("connect %d interrupt vectors: %w", n, err)
		}
	}
	if n, err = irqCount(b.device, irqRequest); err != nil || n == 0 {
		return nil // an old kernel: nobody asks
	}
	fd, err := evfd.New()
	if err != nil {
		return err
	}
	b.gone = evfd.Source{FD: fd, Events: unix.EPOLLIN}
	if err := setEventFDs(b.device, irqRequest, []int{fd}); err != nil {
		return fmt.Errorf("connect device request: %w", err)
	}
	return nil
}

// unmask is done when the kernel masked INTx.
func (b *Backend) unmask() error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed {
		return os.ErrClosed
	}
	return unmask(b.device)
}

// Address is the PCI address.
func (b *Backend) Address() string { return b.address }

// Driver is "vfio-pci", with the way in parentheses if it is not the group:
// "vfio-pci (iommufd)", "vfio-pci (no-IOMMU)".
func (b *Backend) Driver() string {
	if b.way.Name == WayGroup {
		return Driver
	}
	return Driver + " (" + b.way.Name + ")"
}

// Config reads the configuration space.
func (b *Backend) Config() ([]byte, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed {
		return nil, os.ErrClosed
	}
	c := make([]byte, min(b.config.size, regs.ConfigSize))
	n, err := unix.Pread(b.device, c, int64(b.config.offset))
	if err != nil {
		return nil, fmt.Errorf("read configuration space: %w", err)
	}
	return c[:n], nil
}

// WriteConfig writes one byte of the configuration space.
func (b *Backend) WriteConfig(offset int, v uint8) error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed {
		return os.ErrClosed
	}
	_, err := unix.Pwrite(b.device, []byte{v}, int64(b.config.offset)+int64(offset))
	return err
}

// Load reads a register.
func (b *Backend) Load(r regs.Register) (uint32, error) { return b.registers.Load(r) }

// Store writes a register.
func (b *Backend) Store(r regs.Register, v uint32) error { return b.registers.Store(r, v) }

// Sections is the shared memory.
func (b *Backend) Sections() *shmem.Sections { return &b.set.Sections }

// Interrupts has one eventfd per MSI-X vector, or one for INTx. The kernel's
// device request ends them: until the device is closed, its removal, or the
// unbinding of the driver, waits.
func (b *Backend) Interrupts() evfd.Interrupts {
	i := evfd.Interrupts{FDs: b.vectors, Gone: b.gone}
	if b.irq == irqINTx && len(b.vectors) > 0 {
		i.Rearm = b.unmask
	}
	return i
}

// Close gives the device back to the kernel, which switches MSI-X and bus
// master off, and resets the device where it can.
func (b *Backend) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	var errs []error
	if b.registers != nil {
		errs = append(errs, b.registers.Close())
	}
	if b.set != nil {
		errs = append(errs, b.set.Close())
	}
	if len(b.vectors) > 0 {
		errs = append(errs, setEventFDs(b.device, b.irq, nil))
	}
	fds := slices.Clone(b.vectors)
	if b.gone.Events != 0 {
		fds = append(fds, b.gone.FD)
	}
	if b.device >= 0 && !slices.Contains(b.files, b.device) {
		fds = append(fds, b.device)
	}
	for _, fd := range slices.Backward(b.files) {
		fds = append(fds, fd)
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return errors.Join(errs...)
}
