package link

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// ErrFull says that all peer IDs of a link are taken.
var ErrFull = errors.New("all peers of the link are connected")

// State is everything a link remembers between two calls: one value that can
// be encoded as JSON. The index is the peer ID.
type State struct {
	Peers []PeerState `json:"peers"`
}

// PeerState is the state of one peer's device.
type PeerState struct {
	Present bool   `json:"present"`
	State   uint32 `json:"state"`
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
	config Config
	layout shmem.Layout
	file   *os.File
	memory *mem.Mapping
	table  *shmem.ReadWrite

	mu       sync.Mutex
	state    State
	raise    []Interrupter // by peer ID, nil where no peer is
	doorbell *doorbells
	closed   bool
}

// New makes a link with fresh, zeroed shared memory: a memfd of exactly the
// layout's size, sealed, so that no peer can change its size under another.
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
	}
	if err := l.allocate(); err != nil {
		l.Close()
		return nil, fmt.Errorf("shared memory of %d bytes: %w", layout.Total(), err)
	}
	return l, nil
}

func (l *Link) allocate() error {
	fd, err := unix.MemfdCreate("ivshmem", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	l.file = os.NewFile(uintptr(fd), "ivshmem")
	size := l.layout.Total()
	if err := l.file.Truncate(int64(size)); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	if l.memory, err = mem.Map(fd, 0, size, true); err != nil {
		return err
	}
	l.table, err = l.memory.Memory.ReadWrite(shmem.NameStateTable, 0, l.layout.StateTable)
	return err
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
	if l.file != nil {
		return l.file.Close()
	}
	return nil
}

// Config returns the configuration, with the State Table size filled in.
func (l *Link) Config() Config { return l.config }

// Layout returns the layout of the shared memory.
func (l *Link) Layout() shmem.Layout { return l.layout }

// Memory is the whole shared memory. It belongs to the link.
func (l *Link) Memory() *shmem.Memory { return l.memory.Memory }

// FD is the descriptor of the shared memory. It belongs to the link.
func (l *Link) FD() int { return int(l.file.Fd()) }

// Snapshot returns a copy of the link's state.
func (l *Link) Snapshot() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return State{Peers: append([]PeerState(nil), l.state.Peers...)}
}

// Attach connects a peer under the lowest free ID. It has state 0 and
// disabled interrupts; the others notice it when it sets a state. Without a
// free ID the error wraps [ErrFull].
func (l *Link) Attach(i Interrupter) (*Peer, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id := range l.state.Peers {
		p := &l.state.Peers[id]
		if p.Present {
			continue
		}
		*p = PeerState{Present: true}
		l.raise[id] = i
		return &Peer{link: l, id: uint32(id)}, nil
	}
	return nil, fmt.Errorf("link of %d peers: %w", len(l.state.Peers), ErrFull)
}

// interrupt delivers an event to a peer, or discards it. In one-shot mode
// the delivery consumes the enable. The caller holds l.mu.
func (l *Link) interrupt(id uint32, vector uint16) {
	p := &l.state.Peers[id]
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
// The atomic store is a full barrier, as the specification's order demands.
// The caller holds l.mu.
func (l *Link) setState(id uint32, v uint32) {
	// The table is the link's own mapping, so the store fails only after
	// Close; the state proper is in l.state.
	l.table.Store32(4*uint64(id), v)
	p := &l.state.Peers[id]
	if p.State == v {
		return
	}
	p.State = v
	for other := range l.state.Peers {
		if uint32(other) != id {
			l.interrupt(uint32(other), 0)
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

// StateOf returns the state of any peer, from the link's own copy. It is 0
// for IDs that do not exist.
func (p *Peer) StateOf(id uint32) uint32 {
	l := p.link
	if id >= l.config.Peers {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.Peers[id].State
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

// Detach disconnects the peer: a reset, and its ID is free again. The peer
// must not be used afterwards.
func (p *Peer) Detach() {
	l := p.link
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reset(p.id)
	if l.doorbell != nil {
		// Before the ID is free: the next peer may be direct at once.
		l.doorbell.indirect(p.id)
	}
	l.state.Peers[p.id].Present = false
	l.raise[p.id] = nil
}
