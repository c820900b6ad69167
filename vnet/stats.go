package vnet

// Stats is what a link counted since Open, and how it is.
type Stats struct {
	State     State `json:"state"`
	PeerState State `json:"peer_state"`
	Up        bool  `json:"up"`
	Carrier   bool  `json:"carrier"`

	Sent       SendStats      `json:"sent"`
	Received   ReceiveStats   `json:"received"`
	Resets     ResetStats     `json:"resets"`
	Violations ViolationStats `json:"violations"`

	// WakeUps is how often something was waited for.
	WakeUps uint64 `json:"wake_ups"`
	// LastViolation is the text of the last [ViolationError].
	LastViolation string `json:"last_violation,omitempty"`
}

// SendStats counts what was sent.
type SendStats struct {
	Frames    uint64 `json:"frames"`
	Bytes     uint64 `json:"bytes"`
	Doorbells uint64 `json:"doorbells"` // for frames
	Waits     uint64 `json:"waits"`     // for room

	// Frames that were not sent, or not received for sure.
	NoCarrier uint64 `json:"dropped_no_carrier"`
	Size      uint64 `json:"dropped_size"`
	Reset     uint64 `json:"dropped_reset"` // in the caller's hands at a reset
	Lost      uint64 `json:"lost_in_reset"` // sent, and not returned before a reset
}

// ReceiveStats counts what was received.
type ReceiveStats struct {
	Frames    uint64 `json:"frames"`
	Bytes     uint64 `json:"bytes"`
	Doorbells uint64 `json:"doorbells"` // for frames that were returned

	// Frames that were dropped, and returned to the peer like any other.
	Index       uint64 `json:"dropped_index"`   // descriptor number
	Flags       uint64 `json:"dropped_flags"`   // of the descriptor, not 0
	Address     uint64 `json:"dropped_address"` // not in the data of the section
	Length      uint64 `json:"dropped_length"`  // beyond the end of the section, or above MaxFrame
	Short       uint64 `json:"dropped_short"`   // below 14 bytes
	ShortBuffer uint64 `json:"dropped_buffer"`  // longer than what Receive was given
	// Reset counts frames that were in the caller's hands at a reset.
	Reset uint64 `json:"dropped_reset"`
}

// Dropped is the number of frames that were not delivered.
func (s ReceiveStats) Dropped() uint64 {
	return s.Index + s.Flags + s.Address + s.Length + s.Short + s.ShortBuffer + s.Reset
}

// ResetStats counts by whom the link was reset.
type ResetStats struct {
	Peer      uint64 `json:"peer"`      // it went to RESET
	Violation uint64 `json:"violation"` // by the peer
	Down      uint64 `json:"down"`      // Down was called
}

// ViolationStats counts violations by what they were found in.
type ViolationStats struct {
	AvailIndex uint64 `json:"avail_index"` // more frames than the queue has entries
	UsedIndex  uint64 `json:"used_index"`  // more returned than were sent
	UsedID     uint64 `json:"used_id"`     // not the frame whose turn it is
	UsedLength uint64 `json:"used_length"` // not 1
}

// Stats returns what was counted.
func (l *Link) Stats() Stats {
	l.mu.Lock()
	s := Stats{
		State: l.state, PeerState: l.seen, Up: l.up, Carrier: l.carrier.Load(),
		Resets: l.resets, Violations: l.violations, WakeUps: l.wakeUps.Load(), LastViolation: l.lastViolation,
	}
	l.mu.Unlock()
	l.tx.mu.Lock()
	s.Sent = l.tx.stats
	l.tx.mu.Unlock()
	l.rx.mu.Lock()
	s.Received = l.rx.stats
	l.rx.mu.Unlock()
	return s
}
