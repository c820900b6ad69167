// Package pcidev presents one peer of a link as a complete PCI function over
// vfio-user: configuration space, BAR0 with the registers, BAR1 with MSI-X,
// 64-bit BAR2 with the shared memory. QEMU's vfio-user-pci gives the function
// to a guest; a host process uses it through the same wire.
//
// The contract is the "Inter-VM Shared Memory device, version 2"
// specification and the vfio-user specification.
package pcidev
