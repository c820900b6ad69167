package link

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

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

	// states is the peers' State registers, by peer ID. They are read and
	// written without mu: when one changes everybody looks at it, and where a
	// thousand stand in line for a lock on a busy machine, they wait for
	// seconds.
	states  []atomic.Uint64
	changed atomic.Int64 // whose state the others have not been told of, see tell
	// doorbell is set with mu held, once, and taken away by Close.
	doorbell atomic.Pointer[doorbells]

	telling sync.Mutex // taken outside mu
	others  []uint32   // of tell, which holds it

	mu        sync.Mutex
	state     State         // but for the State registers
	raise     []Interrupter // by peer ID, nil where no peer is, or an external one
	taken     []bool        // by peer ID, also while a peer is on its way in
	lowest    uint32        // no ID below it is free
	present   []uint32      // in the order in which they came
	observers []Observer
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
		states: make([]atomic.Uint64, c.Peers),
		state:  State{Peers: make([]PeerState, c.Peers)},
		raise:  make([]Interrupter, c.Peers),
		taken:  make([]bool, c.Peers),
	}
	l.changed.Store(nobody)
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
	closed, d := l.closed, l.doorbell.Swap(nil)
	l.closed = true
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
	if d := l.doorbell.Load(); d != nil && p.External {
		d.signal(id, vector)
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
// written in any case, the others have to be told only if the value changed.
// The caller holds the peer's lock, and calls tell when it has given it back.
func (l *Link) setState(id uint32, v uint32) {
	l.storeEntry(id, v)
	if l.states[id].Swap(uint64(v)) != uint64(v) {
		l.setChanged(id)
	}
}

// Values of Link.changed that are no ID.
const (
	nobody  = -1
	several = -2
)

// setChanged notes that the others have to be told of a peer's state, by tell.
func (l *Link) setChanged(id uint32) {
	for {
		old, now := l.changed.Load(), int64(several)
		if old == nobody || old == int64(id) {
			now = int64(id)
		}
		if l.changed.CompareAndSwap(old, now) {
			return
		}
	}
}

// tell raises vector 0 at all peers but the one whose state has changed. When
// it returns, they have been told of every state that was set before the call.
//
// Whoever is interrupted runs at once, and may push this thread off its CPU: a
// thousand of them take long. So the lock is given back in between, and of those
// who change their states meanwhile the first one tells for all.
func (l *Link) tell() {
	l.telling.Lock()
	defer l.telling.Unlock()
	changed := l.changed.Swap(nobody)
	if changed == nobody {
		return
	}
	l.mu.Lock()
	l.others = append(l.others[:0], l.present...)
	l.mu.Unlock()
	for some := range slices.Chunk(l.others, 64) {
		l.mu.Lock()
		for _, id := range some {
			if int64(id) != changed {
				l.interrupt(id, 0) // nothing, if it has left
			}
		}
		l.mu.Unlock()
	}
}

// Peer is a connected peer: its registers.
type Peer struct {
	link *Link
	id   uint32
	mu   sync.Mutex // guards writes of its state; taken outside the link's
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
	case regs.State:
		return l.stateOf(p.id)
	case regs.InterruptControl:
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.state.Peers[p.id].Enabled {
			return regs.InterruptEnable
		}
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
	switch r {
	case regs.InterruptControl:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.state.Peers[p.id].Enabled = v&regs.InterruptEnable != 0
	case regs.State:
		p.mu.Lock()
		l.setState(p.id, v)
		p.mu.Unlock()
		l.tell()
	}
}

// StateOf returns the state of any peer, from the link's own copy; that of an
// external peer from its entry of the State Table. It is 0 for IDs that do not
// exist.
func (p *Peer) StateOf(id uint32) uint32 {
	if id >= p.link.config.Peers {
		return 0
	}
	return p.link.stateOf(id)
}

// stateInTable in Link.states says that the state of a peer is what its entry of
// the State Table says: that of an external peer.
const stateInTable = 1 << 32

func (l *Link) stateOf(id uint32) uint32 {
	v := l.states[id].Load()
	if v == stateInTable {
		return l.loadEntry(id)
	}
	return uint32(v)
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
	p.mu.Lock()
	l.mu.Lock()
	l.reset(p.id)
	l.mu.Unlock()
	p.mu.Unlock()
	l.tell()
}

// reset is for a caller that holds both locks, and calls tell then.
func (l *Link) reset(id uint32) {
	s := &l.state.Peers[id]
	s.Enabled, s.OneShot = false, false
	l.setState(id, 0)
}
