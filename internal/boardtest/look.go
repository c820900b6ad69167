package boardtest

import "sync/atomic"

// State is the State of a peer.
func (b *Board) State(peer uint32) uint32 { return atomic.LoadUint32(&b.states[peer]) }

// SetState sets the State of a peer in its place.
func (b *Board) SetState(peer, v uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.setState(peer, v)
}

// Kill is the death of a peer: its State, and nothing else. Its device works no
// more.
func (b *Board) Kill(peer uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.peers[peer]; p != nil {
		p.closed.Store(true)
		b.peers[peer] = nil
	}
	b.setState(peer, 0)
}

// Alive reports whether a peer has a device.
func (b *Board) Alive(peer uint32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.peers[peer] != nil
}

// Armed reports whether a peer's interrupts are enabled.
func (b *Board) Armed(peer uint32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.peers[peer].control != 0
}

// RingAndLeave rings a vector of a peer, and another leaves before the first can
// arm again: in one-shot mode it is not interrupted for that. It does nothing,
// and reports so, while the peer is not armed.
func (b *Board) RingAndLeave(peer uint32, vector int, leaver uint32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.peers[peer].control == 0 {
		return false
	}
	b.interrupt(peer, vector)
	b.setState(leaver, 0)
	return true
}

// Doorbells is how often a vector of a peer was rung.
func (b *Board) Doorbells(peer uint32, vector int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rung[peer][vector]
}

// Rung is how often a peer was rung at all.
func (b *Board) Rung(peer uint32) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, times := range b.rung[peer] {
		n += times
	}
	return n
}

// Looks is how often a peer has looked at the State Table.
func (b *Board) Looks(peer uint32) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.peers[peer].loads.Load()
}

// Script has the State Table say to a peer what a function returns.
func (b *Board) Script(peer uint32, state func() uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.peers[peer].script.Store(&state)
}
