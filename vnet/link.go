package vnet

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Config of a link. The zero value is what Linux has.
type Config struct {
	// MTU is the largest frame that is sent, without the 14 bytes of its
	// header, in bytes: from [MinMTU] to [Geometry.MaxMTU]. 0 is
	// [Geometry.DefaultMTU]. The peers do not tell each other: configure the same
	// on both. What is received may be longer.
	MTU int
}

// Link is the own end of virtual Ethernet with the peer. One goroutine may send
// while another receives; all else is safe for concurrent use.
type Link struct {
	dev      *ivshmem.Device
	peer     uint32
	geometry Geometry
	own      *shmem.ReadWrite
	tx       sender
	_        [lineSize]byte // the two are used by different CPUs
	rx       receiver
	waiting
	carrier atomic.Bool

	// mu is taken before tx.mu and rx.mu. None of them is held when the device
	// waits or is told to recheck: its conditions take them.
	mu sync.Mutex
	// Below: with mu held.
	err           error // why nothing works any more
	state, seen   State // own, and the peer's when it was last looked at
	up            bool
	changed       chan struct{} // closed at the next change of the carrier
	resets        ResetStats
	violations    ViolationStats
	lastViolation string
}

// Fields that may be violated.
const (
	fieldAvailIndex = "index of available frames"
	fieldUsedIndex  = "index of used frames"
	fieldUsedID     = "descriptor of a used frame"
	fieldUsedLength = "length of a used frame"
)

// Open makes the device's owner an end of virtual Ethernet, and brings the
// interface up: it writes the own output section and the State. A device carries one,
// and nothing else that writes these. Devices and links of another kind are
// refused with [ErrUnsuitable], too small ones with a *[SizeError], an MTU that
// does not fit with a *[MTUError].
func Open(dev *ivshmem.Device, config Config) (*Link, error) {
	l := &Link{dev: dev, peer: 1 - dev.ID(), up: true, changed: make(chan struct{})}
	if err := l.open(config); err != nil {
		return nil, fmt.Errorf("virtual Ethernet over %s: %w", dev.Address(), err)
	}
	return l, nil
}

// suit checks that the device's link is one for virtual Ethernet.
func suit(dev *ivshmem.Device) error {
	s := dev.Sections()
	switch p := dev.Protocol(); {
	case p != regs.ProtocolEthernet:
		return fmt.Errorf("%w: expected protocol type %04Xh, found %04Xh (%v): serve the link with --protocol 1", ErrUnsuitable, uint16(regs.ProtocolEthernet), uint16(p), p)
	case dev.MaxPeers() != 2:
		return fmt.Errorf("%w: expected 2 peers, found %d: the protocol knows one other, and Linux refuses more: serve the link with --peers 2", ErrUnsuitable, dev.MaxPeers())
	case s.Layout.Output == 0:
		return fmt.Errorf("%w: expected output sections, found none: serve the link with --output", ErrUnsuitable)
	case dev.InputsTrap():
		return fmt.Errorf("%w: the link is strict, so a guest would read each word of a frame by a message, and the protocol has no other place for frames: serve the link without --mode strict", ErrUnsuitable)
	case s.Output == nil || s.Inputs == nil:
		return fmt.Errorf("%w: %s does not reach the output sections", ErrUnsuitable, dev.Driver())
	}
	return nil
}

func (l *Link) open(config Config) error {
	if err := suit(l.dev); err != nil {
		return err
	}
	g, err := NewGeometry(l.dev.Sections().Layout.Output)
	if err != nil {
		return err
	}
	mtu := config.MTU
	if mtu == 0 {
		mtu = g.DefaultMTU()
	}
	l.geometry = g
	if err := l.SetMTU(mtu); err != nil {
		return err
	}
	vector := 0 // state changes; the only one without MSI-X
	if l.dev.Vectors() > 1 {
		vector = 1
	}
	if err := l.queues(func() { l.dev.Ring(l.peer, vector) }); err != nil {
		return err
	}
	l.waiting.init(l, vector)
	if err := l.change(l.reset); err != nil {
		return err
	}
	l.timer.Reset(0)
	return nil
}

// queues sets both queues up. A peer that cannot be rung is gone, or the own
// device is, which shows elsewhere.
func (l *Link) queues(ring func()) error {
	g, s := l.geometry, l.dev.Sections()
	peer, err := s.Input(l.peer)
	if err != nil {
		return err
	}
	l.own = s.Output
	l.tx = sender{queue: g.queue(), own: l.own, peer: peer, header: g.Header, size: g.Data(),
		most: l.tx.most, ring: ring, at: make([]uint64, g.Entries)}
	l.rx = receiver{queue: g.queue(), own: l.own, peer: peer, header: g.Header, output: g.Output, ring: ring}
	own, err := l.own.View(0, 16*uint64(g.Entries))
	if err != nil {
		return err
	}
	if l.tx.descriptors, err = own.Words(); err != nil {
		return err
	}
	if peer, err = peer.View(0, 16*uint64(g.Entries)); err != nil {
		return err
	}
	l.rx.descriptors, err = peer.Words()
	return err
}

// Device is the device that carries the link.
func (l *Link) Device() *ivshmem.Device { return l.dev }

// Geometry is how the output sections are divided.
func (l *Link) Geometry() Geometry { return l.geometry }

// MTU is the MTU in bytes.
func (l *Link) MTU() int {
	l.tx.mu.Lock()
	defer l.tx.mu.Unlock()
	return int(l.tx.most - headerLength - tagLength)
}

// SetMTU changes the MTU for what is sent from now on; a reservation is given
// up. One that does not fit fails with a *[MTUError], and changes nothing.
func (l *Link) SetMTU(mtu int) error {
	if mtu < MinMTU || mtu > l.geometry.MaxMTU() {
		return &MTUError{MTU: mtu, Max: l.geometry.MaxMTU(), Data: l.geometry.Data()}
	}
	l.tx.mu.Lock()
	defer l.tx.mu.Unlock()
	l.tx.most = uint64(mtu) + headerLength + tagLength
	l.tx.reserved = false
	return nil
}

// Carrier reports whether both interfaces run.
func (l *Link) Carrier() bool { return l.carrier.Load() }

// Up brings the interface up. It is after Open.
func (l *Link) Up() error {
	return l.change(func() {
		l.up = true
		l.follow()
	})
}

// Down takes the interface down: the link is reset, and stays READY until Up.
func (l *Link) Down() error {
	return l.change(func() {
		if l.up {
			l.up = false
			l.resets.Down++
			l.reset()
		}
	})
}

// change changes the own state, unless everything has ended.
func (l *Link) change(f func()) error {
	l.mu.Lock()
	if l.err == nil {
		f()
	}
	err := l.err
	l.mu.Unlock()
	l.dev.Recheck()
	return err
}

// Close ends everything that waits with [os.ErrClosed], and sets State RESET.
// The device stays open.
func (l *Link) Close() error {
	var err error
	l.change(func() {
		l.fail(os.ErrClosed)
		err = l.dev.SetState(uint32(StateReset))
	})
	if errors.Is(err, ivshmem.ErrGone) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// fail ends everything. The caller holds mu.
func (l *Link) fail(err error) {
	if l.err != nil {
		return
	}
	l.err = err
	l.state = StateReset
	l.stop()
	l.tx.mu.Lock()
	l.tx.err = err
	l.tx.mu.Unlock()
	l.rx.mu.Lock()
	l.rx.err = err
	l.rx.mu.Unlock()
	l.ended.Store(true)
	l.timer.Stop()
	close(l.changed)
}

// look takes over what the peer's state is.
func (l *Link) look() {
	l.mu.Lock()
	before := l.state
	l.follow()
	moved := l.state != before || l.err != nil
	l.mu.Unlock()
	if moved {
		l.dev.Recheck()
	}
}

// stepsPerLook is more than a peer that behaves can make this side go.
const stepsPerLook = 8

// follow goes where the peer's state says, step by step, until there is no step
// to make. Linux makes one step for each change that it sees, and so two peers
// may wait for each other for ever: a change to and fro may look like none.
// The caller holds mu.
func (l *Link) follow() {
	for range stepsPerLook {
		if l.err != nil {
			return
		}
		v, err := l.load()
		if err != nil {
			l.fail(err)
			return
		}
		l.seen = State(v)
		next := l.state.next(l.seen, l.up)
		if next == l.state {
			if next == StateRun && l.seen == StateRun {
				l.setCarrier(true)
			}
			return
		}
		if next == StateReset {
			l.resets.Peer++
		}
		l.enter(next)
	}
	l.unsettled() // the peer goes to and fro: others have their turn
}

// enter goes to a state. The caller holds mu.
func (l *Link) enter(s State) {
	switch s {
	case StateReset:
		l.stop()
	case StateReady:
		l.initialise()
	case StateRun:
		l.start()
	}
	l.state = s
	if err := l.dev.SetState(uint32(s)); err != nil {
		l.fail(err)
	}
}

// reset goes to RESET without being asked to by the peer. The caller holds mu.
func (l *Link) reset() {
	l.enter(StateReset)
	l.follow()
}

// stop makes sure that nobody touches the queues, until start. The caller holds
// mu.
func (l *Link) stop() {
	l.setCarrier(false)
	l.rx.mu.Lock()
	l.rx.running = false
	l.rx.mu.Unlock()
}

// initialise clears the own section: nobody else touches it, or relies on it.
// The caller holds mu.
func (l *Link) initialise() {
	// Not by clear(): the section may be device memory.
	var zeros [4096]byte
	for at := uint64(0); at < l.own.Size(); at += uint64(len(zeros)) {
		if _, err := l.own.WriteAt(zeros[:min(uint64(len(zeros)), l.own.Size()-at)], int64(at)); err != nil {
			l.fail(err)
			return
		}
	}
	l.tx.mu.Lock()
	l.tx.stats.Lost += uint64(l.tx.outstanding())
	l.tx.empty()
	l.tx.mu.Unlock()
	l.rx.mu.Lock()
	l.rx.empty()
	l.rx.mu.Unlock()
}

// start lets the peer's queue be read. The caller holds mu.
func (l *Link) start() {
	l.rx.mu.Lock()
	l.rx.running = true
	l.rx.mu.Unlock()
}

// setCarrier lets frames be sent, or not. The caller holds mu.
func (l *Link) setCarrier(on bool) {
	l.tx.mu.Lock()
	l.tx.carrier = on
	l.tx.mu.Unlock()
	if l.carrier.Swap(on) != on {
		close(l.changed)
		l.changed = make(chan struct{})
	}
}

// violated resets the link because of what the peer wrote, unless that has been
// done since.
func (l *Link) violated(v *ViolationError, session uint32) {
	v.Peer = l.peer
	l.mu.Lock()
	l.lastViolation = v.Error()
	switch v.Field {
	case fieldAvailIndex:
		l.violations.AvailIndex++
	case fieldUsedIndex:
		l.violations.UsedIndex++
	case fieldUsedID:
		l.violations.UsedID++
	case fieldUsedLength:
		l.violations.UsedLength++
	}
	l.rx.mu.Lock()
	current := l.rx.running && l.rx.session == session
	l.rx.mu.Unlock()
	if l.err == nil && current {
		l.resets.Violation++
		l.reset()
	}
	l.mu.Unlock()
	l.dev.Recheck()
}
