// Package vfio carries an ivshmem v2 device that is bound to vfio-pci: the
// only back end that keeps interrupt vectors apart in a guest without a
// driver of its own.
//
// It uses the group and container interface (Linux,
// Documentation/driver-api/vfio.rst).
package vfio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

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
	address string
	device  int // descriptors, -1 if not open
	group   int
	iommu   int
	config  regionInfo
	window  *regs.Window
	set     *mem.Set
	vectors []int
	gone    evfd.Source // eventfd of the kernel's device request

	mu     sync.RWMutex // held for writing by Close
	closed bool
}

// Open opens the device with a full PCI address. It has to be bound to
// vfio-pci, and all of its IOMMU group to vfio-pci or nothing.
func Open(address string) (*Backend, error) {
	b := &Backend{address: address, device: -1, group: -1, iommu: -1}
	if err := b.open(); err != nil {
		b.Close()
		var e *fault.DeviceError
		if !errors.As(err, &e) {
			e = &fault.DeviceError{Device: address, Op: "open through vfio-pci", Err: err}
			if errors.Is(err, os.ErrPermission) {
				e.Remedy = "run as root, or get access rights by the rules that `ivshctl udev` prints"
			}
			err = e
		}
		return nil, err
	}
	return b, nil
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
	if err := b.openDevice(dev.IOMMUGroup); err != nil {
		return err
	}
	if err := b.enable(); err != nil {
		return err
	}
	r, err := regionOf(b.device, regionBAR0)
	if err != nil {
		return err
	}
	if b.window, err = regs.MapWindow(uintptr(b.device), int64(r.offset), int(min(r.size, regs.RegionSize))); err != nil {
		return err
	}
	config, err := b.Config()
	if err != nil {
		return err
	}
	layout, own, err := mem.Geometry(config, b.window.Load)
	if err != nil {
		return err
	}
	if r, err = regionOf(b.device, regionBAR2); err != nil {
		return err
	}
	if r.size == 0 {
		return fmt.Errorf("%w: the device has no BAR2, its shared memory can be reached through uio_ivshmem only: run `ivshctl bind --driver uio_ivshmem`", fault.ErrNotSupported)
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

func (b *Backend) openDevice(group string) error {
	if group == "" {
		return fmt.Errorf("%w: expected an IOMMU group, found none: this machine has no IOMMU, or it is off", fault.ErrNotSupported)
	}
	var err error
	if b.iommu, err = open("/dev/vfio/vfio"); err != nil {
		return err
	}
	if b.group, err = open(filepath.Join("/dev/vfio", group)); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: another process has %w", fault.ErrBusy, err)
		}
		return err
	}
	st := groupStatus{}
	st.argsz = uint32(unsafe.Sizeof(st))
	if _, err := ioctl(b.group, ioctlGroupStatus, unsafe.Pointer(&st)); err != nil {
		return fmt.Errorf("IOMMU group %s: %w", group, err)
	}
	if st.flags&groupViable == 0 {
		return fmt.Errorf("IOMMU group %s: %w: other devices of the group are bound to other drivers", group, fault.ErrNotSupported)
	}
	container := int32(b.iommu)
	if _, err := ioctl(b.group, ioctlGroupSetContainer, unsafe.Pointer(&container)); err != nil {
		return fmt.Errorf("IOMMU group %s: %w", group, err)
	}
	if err := ioctlInt(b.iommu, ioctlSetIOMMU, iommuType1v2); err != nil {
		return fmt.Errorf("set IOMMU type1v2: %w", err)
	}
	name, err := unix.BytePtrFromString(b.address)
	if err != nil {
		return err
	}
	if b.device, err = ioctl(b.group, ioctlGroupGetDevice, unsafe.Pointer(name)); err != nil {
		return fmt.Errorf("get device of IOMMU group %s: %w", group, err)
	}
	unix.CloseOnExec(b.device)
	return nil
}

func open(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// enable switches memory decoding and bus master on; without the latter no
// MSI-X message leaves the device.
func (b *Backend) enable() error {
	const offset, memory, busMaster = 4, 1 << 1, 1 << 2
	var err error
	if b.config, err = regionOf(b.device, regionConfig); err != nil {
		return err
	}
	var c [2]byte
	if _, err := unix.Pread(b.device, c[:], int64(b.config.offset)+offset); err != nil {
		return fmt.Errorf("read Command register: %w", err)
	}
	binary.LittleEndian.PutUint16(c[:], binary.LittleEndian.Uint16(c[:])|memory|busMaster)
	if _, err := unix.Pwrite(b.device, c[:], int64(b.config.offset)+offset); err != nil {
		return fmt.Errorf("write Command register: %w", err)
	}
	return nil
}

// connectVectors gives each MSI-X vector an eventfd of its own, and one to the
// kernel's notice that it wants the device back.
func (b *Backend) connectVectors() error {
	n, err := irqCount(b.device, irqMSIX)
	if err != nil {
		return err
	}
	if n > regs.VectorsMax {
		return fmt.Errorf("MSI-X vectors: expected at most %d, found %d", regs.VectorsMax, n)
	}
	for range n {
		fd, err := evfd.New()
		if err != nil {
			return err
		}
		b.vectors = append(b.vectors, fd)
	}
	if n > 0 {
		if err := setEventFDs(b.device, irqMSIX, b.vectors); err != nil {
			return fmt.Errorf("connect %d MSI-X vectors: %w", n, err)
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

// Address is the PCI address.
func (b *Backend) Address() string { return b.address }

// Driver is "vfio-pci".
func (b *Backend) Driver() string { return Driver }

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
func (b *Backend) Load(r regs.Register) (uint32, error) { return b.window.Load(r) }

// Store writes a register.
func (b *Backend) Store(r regs.Register, v uint32) error { return b.window.Store(r, v) }

// Sections is the shared memory.
func (b *Backend) Sections() *shmem.Sections { return &b.set.Sections }

// Interrupts has one eventfd per MSI-X vector. The kernel's device request ends
// them: until the device is closed, its removal, or the unbinding of the
// driver, waits.
func (b *Backend) Interrupts() evfd.Interrupts {
	return evfd.Interrupts{FDs: b.vectors, Gone: b.gone}
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
	if b.window != nil {
		errs = append(errs, b.window.Close())
	}
	if b.set != nil {
		errs = append(errs, b.set.Close())
	}
	if len(b.vectors) > 0 {
		errs = append(errs, setEventFDs(b.device, irqMSIX, nil))
	}
	fds := append([]int{b.device, b.group, b.iommu}, b.vectors...)
	if b.gone.Events != 0 {
		fds = append(fds, b.gone.FD)
	}
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	return errors.Join(errs...)
}
