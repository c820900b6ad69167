// Package vnet is virtual Ethernet between the two peers of a link: protocol
// type 0001h, byte for byte what the ivshmem-net driver of Linux and that of
// Zephyr speak.
//
//	l, err := vnet.Open(dev, vnet.Config{})
//	err = l.WaitCarrier(ctx, true)
//	err = l.Send(ctx, frame)            // one goroutine
//	n, err := l.Receive(ctx, p)         // another
//
// A frame is Ethernet from the destination address on, without FCS, with its
// checksums complete. Each peer has a queue in its own output section, and
// returns the other's frames in its own output section too, so that nobody
// writes what is another's.
//
// The peer is believed nothing. A descriptor that is wrong costs its frame. An
// index that is wrong, or a completion, is a [ViolationError] and resets the
// link, which comes back as soon as the peer behaves.
//
// [Link.UnsafeReserve] and [Link.UnsafePeek] give frames in the shared memory
// itself: between a file descriptor and the peer there is one copy then, the
// kernel's.
package vnet
