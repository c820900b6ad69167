package link

import (
	"fmt"
	"slices"
)

// Observer is told which peers join and leave a link, in the order in which
// that happens. Its methods are called with the link's lock held: they must not
// block and must not call the link.
type Observer interface {
	// Joined says that a peer is there now. Others are those that were there
	// before, in the order in which they came; the slice is valid during the
	// call only.
	Joined(id uint32, others []uint32)
	// Left says that a peer is gone: its state is 0, and its ID may be taken
	// again as soon as the call returns.
	Left(id uint32)
}

// Observe lets o know of all peers that join and leave from now on, until stop
// is called. A link that is observed makes the doorbell eventfds of each peer
// before the peer is there, for the observers to hand out; those of the peers
// that are there already it makes now.
func (l *Link) Observe(o Observer) (stop func(), err error) {
	l.mu.Lock()
	l.observers = append(l.observers, o)
	there := []uint32{}
	for id, taken := range l.taken {
		if taken {
			there = append(there, uint32(id))
		}
	}
	l.mu.Unlock()
	stop = func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.observers = slices.DeleteFunc(l.observers, func(other Observer) bool { return other == o })
	}
	for _, id := range there {
		if err := l.makeDoorbells(id); err != nil {
			stop()
			return nil, err
		}
	}
	return stop, nil
}

// makeDoorbells makes all doorbell eventfds of a peer.
func (l *Link) makeDoorbells(id uint32) error {
	for v := range l.config.Vectors {
		if _, err := l.DoorbellFD(uint16(id), v); err != nil {
			return fmt.Errorf("doorbells of peer %d: %w", id, err)
		}
	}
	return nil
}

// Attach connects a peer: under the ID *pin, or if pin is nil under the lowest
// that is free. It has state 0 and disabled interrupts; the others notice it
// when it sets a state. Where no ID is free the error wraps [ErrFull], where
// the one of pin is not, [ErrTaken].
func (l *Link) Attach(pin *uint32, i Interrupter) (*Peer, error) {
	return l.attach(pin, i, nil)
}

// AttachExternal connects a peer that carries out the device itself, such as a
// client of an ivshmem2-server socket: it writes its own entry of the State
// Table, rings the doorbell eventfds of the others and reads its own. So the
// entry is the truth about its state, and what raises its interrupts is the
// signal of its doorbell eventfds, whether it wants them or not. When it is
// detached its entry is cleared, and vector 0 raised at all others.
//
// Greet is called with its ID before anybody else knows of it; where it fails,
// nobody ever does. It must not call the link.
func (l *Link) AttachExternal(pin *uint32, greet func(id uint32) error) (*Peer, error) {
	return l.attach(pin, nil, greet)
}

// attach connects a peer; one without Interrupter is external.
func (l *Link) attach(pin *uint32, i Interrupter, greet func(id uint32) error) (*Peer, error) {
	external := i == nil
	id, observed, err := l.take(pin)
	if err != nil {
		return nil, err
	}
	// All that can fail comes before anybody is told.
	if external || observed {
		err = l.makeDoorbells(id)
	}
	// What was rung before is for nobody. A former peer of the ID, external
	// or not, may have read its doorbells itself, and may go on to do so if it
	// has not noticed its end: so the link does not read them before they are
	// somebody else's.
	p := &Peer{link: l, id: id}
	for v := range l.config.Vectors {
		p.SetDirect(v, false)
		p.SetDirect(v, external)
	}
	if err == nil && external {
		err = greet(id)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.release(id)
		return nil, err
	}
	l.state.Peers[id] = PeerState{Present: true, External: external}
	l.raise[id] = i
	if external {
		l.storeEntry(id, 0) // anybody may have written there meanwhile
		l.states[id].Store(stateInTable)
	}
	for _, o := range l.observers {
		o.Joined(id, l.present)
	}
	l.present = append(l.present, id)
	return p, nil
}

// take reserves an ID.
func (l *Link) take(pin *uint32) (id uint32, observed bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	observed = len(l.observers) > 0
	if pin != nil {
		id = *pin
		switch {
		case id >= l.config.Peers:
			return 0, false, fmt.Errorf("peer %d of a link of %d peers: no such peer", id, l.config.Peers)
		case l.taken[id]:
			return 0, false, fmt.Errorf("peer %d: %w", id, ErrTaken)
		}
		l.taken[id] = true
		return id, observed, nil
	}
	for l.lowest < l.config.Peers && l.taken[l.lowest] {
		l.lowest++
	}
	if l.lowest == l.config.Peers {
		return 0, false, fmt.Errorf("link of %d peers: %w", l.config.Peers, ErrFull)
	}
	l.taken[l.lowest] = true
	return l.lowest, observed, nil
}

// release makes an ID free. The caller holds l.mu.
func (l *Link) release(id uint32) {
	l.taken[id] = false
	l.lowest = min(l.lowest, id)
}

// Detach disconnects the peer: a reset, and its ID is free again. The peer
// must not be used afterwards.
func (p *Peer) Detach() {
	p.mu.Lock()
	p.link.detach(p.id)
	p.mu.Unlock()
	p.link.tell()
}

// detach is for a caller that holds the peer's lock, and calls tell then.
func (l *Link) detach(id uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.present = slices.DeleteFunc(l.present, func(other uint32) bool { return other == id })
	if l.state.Peers[id].External {
		l.states[id].Store(0)
		l.storeEntry(id, 0)
		l.setChanged(id)
	} else {
		l.reset(id)
	}
	l.state.Peers[id] = PeerState{}
	l.raise[id] = nil
	for _, o := range l.observers {
		o.Left(id)
	}
	l.release(id)
}

// Snapshot returns a copy of the link's state.
func (l *Link) Snapshot() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := State{Peers: slices.Clone(l.state.Peers)}
	for _, id := range l.present {
		s.Peers[id].State = l.stateOf(id)
	}
	return s
}
