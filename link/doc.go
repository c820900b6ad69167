// Package link is the device model of an ivshmem v2 link on the host: peers,
// states, Interrupt Control, one-shot mode, doorbells, reset, and the shared
// memory. How a peer reaches it (a PCI function for QEMU, a socket for a
// process) is the business of the packages below it.
//
// It follows the "Inter-VM Shared Memory device, version 2" specification. A
// link's whole state is one value, [State], which changes only inside calls
// of [Peer] methods; what peers can write, the shared memory, is never read
// back. The exception are peers that are the device themselves
// ([Link.AttachExternal]): their state is what they wrote to their own entry of
// the State Table.
package link
