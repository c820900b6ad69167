// Package ivshsock is the server half of the ivshmem2-server protocol: the
// socket that QEMUs with the ivshmem2 device of January 2020 connect to, and
// other programs that are written for it. Its clients are peers of a link like
// all others: they get the shared memory and the doorbell eventfds of
// everybody, and carry out the device themselves.
//
// The contract is the protocol page "ivshmem2-server"; what it lists as
// weaknesses of the example server is not to be found here.
package ivshsock
