// Package shmem is the shared memory of an ivshmem v2 link: where its
// sections lie, and typed views that allow only what the specification allows
// a peer to do with each of them.
//
//	State Table        read-only, one 32-bit state per peer
//	R/W section        read and written by all peers
//	output section i   written by peer i, read-only for all others
//
// A [ReadOnly] view has no method that stores; the other peers' output
// sections come as such views only. All peers can change what a view shows at
// any time: load a field once into a local, check it, use the local.
//
// Values are little-endian. The package uses the standard library only and
// supports amd64 and arm64.
package shmem
