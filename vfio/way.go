package vfio

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
)

// Way is a way to get a device from the kernel: they differ in how it is
// opened, and in nothing else (Linux, Documentation/driver-api/vfio.rst).
type Way struct {
	// Name is "iommufd" (the device's own file), "group" (that of its IOMMU
	// group, with a container), or "no-IOMMU" (a group without IOMMU behind
	// it).
	Name string
	// Files are the device files that are opened, all of which the process
	// needs rights to.
	Files []string

	// open gets the device's descriptor from those of the files.
	open func(files []int, address string) (int, error)
}

// The names of the ways.
const (
	WayIOMMUFD = "iommufd"
	WayGroup   = "group"
	WayNoIOMMU = "no-IOMMU"
)

// FindWay chooses the way to a device that is bound to vfio-pci: the device's
// own file where the kernel has it and the process may open it, else its group.
func FindWay(dev *sysfs.Device) (Way, error) { return findWay(dev, "/dev", mayOpen) }

// mayOpen asks for reading and writing.
func mayOpen(path string) error {
	return unix.Faccessat(unix.AT_FDCWD, path, unix.R_OK|unix.W_OK, unix.AT_EACCESS)
}

func findWay(dev *sysfs.Device, devices string, mayOpen func(path string) error) (Way, error) {
	vfio := filepath.Join(devices, "vfio")
	container := filepath.Join(vfio, "vfio")
	ways := []Way{
		{WayGroup, []string{container, filepath.Join(vfio, dev.IOMMUGroup)}, openGroup(iommuType1v2)},
		{WayNoIOMMU, []string{container, filepath.Join(vfio, "noiommu-"+dev.IOMMUGroup)}, openGroup(iommuNone)},
	}
	if dev.IOMMUGroup == "" {
		ways = nil
	}
	if found, _ := filepath.Glob(filepath.Join(dev.FullPath, "vfio-dev/vfio*")); len(found) == 1 {
		own := filepath.Join(vfio, "devices", filepath.Base(found[0]))
		ways = append([]Way{{WayIOMMUFD, []string{filepath.Join(devices, "iommu"), own}, openOwn}}, ways...)
	}
	for _, mayOpen := range []func(string) error{mayOpen, exists} {
		for _, w := range ways {
			if !slices.ContainsFunc(w.Files, func(f string) bool { return mayOpen(f) != nil }) {
				return w, nil // if it only exists, opening it tells what is missing
			}
		}
	}
	return Way{}, fmt.Errorf("%w: expected an IOMMU group, found none: this machine has no IOMMU, or it is off", fault.ErrNotSupported)
}

func exists(path string) error {
	_, err := os.Stat(path)
	return err
}

// openFiles opens the files. What it opened is returned with an error, too.
func (w Way) openFiles() (fds []int, err error) {
	for _, path := range w.Files {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			fds = append(fds, fd)
			continue
		}
		err = &os.PathError{Op: "open", Path: path, Err: err}
		switch {
		case errors.Is(err, unix.EBUSY):
			err = fmt.Errorf("%w: another process has %w", fault.ErrBusy, err)
		case errors.Is(err, unix.EPERM) && w.Name == WayNoIOMMU:
			err = &fault.Reason{Err: err, Remedy: "no-IOMMU mode needs the capability CAP_SYS_RAWIO, whatever the rights to the file: run as root"}
		}
		return fds, err
	}
	return fds, nil
}

// openOwn binds the device's own file to an iommufd. That is enough: an
// address space would be for DMA, which the device does not do.
func openOwn(files []int, _ string) (int, error) {
	bind := bindIOMMUFD{iommufd: int32(files[0])}
	bind.argsz = uint32(unsafe.Sizeof(bind))
	_, err := ioctl(files[1], ioctlBindIOMMUFD, unsafe.Pointer(&bind))
	switch {
	case errors.Is(err, unix.EBUSY):
		return -1, fmt.Errorf("%w: another process has the device, or its IOMMU group, open", fault.ErrBusy)
	case err != nil:
		return -1, fmt.Errorf("bind to iommufd: %w", unsafeInterrupts(err, "iommufd"))
	}
	return files[1], nil
}

// openGroup puts the group into a container and takes the device out of it.
func openGroup(iommu uintptr) func(files []int, address string) (int, error) {
	return func(files []int, address string) (int, error) {
		container, group := files[0], files[1]
		st := groupStatus{}
		st.argsz = uint32(unsafe.Sizeof(st))
		if _, err := ioctl(group, ioctlGroupStatus, unsafe.Pointer(&st)); err != nil {
			return -1, fmt.Errorf("IOMMU group: %w", err)
		}
		if st.flags&groupViable == 0 {
			return -1, fmt.Errorf("IOMMU group: %w: other devices of the group are bound to other drivers", fault.ErrNotSupported)
		}
		fd := int32(container)
		if _, err := ioctl(group, ioctlGroupSetContainer, unsafe.Pointer(&fd)); err != nil {
			return -1, fmt.Errorf("put the IOMMU group into a container: %w", err)
		}
		if err := ioctlInt(container, ioctlSetIOMMU, iommu); err != nil {
			return -1, fmt.Errorf("set the container's IOMMU type %d: %w", iommu, unsafeInterrupts(err, "vfio_iommu_type1"))
		}
		name, err := unix.BytePtrFromString(address)
		if err != nil {
			return -1, err
		}
		device, err := ioctl(group, ioctlGroupGetDevice, unsafe.Pointer(name))
		if err != nil {
			return -1, fmt.Errorf("get the device from its IOMMU group: %w", err)
		}
		unix.CloseOnExec(device)
		return device, nil
	}
}

// unsafeInterrupts explains the EPERM of an IOMMU that does not confine
// interrupts; module has the parameter that allows it.
func unsafeInterrupts(err error, module string) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	return &fault.Reason{
		Err:    fmt.Errorf("%w: the IOMMU does not remap interrupts", err),
		Remedy: "switch interrupt remapping on (QEMU: intel-iommu,intremap=on), or allow it: echo Y >/sys/module/" + module + "/parameters/allow_unsafe_interrupts",
	}
}
