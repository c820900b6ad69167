package sysfs

import (
	"fmt"
	"path/filepath"
	"regexp"

	"github.com/ivshmem-go/ivshmem/regs"
)

// rule is the file of the udev rule that binds a device at boot. It comes
// before the rules that load drivers (80-drivers.rules of udev).
func (b *Binder) rule(d *Device) string {
	return filepath.Join(b.Rules, "70-ivshctl-"+d.Addr+".rules")
}

// bindRule binds a device when the kernel announces it. It depends on nothing
// but udev and a shell: a command of ours may lie where a user can write.
func bindRule(address, driver string) string {
	return fmt.Sprintf(`# Binds the ivshmem device %[1]s to %[2]s. Made by: ivshctl bind --persist; removed by: ivshctl unbind
ACTION=="add", SUBSYSTEM=="pci", KERNEL=="%[1]s", ATTR{vendor}=="0x%04[3]x", ATTR{device}=="0x%04[4]x", ATTR{driver_override}="%[2]s", RUN{builtin}+="kmod load %[2]s", RUN+="/bin/sh -c 'cd /sys%%p; case $$(readlink driver) in */%[2]s) exit;; ?*) echo %%k >driver/unbind;; esac; echo %%k >/sys/bus/pci/drivers_probe'"
`, address, driver, regs.VendorID, regs.DeviceID)
}

var groupName = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)

// GroupRules are udev rules that give a group access to the device files of
// all ivshmem devices, and to /dev/iommu, which alone gives nothing away.
// sysfs files are not in them: the kernel shows ordinary users the first 64
// bytes of configuration space only, so that they could not find the sections
// there.
func GroupRules(group string) (string, error) {
	if !groupName.MatchString(group) {
		return "", fmt.Errorf("group: expected a name of lower-case letters, digits, _ and -, found %q", group)
	}
	return fmt.Sprintf(`# Members of the group %[1]s may use ivshmem devices. Put this into /etc/udev/rules.d/71-ivshmem.rules
SUBSYSTEM=="uio", ATTRS{vendor}=="0x%04[2]x", ATTRS{device}=="0x%04[3]x", GROUP="%[1]s", MODE="0660"
SUBSYSTEM=="vfio", PROGRAM=="/bin/sh -c 'grep -qsx PCI_ID=%04[2]X:%04[3]X /sys/kernel/iommu_groups/%%k/devices/*/uevent'", GROUP="%[1]s", MODE="0660"
SUBSYSTEM=="vfio-dev", ATTRS{vendor}=="0x%04[2]x", ATTRS{device}=="0x%04[3]x", GROUP="%[1]s", MODE="0660"
SUBSYSTEM=="misc", KERNEL=="iommu", GROUP="%[1]s", MODE="0660"
`, group, regs.VendorID, regs.DeviceID), nil
}
