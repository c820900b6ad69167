package link

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

var (
	// ErrFull says that all peer IDs of a link are taken.
	ErrFull = errors.New("all peers of the link are connected")
	// ErrTaken says that the one peer ID that was asked for is taken.
	ErrTaken = errors.New("the peer is connected already")
)

// State is everything a link remembers between two calls: one value that can
// be encoded as JSON. The index is the peer ID.
type State struct {
	Peers []PeerState `json:"peers"`
}

// PeerState is the state of one peer's device.
type PeerState struct {
	Present bool   `json:"present"`
	State   uint32 `json:"state"`
	// External says that the peer carries out the device itself, see
	// [Link.AttachExternal]. The link knows no Interrupt Control and no
	// one-shot mode of it.
	External bool `json:"external,omitempty"`
	// Enabled is bit 0 of Interrupt Control.
	Enabled bool `json:"interrupts_enabled"`
	// OneShot is bit 0 of Privileged Control.
	OneShot bool `json:"one_shot"`
}

// Interrupter raises an interrupt at the peer that it was attached with. It
// must not block and must not call the link: the link calls it with its lock
// held.
type Interrupter interface {
	Raise(vector uint16)
}

// Link is a link: a shared memory and the device model of its peers. It is
// safe for concurrent use.
type Link struct {
	config  Config
	layout  shmem.Layout
	file    *os.File
	sealed  bool
	created bool // the file, by us
	memory  *mem.Mapping
	table   *shmem.ReadWrite

	mu        sync.Mutex
	state     State
	raise     []Interrupter // by peer ID, nil where no peer is, or an external one
	taken     []bool        // by peer ID, also while a peer is on its way in
	lowest    uint32        // no ID below it is free
	present   []uint32      // in the order in which they came
	observers []Observer
	doorbell  *doorbells
	closed    bool
}

// New makes a link. Its shared memory is a memfd of exactly the layout's size,
// sealed, so that no peer can change its size under another.
//
// With a File it is that file, made with mode 0600 if it does not exist, and
// removed by Close then. One that exists has to belong to the user of this
// process and to be in use by no other link, and is overwritten with zeros.
// Such memory is not sealed: any peer that gets the descriptor can end the
// others (not the service) by making the file shorter.
func New(c Config) (*Link, error) {
	layout, err := c.Layout()
	if err != nil {
		return nil, err
	}
	c.StateTable = layout.StateTable
	l := &Link{
		config: c, layout: layout,
		state: State{Peers: make([]PeerState, c.Peers)},
		raise: make([]Interrupter, c.Peers),
		taken: make([]bool, c.Peers),
	}
	if err := l.allocate(); err != nil {
		l.Close()
		return nil, fmt.Errorf("shared memory of %d bytes: %w", layout.Total(), err)
	}
	return l, nil
}

// Close gives the shared memory back. Peers that have it mapped keep their
// mappings.
func (l *Link) Close() error {
	l.mu.Lock()
	closed, d := l.closed, l.doorbell
	l.closed, l.doorbell = true, nil
	l.mu.Unlock()
	if closed {
		return nil
	}
	if d != nil {
		d.close()
	}
	if l.memory != nil {
		l.memory.Close()
	}
	var err error
	if l.created {
		err = os.Remove(l.config.File)
	}
	if l.file != nil {
		err = errors.Join(err, l.file.Close())
	}
	return err
}

// Config returns the configuration, with the State Table size filled in.
func (l *Link) Config() Config { return l.config }

// Layout returns the layout of the shared memory.
func (l *Link) Layout() shmem.Layout { return l.layout }

// Memory is the whole shared memory. It belongs to the link.
func (l *Link) Memory() *shmem.Memory { return l.memory.Memory }

// Sealed reports whether nobody can change the size of the shared memory.
func (l *Link) Sealed() bool { return l.sealed }

// FD is the descriptor of the shared memory. It belongs to the link.
func (l *Link) FD() int { return int(l.file.Fd()) }

// interrupt delivers an event to a peer, or discards it. In one-shot mode
// the delivery consumes the enable. The caller holds l.mu.
func (l *Link) interrupt(id uint32, vector uint16) {
	p := &l.state.Peers[id]
	if p.External && l.doorbell != nil {
		l.doorbell.signal(id, vector)
	}
	if !p.Present || !p.Enabled {
		return
	}
	if p.OneShot {
		p.Enabled = false
	}
	l.raise[id].Raise(vector)
}

// ring carries out a doorbell. Targets and vectors out of range have no
// effect (specification, "Doorbell Register").
func (l *Link) ring(target, vector uint16) {
	if uint32(target) >= l.config.Peers || vector >= l.config.Vectors {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.interrupt(uint32(target), vector)
}

// setState carries out a write of v to the State register: the table entry is
// written in any case, the others are interrupted only if the value changed.
// The caller holds l.mu.
func (l *Link) setState(id uint32, v uint32) {
	l.storeEntry(id, v)
	p := &l.state.Peers[id]
	if p.State == v {
		return
	}
	p.State = v
	l.interruptOthers(id)
}

// interruptOthers raises vector 0 at all peers but one. The caller holds l.mu.
func (l *Link) interruptOthers(id uint32) {
	for _, other := range l.present {
		if other != id {
			l.interrupt(other, 0)
		}
	}
}

// Peer is a connected peer: its registers.
type Peer struct {
	link *Link
	id   uint32
}

// ID is the peer's ID.
func (p *Peer) ID() uint32 { return p.id }

// Link is the link that the peer is connected to.
func (p *Peer) Link() *Link { return p.link }

// Load reads a register. What is no register, or cannot be read, reads 0.
func (p *Peer) Load(r regs.Register) uint32 {
	l := p.link
	switch r {
	case regs.ID:
		return p.id
	case regs.MaxPeers:
		return l.config.Peers
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &l.state.Peers[p.id]
	switch {
	case r == regs.InterruptControl && s.Enabled:
		return regs.InterruptEnable
	case r == regs.State:
		return s.State
	}
	return 0
}

// Store writes a register. What is no register, or cannot be written, is
// left alone.
func (p *Peer) Store(r regs.Register, v uint32) {
	l := p.link
	if r == regs.DoorbellRegister {
		target, vector := regs.SplitDoorbell(v)
		l.ring(target, vector)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch r {
	case regs.InterruptControl:
		l.state.Peers[p.id].Enabled = v&regs.InterruptEnable != 0
	case regs.State:
		l.setState(p.id, v)
	}
}

// StateOf returns the state of any peer, from the link's own copy; that of an
// external peer from its entry of the State Table. It is 0 for IDs that do not
// exist.
func (p *Peer) StateOf(id uint32) uint32 {
	l := p.link
	if id >= l.config.Peers {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stateOf(id)
}

// SetOneShot sets Privileged Control bit 0.
func (p *Peer) SetOneShot(on bool) {
	l := p.link
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.Peers[p.id].OneShot = on
}

// Reset is a device reset: interrupts disabled, one-shot mode off, state 0
// through the normal path, so that the others are interrupted if it was not 0.
func (p *Peer) Reset() {
	l := p.link
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reset(p.id)
}

func (l *Link) reset(id uint32) {
	s := &l.state.Peers[id]
	s.Enabled, s.OneShot = false, false
	l.setState(id, 0)
}
