// Package vm boots stock Linux guests in a stock QEMU and runs commands in
// them. A guest is a Debian kernel with an initramfs that holds an init
// program, busybox, the project's binaries and whatever files and packages
// its Config names; it needs no privileges, no network and no disk image.
//
//	g, err := vm.Start(ctx, vm.Config{Devices: []vm.Device{{Socket: path}}, Driver: "vfio-pci"})
//	defer g.Close()
//	r, err := g.Run(ctx, "ivshctl", "info")
//
// Guests run under software emulation unless /dev/kvm is found to work. No
// QEMU outlives the process that started it, however that ends.
package vm
