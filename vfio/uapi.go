package vfio

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Facts of the kernel's VFIO interface (Linux, include/uapi/linux/vfio.h).
// The request numbers have no size encoded: _IO(';', 100 + n).
const (
	ioctlSetIOMMU          = 0x3b66
	ioctlGroupStatus       = 0x3b67
	ioctlGroupSetContainer = 0x3b68
	ioctlGroupGetDevice    = 0x3b6a
	ioctlRegionInfo        = 0x3b6c
	ioctlIRQInfo           = 0x3b6d
	ioctlSetIRQs           = 0x3b6e
	ioctlBindIOMMUFD       = 0x3b76

	iommuType1v2 = 3
	iommuNone    = 8 // no-IOMMU mode

	groupViable = 1

	irqSetDataNone    = 1 << 0
	irqSetDataEventFD = 1 << 2
	irqSetUnmask      = 1 << 4
	irqSetTrigger     = 1 << 5

	regionFlagMmap = 1 << 2

	regionBAR0   = 0
	regionBAR2   = 2
	regionConfig = 7
	irqINTx      = 0
	irqMSIX      = 2
	irqRequest   = 4 // the kernel asks for the device back
)

type groupStatus struct{ argsz, flags uint32 }

type bindIOMMUFD struct {
	argsz, flags uint32
	iommufd      int32
	deviceID     uint32 // out
}

type regionInfo struct {
	argsz, flags, index, capOffset uint32
	size, offset                   uint64
}

type irqInfo struct{ argsz, flags, index, count uint32 }

type irqSet struct{ argsz, flags, index, start, count uint32 }

// ioctl returns -1 with an error: where the result is a descriptor, 0 is one.
func ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		}
		return -1, errno
	}
}

func ioctlInt(fd int, request, arg uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg); errno != 0 {
		return errno
	}
	return nil
}

func regionOf(device int, index uint32) (regionInfo, error) {
	i := regionInfo{index: index}
	i.argsz = uint32(unsafe.Sizeof(i))
	if _, err := ioctl(device, ioctlRegionInfo, unsafe.Pointer(&i)); err != nil {
		return i, fmt.Errorf("VFIO region %d: %w", index, err)
	}
	return i, nil
}

// setEventFDs connects sub-indexes 0 … of an interrupt index to eventfds; none
// disconnects all.
func setEventFDs(device int, index uint32, fds []int) error {
	const head = unsafe.Sizeof(irqSet{})
	b := make([]uint32, int(head)/4+len(fds))
	s := (*irqSet)(unsafe.Pointer(&b[0]))
	*s = irqSet{argsz: uint32(4 * len(b)), flags: irqSetDataEventFD | irqSetTrigger, index: index, count: uint32(len(fds))}
	if len(fds) == 0 {
		s.flags = irqSetDataNone | irqSetTrigger
	}
	for i, fd := range fds {
		b[int(head)/4+i] = uint32(fd)
	}
	_, err := ioctl(device, ioctlSetIRQs, unsafe.Pointer(s))
	return err
}

// unmask lets the next INTx through: the kernel masks it with each.
func unmask(device int) error {
	s := irqSet{flags: irqSetDataNone | irqSetUnmask, index: irqINTx, count: 1}
	s.argsz = uint32(unsafe.Sizeof(s))
	if _, err := ioctl(device, ioctlSetIRQs, unsafe.Pointer(&s)); err != nil {
		return fmt.Errorf("unmask INTx: %w", err)
	}
	return nil
}

// irqCount is the number of sub-indexes of an interrupt index.
func irqCount(device int, index uint32) (uint32, error) {
	i := irqInfo{index: index}
	i.argsz = uint32(unsafe.Sizeof(i))
	if _, err := ioctl(device, ioctlIRQInfo, unsafe.Pointer(&i)); err != nil {
		return 0, fmt.Errorf("VFIO interrupt %d: %w", index, err)
	}
	return i.count, nil
}
