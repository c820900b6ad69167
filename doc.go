// Package ivshmem uses the ivshmem v2 PCI device (vendor 110Ah, device 4106h):
// memory that virtual machines on one host share, a state per peer that all
// others see, and doorbells that interrupt them.
//
//	dev, err := ivshmem.Open("") // the only device; or a PCI address, or a link's socket
//	…
//	dev.SetState(1)
//	err = dev.Ring(peer, 0)
//	err = dev.Wait(ctx, nil, func() bool { return somethingArrived() })
//
// [Open] serves guests (VFIO or plain sysfs) and ordinary host processes (the
// socket of `ivshctl serve`) alike; [New] takes any other [Backend].
//
// The contract is the "Inter-VM Shared Memory device, version 2"
// specification. Everything is little-endian; sizes are in bytes.
package ivshmem
