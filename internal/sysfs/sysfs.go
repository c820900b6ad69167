// Package sysfs finds ivshmem v2 devices under /sys/bus/pci and reads what
// the kernel says of them. The root of sysfs is a parameter, so that a
// recorded tree serves as well.
package sysfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/u-root/u-root/pkg/pci"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/regs"
)

// FS is a mounted or recorded sysfs: the path of its root.
type FS string

// Root is the machine's own sysfs.
const Root FS = "/sys"

// Device is an ivshmem v2 device as sysfs shows it.
type Device struct {
	*pci.PCI
	// Driver is the name of the bound driver, "" if none.
	Driver string
	// IOMMUGroup is the number of the IOMMU group, "" if none.
	IOMMUGroup string
}

// Address is the pattern of a full PCI address: domain:bus:device.function.
var address = regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// FullAddress completes a PCI address without a domain, and reports whether
// s is a PCI address at all.
func FullAddress(s string) (string, bool) {
	s = strings.ToLower(s)
	if strings.Count(s, ":") == 1 {
		s = "0000:" + s
	}
	return s, address.MatchString(s)
}

// Devices lists the ivshmem v2 devices in the order of their addresses.
// Devices of other kinds are not looked at beyond their IDs, so that one that
// is broken or just going away does not spoil the scan; ivshmem devices that
// cannot be read come back in the error, beside the others.
func (f FS) Devices() ([]*Device, error) {
	bus := filepath.Join(string(f), "bus/pci/devices")
	entries, err := os.ReadDir(bus)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // no PCI bus, no devices
	}
	if err != nil {
		return nil, err
	}
	var devices []*Device
	var broken []error
	for _, e := range entries {
		dir := filepath.Join(bus, e.Name())
		if !isIvshmem(dir) {
			continue
		}
		d, err := f.open(dir)
		if err != nil {
			broken = append(broken, &fault.DeviceError{Device: e.Name(), Op: "read sysfs", Err: err})
			continue
		}
		devices = append(devices, d)
	}
	slices.SortFunc(devices, func(a, b *Device) int { return strings.Compare(a.Addr, b.Addr) })
	return devices, errors.Join(broken...)
}

// Device finds one device by its full PCI address.
func (f FS) Device(addr string) (*Device, error) {
	dir := filepath.Join(string(f), "bus/pci/devices", addr)
	if _, err := os.Stat(dir); err != nil {
		return nil, &fault.DeviceError{Device: addr, Op: "find", Err: fault.ErrNotFound, Remedy: "`ivshctl list` shows the devices of this machine"}
	}
	if !isIvshmem(dir) {
		return nil, &fault.DeviceError{Device: addr, Op: "find", Err: fmt.Errorf("%w: expected vendor and device 110a:4106, found %s:%s", fault.ErrNotFound, readID(dir, "vendor"), readID(dir, "device"))}
	}
	d, err := f.open(dir)
	if err != nil {
		return nil, &fault.DeviceError{Device: addr, Op: "read sysfs", Err: err}
	}
	return d, nil
}

func readID(dir, name string) string {
	b, _ := os.ReadFile(filepath.Join(dir, name))
	return strings.TrimPrefix(strings.TrimSpace(string(b)), "0x")
}

func isIvshmem(dir string) bool {
	return readID(dir, "vendor") == fmt.Sprintf("%04x", regs.VendorID) &&
		readID(dir, "device") == fmt.Sprintf("%04x", regs.DeviceID)
}

func (f FS) open(dir string) (*Device, error) {
	p, err := pci.OnePCI(dir)
	if err != nil {
		return nil, err
	}
	return &Device{PCI: p, Driver: linkName(dir, "driver"), IOMMUGroup: linkName(dir, "iommu_group")}, nil
}

func linkName(dir, name string) string {
	t, err := os.Readlink(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return filepath.Base(t)
}

// ReadConfig reads the configuration space: 256 bytes, or the 64 that Linux
// shows to processes without CAP_SYS_ADMIN.
func (d *Device) ReadConfig() ([]byte, error) {
	f, err := os.Open(filepath.Join(d.FullPath, "config"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, regs.ConfigSize))
	if err != nil {
		return nil, fmt.Errorf("read configuration space: %w", err)
	}
	return b, nil
}

// WriteConfig writes bytes of the configuration space.
func (d *Device) WriteConfig(offset int, b ...byte) error {
	f, err := os.OpenFile(filepath.Join(d.FullPath, "config"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(b, int64(offset))
	return err
}

// BAR returns address and size in bytes of a base address register; it is
// not ok for one that is absent or was not given an address.
func (d *Device) BAR(index int) (base, size uint64, ok bool) {
	for _, b := range d.BARS {
		if b.Index == index && b.Lim >= b.Base {
			return b.Base, b.Lim - b.Base + 1, true
		}
	}
	return 0, 0, false
}

// IORegisters reports whether the registers, BAR0, are in I/O space.
func (d *Device) IORegisters() bool {
	const ioSpace = 0x100 // IORESOURCE_IO (Linux, include/linux/ioport.h)
	for _, b := range d.BARS {
		if b.Index == 0 {
			return b.Attr&ioSpace != 0
		}
	}
	return false
}

// InterruptPin reports whether the device has INTx. It needs no privileges.
func (d *Device) InterruptPin() bool {
	const pin = 0x3d
	c, err := d.ReadConfig()
	return err == nil && len(c) > pin && c[pin] != 0 && c[pin] != 0xff
}

// Own makes the calling process the owner of the device, until release is
// called or the process ends. The lock is on the device's config file, so
// that it needs no place of its own and dies with its holder.
func (d *Device) Own() (release func() error, err error) {
	f, err := os.Open(filepath.Join(d.FullPath, "config"))
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		f.Close()
		who := "another process"
		if o, ok := d.Owner(); ok {
			who = o.String()
		}
		return nil, fmt.Errorf("%w: owned by %s", fault.ErrBusy, who)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f.Close, nil
}

// Owner is the process that owns a device.
type Owner struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
}

func (o Owner) String() string {
	if o.Command == "" {
		return fmt.Sprintf("process %d", o.PID)
	}
	return fmt.Sprintf("process %d (%s)", o.PID, o.Command)
}

func newOwner(pid int) Owner {
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return Owner{PID: pid, Command: strings.TrimSpace(string(comm))}
}

// Owner finds out which process owns the device; it is not ok if none does.
func (d *Device) Owner() (o Owner, ok bool) {
	var st unix.Stat_t
	if unix.Stat(filepath.Join(d.FullPath, "config"), &st) != nil {
		return Owner{}, false
	}
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return Owner{}, false
	}
	defer locks.Close()
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for s := bufio.NewScanner(locks); s.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 1234 00:15:4321 0 EOF
		f := strings.Fields(s.Text())
		if len(f) >= 6 && f[1] == "FLOCK" && f[5] == file {
			pid, _ := strconv.Atoi(f[4])
			return newOwner(pid), true
		}
	}
	return Owner{}, false
}
