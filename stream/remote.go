package stream

import (
	"fmt"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem/shmem"
)

// remote is another peer of the link, from its State being seen until it
// changes.
type remote struct {
	id     uint32
	epoch  uint32
	vector uint32
	geo    geometry
	area   *shmem.ReadOnly
	header shmem.ReadWords
	count  shmem.ReadWords
	events shmem.ReadWords
	seen   uint64 // events
	unseen uint32 // slots that are to be looked at besides, those before next
	next   uint32
	owed   bool // a doorbell, at the end of pollLocked
	gone   bool // it left, or another took its place
	// conns are the own ends of connections, by the peer's slot. Those that the
	// peer has not answered yet are in dialing.
	conns   []*Conn
	dialing map[*Conn]struct{}
	// pending is how many slots are taken by its knocking that nobody has
	// accepted, or that was refused.
	pending int
	// unanswered says that there was no slot to answer a knocking peer.
	unanswered bool
}

// remote returns a peer that is there. The caller holds ep.mu.
func (ep *Endpoint) remote(peer uint32) (*remote, error) {
	state, err := ep.dev.State(peer)
	if err != nil {
		return nil, err
	}
	if r := ep.remotes[peer]; r != nil {
		if r.epoch == state {
			return r, nil
		}
		ep.lose(r)
	}
	if state == 0 {
		return nil, syscall.EHOSTUNREACH
	}
	r, err := ep.meet(peer, state)
	if err != nil {
		return nil, err
	}
	ep.remotes[peer] = r
	r.scan(ep) // it may have knocked before
	return r, nil
}

// meet reads the header of a peer's area, each word once.
func (ep *Endpoint) meet(peer, state uint32) (*remote, error) {
	area, err := ep.areas.others(peer)
	if err != nil {
		return nil, err
	}
	r := &remote{id: peer, epoch: state, area: area, dialing: map[*Conn]struct{}{}}
	header, err := r.words(0, lineSize)
	if err != nil {
		return nil, err
	}
	r.header = header
	if m := header.Load(wordMagic); m != magic {
		return nil, fmt.Errorf("peer %d: %w: expected %#x at the start of its area, found %#x", peer, ErrProtocol, uint64(magic), m)
	}
	v := header.Load(wordVersion)
	if uint32(v) != version {
		return nil, fmt.Errorf("peer %d: %w: expected version %d, found %d", peer, ErrProtocol, version, uint32(v))
	}
	if uint32(v>>32) != state {
		return nil, syscall.EHOSTUNREACH // it is just coming or going
	}
	if r.geo, err = parseGeometry(header.Load(wordGeometry), ep.areas.size); err != nil {
		return nil, ep.violation(peer, err)
	}
	r.vector = uint32(header.Load(wordVector))
	if r.vector != noVector && uint64(r.vector) >= uint64(ep.dev.Vectors()) {
		return nil, ep.violation(peer, &ViolationError{Field: "vector", Value: uint64(r.vector), Bound: fmt.Sprintf("below %d", ep.dev.Vectors())})
	}
	if r.count, err = r.words(8*wordCounter, lineSize); err != nil {
		return nil, err
	}
	if r.events, err = r.words(headerSize, r.geo.events*8); err != nil {
		return nil, err
	}
	r.seen = r.count.Load(0)
	r.conns = make([]*Conn, r.geo.slots)
	return r, nil
}

func (r *remote) words(offset, size uint64) (shmem.ReadWords, error) {
	v, err := r.area.View(offset, size)
	if err != nil {
		return shmem.ReadWords{}, err
	}
	return v.Words()
}

// violation counts what a peer did, and names it.
func (ep *Endpoint) violation(peer uint32, err error) error {
	if v, ok := err.(*ViolationError); ok {
		v.Peer = peer
		ep.stats.Violations++
	}
	return err
}

// A State Table may trap: then each word of it is a message to the service, as
// long as a round trip and more. So nobody waits for a look at it, no lock is
// held meanwhile, and it takes a share of the time only, however many peers
// there are and however often somebody rings.
const (
	glancePause = 5 * time.Millisecond
	glanceShare = 10 // pause for so many times as long as the look took
)

// glanceSoon has the states looked at. The caller holds ep.mu.
func (ep *Endpoint) glanceSoon() {
	ep.stale = true
	if !ep.looking {
		ep.looking = true
		ep.states.Reset(time.Until(ep.rested))
	}
}

// glance looks at the states once.
func (ep *Endpoint) glance() {
	ep.mu.Lock()
	ep.stale = false
	ep.mu.Unlock()
	begin := time.Now()
	ep.lookAtStates()
	now := time.Now()
	ep.mu.Lock()
	defer ep.mu.Unlock()
	ep.rested = now.Add(max(glancePause, glanceShare*now.Sub(begin)))
	ep.looking = false
	if ep.stale && ep.err == nil {
		ep.glanceSoon()
	}
}

// lookAtStates finds out who came and who left.
func (ep *Endpoint) lookAtStates() {
	for peer := range ep.dev.MaxPeers() {
		if peer == ep.dev.ID() {
			continue
		}
		state, err := ep.dev.State(peer)
		ep.mu.Lock()
		known := uint32(0)
		if r := ep.remotes[peer]; r != nil {
			known = r.epoch
		}
		if err == nil && state != known && ep.err == nil {
			// It looks again: who dialed meanwhile may know better. Whoever
			// speaks something else is told when dialed.
			ep.remote(peer)
		}
		ended := ep.err != nil
		ep.unlock()
		if ended {
			return
		}
	}
}

// present reports whether the area is still the one that was met: a successor
// takes the version out of the header before it writes anything else.
func (r *remote) present() bool {
	return r.header.Load(wordVersion) == version|uint64(r.epoch)<<32
}

// lose ends what there is with a peer that left. The caller holds ep.mu.
func (ep *Endpoint) lose(r *remote) {
	delete(ep.remotes, r.id)
	r.gone = true
	for c := range r.dialing {
		c.breakOff(syscall.ECONNRESET)
	}
	for _, c := range r.conns {
		if c != nil {
			c.end(syscall.ECONNRESET, stopLost)
			c.reap()
		}
	}
}

// pollLocked looks at what the peers have to say. The caller holds ep.mu.
func (ep *Endpoint) pollLocked() {
	if ep.err != nil {
		return
	}
	// States change with an interrupt on vector 0. Without interrupts, and
	// where those that come too fast are lost, any time.
	if n := ep.dev.Interrupts(0); n != ep.seen || !ep.dev.HasInterrupts() || ep.dev.OneShot() {
		ep.seen = n
		ep.glanceSoon()
	}
	ep.polling = true
	more := false
	for _, r := range ep.remotes {
		if n := r.count.Load(0); n != r.seen {
			r.take(ep, n)
		}
		r.lookOn(ep)
	}
	ep.polling = false
	for _, r := range ep.remotes {
		if more = more || r.unseen > 0; r.owed {
			r.owed = false
			ep.ring(r)
		}
	}
	if more {
		ep.later.Reset(scanPause)
	}
}

// take takes the events up to n out of the peer's ring. The peer does not wait
// for it: what was overwritten makes up for itself by a look at everything.
func (r *remote) take(ep *Endpoint, n uint64) {
	from := r.seen
	r.seen = n
	if n-from >= r.geo.events {
		r.scan(ep)
		return
	}
	for i := from; i != n; i++ {
		e := r.events.Load(i)
		if slot := uint32(e); uint32(e>>32) == ep.dev.ID() && slot < r.geo.slots {
			r.handle(ep, slot)
		}
	}
	// One more may be under way.
	if r.count.Load(0)-from >= r.geo.events {
		r.scan(ep)
	}
}

// What a peer can make this end look at without having to write for it is
// limited: some slots now, the next ones later. Others have their turn.
const (
	scanBudget = 1024
	scanPause  = time.Millisecond
)

// scan has all slots of the peer looked at, by the next pollLocked.
func (r *remote) scan(ep *Endpoint) {
	r.unseen = r.geo.slots
	ep.kick = true
}

// lookOn looks at the next of the slots that are to be looked at.
func (r *remote) lookOn(ep *Endpoint) {
	for budget := scanBudget; r.unseen > 0 && budget > 0 && !r.gone; budget-- {
		slot := r.next
		r.unseen--
		r.next = (slot + 1) % r.geo.slots
		r.handle(ep, slot)
	}
}

// block is the control block of a slot of the peer.
func (r *remote) block(slot uint32) (shmem.ReadWords, error) {
	return r.words(r.geo.blocksOffset()+uint64(slot)*slotSize, slotSize)
}

// describe reads a slot's descriptor: not to be relied upon unless the ID is
// the same before and after.
func (r *remote) describe(slot uint32) (d descriptor, ok bool) {
	b, err := r.block(slot)
	if err != nil {
		return d, false
	}
	var w [4]uint64
	for i := range w {
		w[i] = b.Load(uint64(i))
	}
	d.parse(w)
	return d, b.Load(slotID) == d.id
}

// handle looks at a slot of the peer. The caller holds ep.mu.
func (r *remote) handle(ep *Endpoint, slot uint32) {
	d, ok := r.describe(slot)
	if !ok {
		return // it changes right now, and the peer will say so
	}
	if c := r.conns[slot]; c != nil {
		if d.id == c.id {
			c.update(d.state)
			return
		}
		c.breakOff(syscall.ECONNRESET)
		c.reap()
		if r.conns[slot] != nil {
			r.unanswered = true // the own side has to close first
			return
		}
	}
	if d.id == 0 || d.peer != ep.dev.ID() || d.epoch != ep.epoch {
		return
	}
	switch d.state {
	case slotDialing:
		if uint32(d.id>>32) == r.epoch { // else a successor's, which is met soon
			ep.admit(r, slot, d)
		}
	case slotOpen, slotRefused:
		ep.answer(r, slot, d)
	}
}

// answer is a peer's answer to the own knocking.
func (ep *Endpoint) answer(r *remote, slot uint32, d descriptor) {
	if uint64(d.slot) >= uint64(len(ep.conns)) {
		return
	}
	c := ep.conns[d.slot]
	// Connections that came in have IDs that the peer chose: none to answer.
	if _, dialing := r.dialing[c]; !dialing || c.id != d.id || c.answered.Load() != 0 {
		return
	}
	if d.state == slotOpen {
		if err := c.connect(slot); err != nil {
			c.breakOff(err)
			return
		}
		c.describe(descriptor{state: slotOpen, slot: slot, port: c.remotePort})
	}
	c.answered.Store(d.state)
	ep.rouse(&c.read.waiter)
}

// admit is a peer's knocking: it gets a connection, or is refused.
func (ep *Endpoint) admit(r *remote, slot uint32, d descriptor) {
	// Who knocks all over leaves slots for others.
	if r.pending >= max(1, len(ep.free)) {
		r.unanswered = true
		return
	}
	c, err := ep.newConn(r, d.id, d.port, d.slot)
	if err == nil {
		if err = c.connect(slot); err != nil {
			c.release()
		}
	}
	if err != nil { // no slot, not even to say so
		r.unanswered = true
		return
	}
	c.pending = true
	r.pending++
	// The last slot is kept for refusals.
	l := ep.listeners[d.port]
	if l == nil || len(l.backlog) >= backlogLimit || len(ep.free) == 0 && len(ep.conns) > 1 {
		c.describe(descriptor{state: slotRefused, slot: slot, port: d.port})
		c.finished = true
		ep.notify(r, c.slot)
		return
	}
	c.describe(descriptor{state: slotOpen, slot: slot, port: d.port})
	ep.notify(r, c.slot)
	l.backlog = append(l.backlog, c)
	l.wakeOne()
}
