package vfio

import "github.com/ivshmem-go/ivshmem/regs"

// registers is the register region, BAR0.
type registers interface {
	Load(regs.Register) (uint32, error)
	Store(regs.Register, uint32) error
	Close() error
}

// openRegisters maps the register region. One in I/O space cannot be mapped:
// the kernel carries out each access.
func openRegisters(device int) (registers, error) {
	r, err := regionOf(device, regionBAR0)
	if err != nil {
		return nil, err
	}
	size := int(min(r.size, regs.RegionSize))
	if r.flags&regionFlagMmap == 0 {
		f, err := regs.OpenFile(uintptr(device), int64(r.offset), size)
		if err != nil {
			return nil, err // not a nil *File in an interface
		}
		return f, nil
	}
	w, err := regs.MapWindow(uintptr(device), int64(r.offset), size)
	if err != nil {
		return nil, err
	}
	return w, nil
}
