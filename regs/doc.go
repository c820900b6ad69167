// Package regs holds the facts of the ivshmem v2 PCI device: identity,
// registers, protocol numbers, vendor capability, and the only code that
// touches a mapped register region.
//
// The contract is the "Inter-VM Shared Memory device, version 2" specification
// (Jailhouse: Documentation/ivshmem-v2-specification.md; QEMU's 2020 patch
// series carries an earlier draft). Everything is little-endian.
//
// The package uses the standard library only; every other room may import it.
package regs
