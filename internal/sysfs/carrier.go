package sysfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Carrier is a back end that needs no driver: it maps the device's resource
// files. It has no interrupts.
type Carrier struct {
	dev       *Device
	registers registers
	set       *mem.Set
	disable   bool
	closed    atomic.Bool
}

// registers is a register region: mapped, or a file.
type registers interface {
	Load(regs.Register) (uint32, error)
	Store(regs.Register, uint32) error
	Close() error
}

// Open maps the device. It needs root, or access rights to the resource
// files. A device that no driver is bound to is enabled as long as the
// carrier is open.
func (d *Device) Open() (*Carrier, error) {
	c := &Carrier{dev: d}
	if err := c.open(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Carrier) open() error {
	fail := func(op string, err error) error {
		e := &fault.DeviceError{Device: c.dev.Addr, Op: op, Err: err}
		if errors.Is(err, os.ErrPermission) {
			e.Remedy = "run as root, or `ivshctl bind` it and give users access by the rules that `ivshctl udev` prints"
		}
		return e
	}
	if c.dev.Driver == "" {
		// Without a driver nobody switched memory decoding on.
		if err := c.enable("1"); err != nil {
			return fail("enable", err)
		}
		c.disable = true
	}
	var err error
	if c.registers, err = c.dev.openRegisters(); err != nil {
		return fail("open registers", err)
	}
	config, err := c.Config()
	if err != nil {
		return fail("read configuration space", err)
	}
	layout, own, err := mem.Geometry(config, c.registers.Load)
	if err != nil {
		return fail("read geometry", err)
	}
	_, size, ok := c.dev.BAR(2)
	if !ok {
		return &fault.DeviceError{Device: c.dev.Addr, Op: "map shared memory",
			Err:    fmt.Errorf("%w: the device has no BAR2, its shared memory can be reached through a kernel driver only", fault.ErrNotSupported),
			Remedy: "run `ivshctl bind --driver uio_ivshmem`"}
	}
	if err := layout.CheckRegion(size); err != nil {
		return fail("map shared memory", err)
	}
	f, err := os.OpenFile(filepath.Join(c.dev.FullPath, "resource2"), os.O_RDWR, 0)
	if err != nil {
		return fail("map shared memory", err)
	}
	defer f.Close()
	if c.set, err = mem.MapSections(int(f.Fd()), layout, mem.Region(0, layout, own)); err != nil {
		return fail("map shared memory", err)
	}
	return nil
}

func (d *Device) openRegisters() (registers, error) {
	_, size, ok := d.BAR(0)
	if !ok {
		return nil, errors.New("expected BAR0 with an address, found none")
	}
	f, err := os.OpenFile(filepath.Join(d.FullPath, "resource0"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	length := int(min(size, regs.RegionSize))
	var r registers
	if d.IORegisters() {
		r, err = regs.OpenFile(f.Fd(), 0, length)
	} else {
		r, err = regs.MapWindow(f.Fd(), 0, length)
	}
	if err != nil {
		return nil, err // without r, whose nil has a type
	}
	return r, nil
}

func (c *Carrier) enable(v string) error {
	return os.WriteFile(filepath.Join(c.dev.FullPath, "enable"), []byte(v), 0)
}

// Address is the PCI address.
func (c *Carrier) Address() string { return c.dev.Addr }

// Driver is "sysfs".
func (c *Carrier) Driver() string { return "sysfs" }

// Config reads the configuration space.
func (c *Carrier) Config() ([]byte, error) {
	if c.closed.Load() {
		return nil, os.ErrClosed
	}
	return c.dev.ReadConfig()
}

// WriteConfig writes one byte of the configuration space.
func (c *Carrier) WriteConfig(offset int, v uint8) error {
	if c.closed.Load() {
		return os.ErrClosed
	}
	return c.dev.WriteConfig(offset, v)
}

// Load reads a register.
func (c *Carrier) Load(r regs.Register) (uint32, error) { return c.registers.Load(r) }

// Store writes a register.
func (c *Carrier) Store(r regs.Register, v uint32) error { return c.registers.Store(r, v) }

// Sections is the shared memory.
func (c *Carrier) Sections() *shmem.Sections { return &c.set.Sections }

// Interrupts says that there are none.
func (c *Carrier) Interrupts() evfd.Interrupts { return evfd.Interrupts{} }

// Close unmaps the device.
func (c *Carrier) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	var errs []error
	if c.registers != nil {
		errs = append(errs, c.registers.Close())
	}
	if c.set != nil {
		errs = append(errs, c.set.Close())
	}
	if c.disable {
		errs = append(errs, c.enable("0"))
	}
	return errors.Join(errs...)
}
