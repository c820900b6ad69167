// Package vfiouser is the vfio-user wire: message codec, server half and
// client half. It knows nothing of ivshmem: a [Device] says what the server
// half presents, and the [Client] sees whatever a server presents.
//
// One connection serves one device. [Serve] runs the request loop of one
// connection until the client goes away or violates the framing; [Dial] opens
// the client's end. All integers on the wire are little-endian here (the
// protocol says host byte order; every supported host is little-endian).
//
// The protocol is QEMU's docs/interop/vfio-user.rst; limits and answers follow
// what libvfio-user and QEMU 10.1 to 11.1 accept.
package vfiouser
