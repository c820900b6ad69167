package ivshmem

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Device is a handle of a device. An owner writes State and Interrupt
// Control and waits; an observer looks, and may ring. It is safe for
// concurrent use.
type Device struct {
	back     Backend
	cap      regs.VendorCap
	protocol regs.Protocol
	id       uint32
	peers    uint32
	vectors  int
	strict   bool
	observer bool
	release  func() error // gives the ownership back
	wait     waiters
	hold     atomic.Bool

	mu     sync.Mutex
	closed bool
}

// Option changes what Open and New do.
type Option func(*options)

type options struct {
	observer bool
	sleep    Sleep
	oneShot  bool
	release  func() error
}

// AsObserver opens the device beside its owner: State and Interrupt Control
// are not written, neither now nor later.
func AsObserver() Option { return func(o *options) { o.observer = true } }

// WithSleep selects how Wait sleeps.
func WithSleep(s Sleep) Option { return func(o *options) { o.sleep = s } }

// WithOneShot turns one-shot interrupt mode on (specification, "Privileged
// Control"): after each interrupt the device stays silent until Wait arms it
// again. Back ends whose vectors share one counter always use it.
func WithOneShot() Option { return func(o *options) { o.oneShot = true } }

// New makes a device handle of a back end, and owns it unless told to
// observe: it writes State 0, sets one-shot mode on or off, and enables
// interrupts. The back end is closed with the device, also if New fails.
func New(b Backend, opts ...Option) (*Device, error) {
	var o options
	for _, f := range opts {
		f(&o)
	}
	d := &Device{back: b, observer: o.observer, release: o.release, wait: waiters{kick: -1}}
	err := d.identify()
	if err == nil && !d.observer {
		err = d.setOneShot(o.oneShot || b.Interrupts().OneShot())
	}
	if err == nil {
		err = d.wait.init(d, o)
	}
	if err == nil && !d.observer {
		err = d.start()
	}
	if err != nil {
		d.wait.close(err)
		err = errors.Join(&DeviceError{Device: b.Address(), Op: "open", Err: err}, b.Close())
		if d.release != nil {
			d.release()
		}
		return nil, err
	}
	return d, nil
}

// identify reads what is constant, and checks that it fits together.
func (d *Device) identify() error {
	config, err := d.back.Config()
	if err != nil {
		return err
	}
	if len(config) < regs.ConfigUnprivileged {
		return fmt.Errorf("%w: expected at least %d bytes, found %d", ErrConfigShort, regs.ConfigUnprivileged, len(config))
	}
	if d.protocol, err = regs.ConfigProtocol(config); err != nil {
		return err
	}
	d.strict = regs.ConfigStrict(config)
	if err := d.capabilities(config); err != nil {
		return err
	}
	if d.id, err = d.load(regs.ID); err != nil {
		return err
	}
	if d.peers, err = d.load(regs.MaxPeers); err != nil {
		return err
	}
	if d.id >= d.peers {
		return fmt.Errorf("register ID: expected a value below Maximum Peers, %d, found %d", d.peers, d.id)
	}
	if l := d.back.Sections().Layout; l.Peers != d.peers {
		return fmt.Errorf("register Maximum Peers: expected %d, found %d", l.Peers, d.peers)
	}
	return nil
}

// capabilities reads what the capabilities tell: vectors, one-shot mode. A
// process without privileges does not see them; a driver that knows may tell.
func (d *Device) capabilities(config []byte) error {
	known := d.back.Interrupts().Vectors
	var err error
	if d.cap, err = regs.ParseVendorCap(config); err != nil {
		if known > 0 && errors.Is(err, ErrConfigShort) {
			d.vectors = known
			return nil
		}
		return err
	}
	switch m, err := regs.ParseMSIX(config); {
	case err == nil:
		d.vectors = m.Vectors
	case errors.Is(err, regs.ErrNoCapability):
		d.vectors = 1 // INTx
	default:
		return err
	}
	return nil
}

// load reads a register that never reads all ones.
func (d *Device) load(r regs.Register) (uint32, error) {
	v, err := d.back.Load(r)
	if err != nil {
		return 0, err
	}
	if v == regs.AllOnes {
		return 0, fmt.Errorf("register %v reads all ones: %w", r, ErrGone)
	}
	return v, nil
}

// setOneShot writes Privileged Control unless it is right: the device may have
// been left in either mode.
func (d *Device) setOneShot(on bool) error {
	if d.cap.Offset == 0 && d.back.Interrupts().Shared && on {
		return nil // not to be seen, but the driver did it
	}
	if d.cap.Offset == 0 {
		return fmt.Errorf("Privileged Control: %w", ErrConfigShort)
	}
	privileged := uint8(0)
	if on {
		privileged = regs.OneShot
	}
	if d.cap.Privileged == privileged {
		return nil
	}
	if err := d.back.WriteConfig(d.cap.PrivilegedControl(), privileged); err != nil {
		return fmt.Errorf("Privileged Control: %w", err)
	}
	return nil
}

// start is the end of the specification's start-up sequence.
func (d *Device) start() error {
	if err := d.back.Store(regs.State, 0); err != nil {
		return err
	}
	if d.wait.set == nil {
		return nil // nobody would see an interrupt
	}
	return d.wait.arm()
}

// Address is the PCI address or socket path of the device.
func (d *Device) Address() string { return d.back.Address() }

// Driver names the back end that carries the device.
func (d *Device) Driver() string { return d.back.Driver() }

// ID is the own peer ID, 0-based.
func (d *Device) ID() uint32 { return d.id }

// MaxPeers is the number of peer IDs of the link, own included.
func (d *Device) MaxPeers() uint32 { return d.peers }

// Vectors is the number of interrupt vectors, the same for all peers.
func (d *Device) Vectors() int { return d.vectors }

// Protocol is the protocol type of the link, as this peer sees it.
func (d *Device) Protocol() regs.Protocol { return d.protocol }

// Sections is the shared memory.
func (d *Device) Sections() *shmem.Sections { return d.back.Sections() }

// InputsTrap reports whether the link is strict: what a guest reads of another
// peer's output section is a message to the service for each access, orders
// of magnitude slower than mapped memory. A protocol that would carry
// data in output sections uses the R/W section then. It is the same for all
// peers, also for host processes, which have all of the memory mapped.
func (d *Device) InputsTrap() bool { return d.strict }

// PlainMemory reports whether the sections are memory like any other, which the
// kernel may read a file into, say. Otherwise they are device memory, as a BAR
// that arm64 maps through VFIO or sysfs, which unaligned accesses fault on: only
// the methods of the sections may be used.
func (d *Device) PlainMemory() bool {
	switch d.back.Driver() {
	case "vfio-user", "uio_ivshmem":
		return true
	}
	return runtime.GOARCH != "arm64"
}

// OneShot reports whether the handle uses one-shot interrupt mode.
func (d *Device) OneShot() bool { return d.wait.oneShot }

// VectorsApart reports whether interrupts tell which vector they came on.
// Where they do not, one counter serves all, and each wakes every waiter.
func (d *Device) VectorsApart() bool { return !d.wait.shared }

// Delivers reports whether interrupts of a vector arrive: not all back ends
// connect all of them.
func (d *Device) Delivers(vector int) bool {
	return d.wait.set != nil && vector >= 0 && vector < d.vectors && (d.wait.shared || vector < len(d.wait.fds))
}

// HasInterrupts reports whether Wait works: the back end has interrupts, and
// the handle is the owner's.
func (d *Device) HasInterrupts() bool { return d.wait.set != nil }

// Ring rings the doorbell of a peer. What was stored to shared memory before
// is visible to the peer when the interrupt arrives. A peer that is absent,
// or has interrupts disabled, is not an error: it does not notice.
func (d *Device) Ring(peer uint32, vector int) error {
	if peer >= d.peers {
		return fmt.Errorf("ring: peer %d, expected a peer below %d", peer, d.peers)
	}
	if vector < 0 || vector >= d.vectors {
		return fmt.Errorf("ring: vector %d, expected a vector below %d", vector, d.vectors)
	}
	return d.back.Store(regs.DoorbellRegister, regs.Doorbell(uint16(peer), uint16(vector)))
}

// SetState writes the own State register. If the value changed, all other
// peers are interrupted on vector 0. State 0 means "not there".
func (d *Device) SetState(v uint32) error {
	if d.observer {
		return fmt.Errorf("set state: %w: the device is held as observer", ErrNotSupported)
	}
	return d.back.Store(regs.State, v)
}

// State is the state of a peer, from the State Table.
func (d *Device) State(peer uint32) (uint32, error) {
	return d.Sections().States.Load(peer)
}

// Register reads a register, for display and diagnosis. A mapped register of a
// device that is gone reads [regs.AllOnes].
func (d *Device) Register(r regs.Register) (uint32, error) { return d.back.Load(r) }

// HoldState makes Close leave State as it is, for programs whose purpose is
// to leave one behind. It fails with [ErrNotSupported] where State ends with the
// handle whatever is done: on a link's socket, whose peer leaves, and behind a
// driver that sees to it (uio_ivshmem). A device that the kernel resets when it
// is closed (vfio-pci does so behind a root port) loses it all the same.
func (d *Device) HoldState() error {
	if b, ok := d.back.(interface{ EndsState() bool }); ok && b.EndsState() {
		return fmt.Errorf("hold state: %w: %s ends the state when the device is closed", ErrNotSupported, d.Driver())
	}
	d.hold.Store(true)
	return nil
}

// Close ends all waits with [os.ErrClosed], writes State 0 and disables
// interrupts if the handle is the owner's, and gives everything back.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	d.wait.close(nil)
	var first error
	keep := func(err error) {
		// A device that is gone has no registers to leave in order.
		if err != nil && first == nil && !errors.Is(err, ErrGone) {
			first = err
		}
	}
	if !d.observer {
		if !d.hold.Load() {
			keep(d.back.Store(regs.State, 0))
		}
		if d.wait.set != nil {
			keep(d.back.Store(regs.InterruptControl, 0))
		}
	}
	keep(d.back.Close())
	if d.release != nil {
		keep(d.release())
	}
	if first != nil {
		return &DeviceError{Device: d.Address(), Op: "close", Err: first}
	}
	return nil
}
