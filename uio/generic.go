package uio

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/regs"
)

// The drivers that know nothing of the device, as their UIO devices are named.
const (
	driverIGB     = "igb_uio"
	driverGeneric = "uio_pci_generic"
)

// Generic is a device that is bound to a UIO driver which knows nothing of it,
// and delivers one interrupt: igb_uio, MSI-X vector 0 (what rings another one
// is lost) or INTx; uio_pci_generic, INTx. Registers and memory come from the
// resource files in sysfs, whose rights are root's.
//
// For both drivers INTx works only where the device sets Interrupt Status,
// which the specification forbids: `ivshctl serve --intx` does.
type Generic struct {
	*sysfs.Carrier
	driver string
	dir    string // of the PCI device in sysfs
	fd     int
	config *os.File // of uio_pci_generic
	rearm  func() error
	close  sync.Once
}

// IsGeneric reports whether a device is bound to igb_uio, or to uio_pci_generic
// with an interrupt; without one that driver is of no use.
func IsGeneric(dev *sysfs.Device) bool {
	n, err := findNode(dev.FullPath)
	return err == nil && (n.Name == driverIGB || n.Name == driverGeneric && dev.InterruptPin())
}

// OpenGeneric opens the device with a full PCI address. It has to be bound to
// one of the drivers, which have its interrupt on as long as it is open.
func OpenGeneric(address string) (*Generic, error) {
	dev, err := sysfs.Root.Device(address)
	if err != nil {
		return nil, err
	}
	b := &Generic{}
	fail := func(err error) (*Generic, error) {
		return nil, &fault.DeviceError{Device: dev.Addr, Op: "open through UIO", Err: err}
	}
	node, err := findNode(dev.FullPath)
	if err != nil {
		return fail(err)
	}
	b.driver, b.dir = node.Name, dev.FullPath
	// First the file: opening it enables bus master, and the interrupt.
	if b.fd, err = node.open(); err != nil {
		return fail(err)
	}
	if b.Carrier, err = dev.Open(); err != nil {
		unix.Close(b.fd)
		return nil, err
	}
	if err := b.findRearm(); err != nil {
		return nil, errors.Join(&fault.DeviceError{Device: dev.Addr, Op: "open through UIO", Err: err}, b.Close())
	}
	return b, nil
}

// findRearm finds out how to enable INTx again, which the driver disables in
// Command at each interrupt. Nothing is to be done with MSI-X.
func (b *Generic) findRearm() error {
	config, err := b.Config()
	if err != nil {
		return err
	}
	switch _, err := regs.ParseMSIX(config); {
	case err == nil:
		return nil
	case !errors.Is(err, regs.ErrNoCapability):
		return err
	}
	if b.driver == driverIGB {
		b.rearm = b.unmask
		return nil
	}
	const at, interruptDisable = 5, 1 << 2 // the upper byte of Command
	enabled := []byte{config[at] &^ interruptDisable}
	// Opening it each time would take longer than all the rest.
	if b.config, err = os.OpenFile(filepath.Join(b.dir, "config"), os.O_WRONLY, 0); err != nil {
		return err
	}
	b.rearm = func() error {
		_, err := b.config.WriteAt(enabled, at)
		return err
	}
	return nil
}

// unmask has the driver enable INTx.
func (b *Generic) unmask() error {
	_, err := unix.Write(b.fd, binary.NativeEndian.AppendUint32(nil, 1))
	return err
}

// Driver is the name of the kernel driver.
func (b *Generic) Driver() string { return b.driver }

// Interrupts is the UIO file, for vector 0.
func (b *Generic) Interrupts() evfd.Interrupts {
	return evfd.Interrupts{FDs: []int{b.fd}, UIO: true, Rearm: b.rearm}
}

// Close unmaps the device and closes the file.
func (b *Generic) Close() error {
	err := b.Carrier.Close()
	b.close.Do(func() {
		err = errors.Join(err, unix.Close(b.fd))
		if b.config != nil {
			err = errors.Join(err, b.config.Close())
		}
	})
	return err
}
