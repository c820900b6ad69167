package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Protocol is the protocol type of links that carry streams. Links of the
// undefined type 0000h may carry them too.
const Protocol regs.Protocol = 0x5354

// Config of an endpoint. The zero value is a good one.
type Config struct {
	// Mode is how connections wait.
	Mode Mode
	// Ring is the size of each connection's ring for what this side sends, in
	// bytes: a power of two from 512 to 16 MiB. The number of connections is
	// what the own output section (or share of the R/W section) has room for. 0
	// is the largest that leaves room for 32 connections, up to 256 KiB.
	Ring uint64
}

// Stats counts what an endpoint did.
type Stats struct {
	Doorbells  uint64 // rung at peers
	Violations uint64 // of the protocol, by peers
	Resets     uint64 // connections that broke: violations, peers that left
}

// Endpoint is the own end of all connections over a device. It is safe for
// concurrent use.
type Endpoint struct {
	dev    *ivshmem.Device
	config Config
	areas  areas
	geo    geometry
	epoch  uint32
	vector int // that peers ring this one on
	header shmem.Words
	events shmem.Words // ring of events, and their counter
	count  shmem.Words

	spinLimit time.Duration // the longest that Adaptive looks

	mu        sync.Mutex
	err       error // why nothing works any more
	conns     []*Conn
	free      []uint32 // slots, the one that is free for longest first
	remotes   map[uint32]*remote
	listeners map[uint32]*Listener
	dials     uint32    // for connection IDs
	ports     uint32    // the last one given to a dialing end
	written   uint64    // events
	seen      uint64    // interrupts on vector 0, when the states were looked at
	stale     bool      // the states have to be looked at
	looking   bool      // states is running, or about to
	rested    time.Time // when they may be looked at again
	stats     Stats

	leader    *waiter
	queue     *waiter
	caretaker waiter
	claimant  *waiter // who takes the leader's place
	misses    int     // wake-ups of the leader that were not for it
	kick      bool    // the leader has to look
	vacant    bool    // vacancy is running
	polling   bool    // doorbells wait until it is over
	vacancy   *time.Timer
	later     *time.Timer // for what pollLocked left to do
	states    *time.Timer // for a look at the State Table
	// leaderAsked is leaderReady, bound once.
	leaderAsked func() bool
}

// New makes the device's owner an end of connections: it writes the own
// output section, or the own share of the R/W section on a link without
// output sections, or whose inputs trap, and the State. A device carries one endpoint, and nothing
// else that writes these. All peers have to be of the kind.
//
// Links of another protocol type than [Protocol] or 0000h are refused with
// [ErrProtocol].
func New(dev *ivshmem.Device, config Config) (*Endpoint, error) {
	if p := dev.Protocol(); p != Protocol && p != regs.ProtocolUndefined {
		return nil, fmt.Errorf("%w: the link's protocol type is %04Xh (%v), expected %04Xh or 0000h", ErrProtocol, uint16(p), p, uint16(Protocol))
	}
	if !littleEndian {
		return nil, fmt.Errorf("streams: %w: expected a little-endian machine", ivshmem.ErrNotSupported)
	}
	ep := &Endpoint{
		dev: dev, config: config, epoch: rand.Uint32() | 1,
		remotes: map[uint32]*remote{}, listeners: map[uint32]*Listener{},
		ports: firstDialPort - 1,
	}
	ep.caretaker.init(ep, func() bool { return false })
	ep.leaderAsked = ep.leaderReady
	ep.vacancy = time.AfterFunc(time.Hour, ep.endVacancy)
	ep.vacancy.Stop()
	ep.later = time.AfterFunc(time.Hour, func() {
		ep.mu.Lock()
		ep.kick = true
		ep.unlock()
	})
	ep.later.Stop()
	ep.states = time.AfterFunc(time.Hour, ep.glance)
	ep.states.Stop()
	if err := ep.open(); err != nil {
		return nil, fmt.Errorf("streams over %s: %w", dev.Address(), err)
	}
	return ep, nil
}

// firstDialPort is the first port that a dialing end is given.
const firstDialPort = 1 << 16

func (ep *Endpoint) open() error {
	var err error
	if ep.areas, err = findAreas(ep.dev.Sections(), ep.dev.ID(), ep.dev.InputsTrap()); err != nil {
		return err
	}
	if ep.geo, err = divide(ep.areas.size, ep.config.Ring); err != nil {
		return err
	}
	// Vector 0 announces states; where there is another, it is for streams.
	ep.vector = noVector
	if ep.dev.HasInterrupts() {
		ep.vector = 0
		if ep.dev.Vectors() > 1 && ep.dev.VectorsApart() && ep.dev.Delivers(1) {
			ep.vector = 1
		}
	}
	ep.measureWake()
	if err := ep.clear(); err != nil {
		return err
	}
	// From here on others may come.
	if err := ep.dev.SetState(ep.epoch); err != nil {
		return err
	}
	ep.lookAtStates()
	ep.mu.Lock()
	defer ep.unlock()
	if !ep.dev.HasInterrupts() {
		ep.leader = &ep.caretaker
		go ep.patrol()
		return nil
	}
	ep.vacant = true
	ep.vacancy.Reset(idleVacancy)
	return nil
}

// clear makes the own area empty. The version goes first, and then the
// connection IDs: a peer that still reads for a predecessor of this endpoint
// must not take what is written from now on for the predecessor's.
func (ep *Endpoint) clear() error {
	words := func(offset, size uint64) (shmem.Words, error) {
		v, err := ep.areas.own.View(offset, size)
		if err != nil {
			return shmem.Words{}, err
		}
		return v.Words()
	}
	var err error
	if ep.header, err = words(0, lineSize); err != nil {
		return err
	}
	ep.header.Store(wordVersion, 0)
	ep.conns = make([]*Conn, ep.geo.slots)
	for slot := range ep.geo.slots {
		block, err := words(ep.geo.blocksOffset()+uint64(slot)*slotSize, slotSize)
		if err != nil {
			return err
		}
		for i := range uint64(slotWords) {
			block.Store(i, 0)
		}
		ep.free = append(ep.free, slot)
	}
	if ep.count, err = words(8*wordCounter, lineSize); err != nil {
		return err
	}
	if ep.events, err = words(headerSize, ep.geo.events*8); err != nil {
		return err
	}
	ep.count.Store(0, 0)
	ep.header.Store(wordGeometry, ep.geo.word())
	ep.header.Store(wordVector, uint64(ep.vector))
	ep.header.Store(wordVersion, version|uint64(ep.epoch)<<32)
	ep.header.Store(wordMagic, magic)
	return nil
}

// Device is the device that carries the endpoint.
func (ep *Endpoint) Device() *ivshmem.Device { return ep.dev }

// Slots is the number of connections that the endpoint has room for.
func (ep *Endpoint) Slots() int { return int(ep.geo.slots) }

// Stats returns what was counted.
func (ep *Endpoint) Stats() Stats {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	return ep.stats
}

// Close resets all connections, ends all listeners and sets State 0. The
// device stays open.
func (ep *Endpoint) Close() error {
	ep.mu.Lock()
	if ep.err != nil {
		ep.mu.Unlock()
		return nil
	}
	ep.fail(net.ErrClosed)
	ep.unlock()
	ep.vacancy.Stop()
	ep.later.Stop()
	ep.states.Stop()
	err := ep.dev.SetState(0)
	if errors.Is(err, ivshmem.ErrGone) {
		return nil
	}
	return err
}

// fail ends everything. The caller holds ep.mu.
func (ep *Endpoint) fail(err error) {
	if ep.err != nil {
		return
	}
	ep.err = err
	for _, c := range ep.conns {
		if c != nil {
			c.breakOff(err)
		}
	}
	for _, l := range ep.listeners {
		l.end(err)
	}
	ep.caretaker.stop.Or(stopClosed)
	ep.rouse(&ep.caretaker)
}

// notify tells a peer that something happened to a connection: its slot goes
// into the ring of events, and the doorbell is rung. The caller holds ep.mu.
func (ep *Endpoint) notify(r *remote, slot uint32) {
	// Not before the former count: see take.
	ep.events.Store(ep.written, uint64(r.id)<<32|uint64(slot))
	ep.written++
	ep.count.Store(0, ep.written)
	if ep.polling { // there may be more to say
		r.owed = true
		return
	}
	ep.ring(r)
}

// ring rings a peer. The caller holds ep.mu.
func (ep *Endpoint) ring(r *remote) {
	if r.vector == noVector {
		return
	}
	ep.stats.Doorbells++
	// A peer that cannot be rung is gone, or the own device is, which shows
	// elsewhere.
	ep.dev.Ring(r.id, int(r.vector))
}

// Listen takes connections to a port.
func (ep *Endpoint) Listen(port uint32) (*Listener, error) {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	l := &Listener{ep: ep, addr: Addr{ep.dev.ID(), port}}
	if ep.err != nil {
		return nil, l.opError("listen", ep.err)
	}
	if ep.listeners[port] != nil {
		return nil, l.opError("listen", syscall.EADDRINUSE)
	}
	ep.listeners[port] = l
	return l, nil
}

// Dial connects to a port of a peer. The error is a [net.OpError] of
// ECONNREFUSED where nobody listens, EHOSTUNREACH where no peer is, ECONNRESET
// where it left, [ErrTooMany] or [ErrProtocol], or the context's error.
func (ep *Endpoint) Dial(ctx context.Context, peer, port uint32) (*Conn, error) {
	c, err := ep.dial(ctx, peer, port)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: Addr{}.Network(), Addr: Addr{peer, port}, Err: err}
	}
	return c, nil
}

func (ep *Endpoint) dial(ctx context.Context, peer, port uint32) (*Conn, error) {
	if peer >= ep.dev.MaxPeers() || peer == ep.dev.ID() {
		return nil, fmt.Errorf("peer %d: expected another peer below %d", peer, ep.dev.MaxPeers())
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c, err := ep.knock(peer, port)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.read.halt(stopDeadline) })
	c.read.sleep(func() {}) // the peer rings in any case
	// The context halts c.read, if not yet, then soon.
	late := !stop()
	ep.mu.Lock()
	defer ep.unlock()
	switch {
	case c.answered.Load() == slotOpen && !late && c.read.stop.Load()&stopBroken == 0:
		c.read.ready, c.read.rx = c.rx.ready, &c.rx
		return c, nil
	case c.answered.Load() == slotRefused:
		err = syscall.ECONNREFUSED
	case c.err != nil:
		err = c.err
	default:
		err = context.Cause(ctx)
	}
	c.release()
	return nil, err
}

// knock makes the own half of a connection, and tells the peer.
func (ep *Endpoint) knock(peer, port uint32) (*Conn, error) {
	ep.mu.Lock()
	defer ep.unlock()
	if ep.err != nil {
		return nil, ep.err
	}
	r, err := ep.remote(peer)
	if err != nil {
		return nil, err
	}
	ep.dials++
	ep.ports++
	if ep.ports < firstDialPort {
		ep.ports = firstDialPort
	}
	c, err := ep.newConn(r, uint64(ep.epoch)<<32|uint64(ep.dials), ep.ports, port)
	if err != nil {
		return nil, err
	}
	r.dialing[c] = struct{}{}
	c.read.rx = nil
	c.read.ready = func() bool { return c.answered.Load() != 0 }
	c.describe(descriptor{state: slotDialing, slot: c.localPort, port: port})
	ep.notify(r, c.slot)
	return c, nil
}

// Listener takes connections to a port. It implements [net.Listener]. A peer
// that has as many connections waiting to be accepted as there are slots left
// waits with the next one, so that others get through.
type Listener struct {
	ep   *Endpoint
	addr Addr

	// Below: with ep.mu held.
	err     error
	backlog []*Conn
	waiting []*waiter
}

var _ net.Listener = (*Listener)(nil)

// backlogLimit is how many connections wait to be accepted; more are refused.
const backlogLimit = 128

// Accept returns the next connection, a *[Conn].
func (l *Listener) Accept() (net.Conn, error) {
	c, err := l.AcceptStream()
	if err != nil {
		return nil, err
	}
	return c, nil
}

// AcceptStream is Accept without the interface.
func (l *Listener) AcceptStream() (*Conn, error) {
	ep := l.ep
	var w waiter
	// The condition is looked at without ep.mu, so it is a flag.
	w.init(ep, func() bool { return false })
	for {
		ep.mu.Lock()
		switch {
		case len(l.backlog) > 0:
			c := l.backlog[0]
			l.backlog = slices.Delete(l.backlog, 0, 1)
			c.settle()
			ep.unlock()
			return c, nil
		case l.err != nil:
			err := l.err
			ep.mu.Unlock()
			return nil, l.opError("accept", err)
		}
		w.stop.Store(0)
		l.waiting = append(l.waiting, &w)
		ep.mu.Unlock()
		for w.stop.Load() == 0 {
			ep.sleep(&w)
		}
	}
}

// wakeOne makes an Accept look. The caller holds ep.mu.
func (l *Listener) wakeOne() {
	if len(l.waiting) > 0 {
		w := l.waiting[0]
		l.waiting = slices.Delete(l.waiting, 0, 1)
		w.stop.Store(stopDeadline)
		l.ep.rouse(w)
	}
}

// end ends the listener. The caller holds ep.mu.
func (l *Listener) end(err error) {
	if l.err != nil {
		return
	}
	l.err = err
	delete(l.ep.listeners, l.addr.Port)
	for len(l.waiting) > 0 {
		l.wakeOne()
	}
	for _, c := range l.backlog {
		c.release()
	}
	l.backlog = nil
}

// Close ends Accept, and resets the connections that were not accepted.
func (l *Listener) Close() error {
	l.ep.mu.Lock()
	defer l.ep.unlock()
	if l.err != nil {
		return l.opError("close", net.ErrClosed)
	}
	l.end(net.ErrClosed)
	return nil
}

// Addr is the own peer ID and the port, an [Addr].
func (l *Listener) Addr() net.Addr { return l.addr }

func (l *Listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: l.addr.Network(), Addr: l.addr, Err: err}
}

var _ io.Closer = (*Endpoint)(nil)
