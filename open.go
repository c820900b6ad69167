package ivshmem

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/peer"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/uio"
	"github.com/ivshmem-go/ivshmem/vfio"
)

// Found is a device that Discover found on the PCI bus.
type Found struct {
	Address  string // PCI address: domain:bus:device.function
	Protocol regs.Protocol
	Driver   string // bound kernel driver, "" if none
}

// Discover lists the ivshmem v2 devices of this machine's PCI bus, in the
// order of their addresses. It needs no privileges. Devices that cannot be
// read are in the error, beside the others.
func Discover() ([]Found, error) {
	devices, err := sysfs.Root.Devices()
	found := make([]Found, 0, len(devices))
	for _, d := range devices {
		f, ferr := foundOf(d)
		if ferr != nil {
			err = errors.Join(err, ferr)
			continue
		}
		found = append(found, f)
	}
	return found, err
}

func foundOf(d *sysfs.Device) (Found, error) {
	p, err := regs.ProtocolOf(d.Class)
	if err != nil {
		return Found{}, &DeviceError{Device: d.Addr, Op: "read class", Err: err}
	}
	return Found{Address: d.Addr, Protocol: p, Driver: d.Driver}, nil
}

// Find finds a PCI device without opening it. Addresses are those of [Open],
// sockets excepted. It needs no privileges.
func Find(address string) (Found, error) {
	d, err := find(address)
	if err != nil {
		return Found{}, err
	}
	return foundOf(d)
}

// Event is something that happened to a device of this machine: it appeared
// ("add") or disappeared ("remove"), a driver was bound or unbound.
type Event = sysfs.Event

// Watch reports events of the devices on this machine's PCI bus until the
// context ends, or report returns an error. Ready is called once, when no
// event that comes from then on can be missed: the place to call [Discover].
func Watch(ctx context.Context, ready func() error, report func(Event) error) error {
	return sysfs.Watch(ctx, ready, report)
}

// Open opens a device: by PCI address ("0000:00:04.0", "00:04.0"), as UIO device
// ("uio0"), by the path of a link's socket (anything else with a slash), or,
// with an empty address, the only device of this machine.
//
// A PCI device is reached through the driver it is bound to: vfio-pci, with an
// interrupt for each vector; uio_ivshmem, with one for all; igb_uio, with
// vector 0 only; uio_pci_generic, if the device has INTx; otherwise plain
// sysfs, which can only be polled. An owner
// locks it.
func Open(address string, opts ...Option) (*Device, error) {
	if isSocket(address) {
		b, err := peer.Dial(address)
		if err != nil {
			return nil, err
		}
		return New(b, opts...)
	}
	dev, err := find(address)
	if err != nil {
		return nil, err
	}
	return openPCI(dev, opts)
}

// isSocket reports whether an address is that of a link's socket.
func isSocket(address string) bool {
	_, device := uio.ParseName(address)
	return strings.Contains(address, "/") && !device
}

// find looks a PCI device up; an empty address is the only one there is.
func find(address string) (*sysfs.Device, error) {
	if address == "" {
		found, err := sysfs.Root.Devices()
		if len(found) == 0 {
			return nil, errors.Join(err, fmt.Errorf("%w: expected an ivshmem v2 device (110a:4106) on the PCI bus, found none: give the path of a link's socket, or start this machine with the device", ErrNotFound))
		}
		if len(found) > 1 {
			return nil, fmt.Errorf("%d devices found: choose one by its address, `ivshctl list` shows them", len(found))
		}
		return found[0], nil
	}
	if n, ok := uio.ParseName(address); ok {
		var err error
		if address, err = uio.AddressOf(string(sysfs.Root), n); err != nil {
			return nil, fmt.Errorf("%w: UIO device %d: %w", ErrNotFound, n, err)
		}
	}
	full, ok := sysfs.FullAddress(address)
	if !ok {
		return nil, fmt.Errorf("device %q: expected a PCI address such as 0000:00:04.0, or the path of a socket with a slash in it", address)
	}
	return sysfs.Root.Device(full)
}

func openPCI(dev *sysfs.Device, opts []Option) (*Device, error) {
	var o options
	for _, f := range opts {
		f(&o)
	}
	release := func() error { return nil }
	if !o.observer {
		var err error
		if release, err = dev.Own(); err != nil {
			return nil, &fault.DeviceError{Device: dev.Addr, Op: "open", Err: err}
		}
	}
	var b Backend
	var err error
	switch {
	case dev.Driver == vfio.Driver:
		b, err = openVFIO(dev, o.observer)
	case uio.Carries(dev):
		b, err = openUIO(dev, o.observer)
	case uio.IsGeneric(dev) && !o.observer:
		b, err = uio.OpenGeneric(dev.Addr)
	default:
		b, err = dev.Open()
	}
	if err != nil {
		release()
		return nil, err
	}
	return New(b, append(slices.Clip(opts), func(o *options) { o.release = release })...)
}

// openUIO opens a device through uio_ivshmem. Closing its file sets State 0,
// so an observer must not have opened it beside an owner.
func openUIO(dev *sysfs.Device, observer bool) (Backend, error) {
	if o, owned := dev.Owner(); owned && observer {
		return nil, &DeviceError{Device: dev.Addr, Op: "observe",
			Err:    fmt.Errorf("%w: %v owns the device, and opening its UIO file besides would set its State to 0", ErrBusy, o),
			Remedy: "ask that process"}
	}
	return uio.Open(dev.Addr)
}

// openVFIO opens a device through vfio-pci. The kernel lets one process have
// it at a time, so an observer gets it only while there is no owner.
func openVFIO(dev *sysfs.Device, observer bool) (Backend, error) {
	if o, owned := dev.Owner(); owned && observer {
		return nil, &DeviceError{Device: dev.Addr, Op: "observe",
			Err:    fmt.Errorf("%w: %v owns the device, and vfio-pci lets nobody else see its registers and memory", ErrBusy, o),
			Remedy: "ask that process"}
	}
	// An observer has the device for a moment only: it is worth waiting for.
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		b, err := vfio.Open(dev.Addr)
		if !errors.Is(err, ErrBusy) || time.Since(start) > observerPatience {
			return b, err
		}
	}
}

// observerPatience is how long a device that another process has open through
// vfio-pci without owning it is tried again.
const observerPatience = 2 * time.Second
