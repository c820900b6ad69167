package sysfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fault"
)

const vfioPCI = "vfio-pci"

// whence says where drivers come from that are not there.
var whence = map[string]string{
	vfioPCI:           "this kernel has no VFIO for PCI devices: use one with CONFIG_VFIO_PCI",
	"uio_ivshmem":     "build and install that kernel module first, from kmod/ of this project: it is not part of Linux",
	"igb_uio":         "build and install that kernel module first: Debian has it in dpdk-kmods-dkms",
	"uio_pci_generic": "this kernel lacks it: use one with CONFIG_UIO_PCI_GENERIC",
}

// absent is the error for a driver that is not registered and cannot be.
func absent(driver string, why error) error {
	remedy := whence[driver]
	if remedy == "" {
		remedy = "check the name, or install the module; `ls /sys/bus/pci/drivers` shows what is there"
	}
	return &fault.Reason{Err: fmt.Errorf("expected kernel driver %s, or a module for it, found neither: %w", driver, why), Remedy: remedy}
}

// ready checks before the device is touched what would fail afterwards.
func (c *Change) ready() error {
	if !c.b.has(c.Driver) {
		return absent(c.Driver, errors.New("no PCI driver has that name"))
	}
	if c.Driver != vfioPCI || linkName(c.Device.FullPath, "iommu_group") != "" {
		return nil
	}
	// Where there is an IOMMU the device may get its group with its first
	// driver (arm64); where there is none the probe need not be tried.
	iommus, _ := os.ReadDir(filepath.Join(string(c.b.FS), "class/iommu"))
	mode, _ := os.ReadFile(filepath.Join(string(c.b.FS), "module/vfio/parameters/enable_unsafe_noiommu_mode"))
	if len(iommus) > 0 || strings.TrimSpace(string(mode)) == "Y" {
		return nil
	}
	return c.b.noGroup()
}

// noGroup is the error for a device that vfio-pci cannot have.
func (b *Binder) noGroup() error {
	r := &fault.Reason{
		Err:    fmt.Errorf("%w: %s expects an IOMMU group, found none: this machine has no IOMMU, or it is off", fault.ErrNotSupported, vfioPCI),
		Remedy: "switch the IOMMU on (firmware set-up, intel_iommu=on; in QEMU a device intel-iommu or virtio-iommu-pci in front of this one), or use the device without driver, polling",
	}
	if b.virtioIOMMU() {
		r.Err = fmt.Errorf("%w: %s expects an IOMMU group, found none: the driver of this machine's virtio-iommu is not loaded", fault.ErrNotSupported, vfioPCI)
		r.Remedy = "`modprobe virtio-iommu` first"
	}
	return r
}

// virtioIOMMU reports whether the machine has an IOMMU that waits for its
// driver.
func (b *Binder) virtioIOMMU() bool {
	found, _ := filepath.Glob(b.path("devices/*/vendor"))
	for _, f := range found {
		dir := filepath.Dir(f)
		if readID(dir, "vendor") == "1af4" && readID(dir, "device") == "1057" {
			return !exists(filepath.Join(string(b.FS), "bus/virtio/drivers/virtio_iommu"))
		}
	}
	return false
}

// probed checks what came of the probe, whose write ended with err.
func (c *Change) probed(err error) error {
	now := linkName(c.Device.FullPath, "driver")
	switch {
	case now == c.Driver:
		return nil
	case errors.Is(err, unix.EINVAL):
		// What the kernel answers if it put the probe off.
		remedy := "load that driver first, then bind again"
		if c.b.virtioIOMMU() {
			remedy = "`modprobe virtio-iommu` first, then bind again"
		}
		return &fault.Reason{Err: fmt.Errorf("the kernel put the probe off (%w): something that the device needs, as a rule its IOMMU, has no driver yet", err), Remedy: remedy}
	case err != nil:
		return err
	case c.Driver == vfioPCI && now == "" && linkName(c.Device.FullPath, "iommu_group") == "":
		return c.b.noGroup()
	case now != "":
		return fmt.Errorf("expected the device at driver %s, found it at %s: somebody else is binding it", c.Driver, now)
	}
	return &fault.Reason{Err: fmt.Errorf("driver %s refused the device", c.Driver),
		Remedy: "the kernel's log has the reason: `dmesg | grep " + c.Device.Addr + "`"}
}
