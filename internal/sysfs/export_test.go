package sysfs

import "github.com/ivshmem-go/ivshmem/regs"

// SetWrite puts a kernel behind the files of a recorded tree.
func (b *Binder) SetWrite(write func(path, data string) error) { b.write = write }

// WriteFile is what the binder of a machine writes with.
var WriteFile = writeFile

// Mapped reports whether a carrier's registers are mapped.
func Mapped(c *Carrier) bool {
	_, ok := c.registers.(*regs.Window)
	return ok
}
