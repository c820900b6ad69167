package regs

// load32 is one plain 32-bit load, followed by a load barrier where the
// architecture needs one.
func load32(address uintptr) uint32

// store32 is one plain 32-bit store from a general register, preceded by a
// store barrier.
func store32(address uintptr, v uint32)
