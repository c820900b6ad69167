package uio

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
)

// IGB is a device that is bound to igb_uio. That driver enables MSI-X vector 0
// only: what rings another one is lost. Registers and memory come from the
// resource files in sysfs, whose rights are root's.
type IGB struct {
	*sysfs.Carrier
	fd    int
	close sync.Once
}

// OpenIGB opens the device with a full PCI address. It has to be bound to
// igb_uio, which has MSI-X on as long as the device is open.
func OpenIGB(address string) (*IGB, error) {
	dev, err := sysfs.Root.Device(address)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*IGB, error) {
		return nil, &fault.DeviceError{Device: dev.Addr, Op: "open through igb_uio", Err: err}
	}
	node, err := findNode(dev.FullPath)
	if err != nil {
		return fail(err)
	}
	// First the file: opening it enables bus master and the interrupt.
	fd, err := node.open()
	if err != nil {
		return fail(err)
	}
	c, err := dev.Open()
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &IGB{Carrier: c, fd: fd}, nil
}

// IsIGB reports whether a device is bound to igb_uio.
func IsIGB(dev *sysfs.Device) bool {
	n, err := findNode(dev.FullPath)
	return err == nil && n.Name == "igb_uio"
}

// Driver is "igb_uio".
func (b *IGB) Driver() string { return "igb_uio" }

// Interrupts is the UIO file, for vector 0.
func (b *IGB) Interrupts() evfd.Interrupts {
	return evfd.Interrupts{FDs: []int{b.fd}, UIO: true}
}

// Close unmaps the device and closes the file.
func (b *IGB) Close() error {
	err := b.Carrier.Close()
	b.close.Do(func() { err = errors.Join(err, unix.Close(b.fd)) })
	return err
}
