// Package tap joins a link of virtual Ethernet to an interface of the kernel.
//
// Frames are read from the interface straight into the own output section, and
// written to it straight from the peer's: the kernel's copy is the only one.
// The interface follows the link's carrier, and the link the interface: when
// that is taken down so is the link, and when its MTU is changed so is the
// link's.
package tap
