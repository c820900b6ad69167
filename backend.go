package ivshmem

import (
	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Backend carries a device: a kernel driver's file, sysfs, a link's socket.
// It knows no protocol and decides no policy. Its methods are safe for
// concurrent use; after Close they fail with [os.ErrClosed].
//
// A back end that is given to [New] is set up: memory decoding and bus master
// are on, all vectors are connected.
type Backend interface {
	// Address is the name that the user knows the device by.
	Address() string
	// Driver names the back end: "vfio-pci", "sysfs", "vfio-user", …
	Driver() string
	// Config reads the PCI configuration space, as much of it as the back
	// end may see.
	Config() ([]byte, error)
	// WriteConfig writes one byte of the configuration space.
	WriteConfig(offset int, v uint8) error
	// Load reads a register.
	Load(regs.Register) (uint32, error)
	// Store writes a register. What was stored to shared memory before is
	// visible to a peer that the write interrupts.
	Store(regs.Register, uint32) error
	// Sections is the shared memory.
	Sections() *shmem.Sections
	// Interrupts says how interrupts arrive.
	Interrupts() Interrupts
	// Close gives everything back. It writes no register.
	Close() error
}

// Interrupts is how a back end's interrupts reach the process.
type Interrupts = evfd.Interrupts

// Sleep is a way to sleep until an interrupt.
type Sleep = evfd.Sleep

// The ways to sleep.
const (
	// SleepThread blocks the calling thread in the kernel: the fastest
	// wake-up. The default.
	SleepThread = evfd.SleepThread
	// SleepPoller parks the goroutine in Go's poller: slower to wake, and no
	// thread is held.
	SleepPoller = evfd.SleepPoller
)
