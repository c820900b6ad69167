// Package boardtest is a link that is nothing but memory and eventfds, for
// tests of what the service does not do: devices without interrupts, or with one
// for all vectors, doorbells that nobody drops or delays, peers that die between
// two instructions, and a thousand links in a second.
package boardtest

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Wiring is how the interrupts of a device arrive.
type Wiring int

const (
	Apart    Wiring = iota // a descriptor for each vector
	Merged                 // one for all, as behind uio_ivshmem, in one-shot mode
	OneShots               // a descriptor for each vector, in one-shot mode
	Silent                 // none
	Vector0                // only those of vector 0
)

// Config is what a board has.
type Config struct {
	Peers             uint32 // 0: 2
	Vectors           int
	Protocol          regs.Protocol
	ReadWrite, Output uint64 // sizes of the sections in bytes
	// Trap is what each look at a word of the State Table takes; may be nil.
	Trap func()
	// Delay is how long an interrupt is on its way.
	Delay time.Duration
}

// stateTable is the size of the State Table in bytes.
const stateTable = 4096

// Board is a link.
type Board struct {
	Layout shmem.Layout
	Memory []byte // all sections

	config Config

	mu     sync.Mutex
	states []uint32
	peers  []*Peer
	rung   []map[int]int // doorbells by peer and vector
}

// New makes a board that lasts as long as the test.
func New(t testing.TB, c Config) *Board {
	t.Helper()
	if c.Peers == 0 {
		c.Peers = 2
	}
	layout, err := shmem.NewLayout(stateTable, c.ReadWrite, c.Output, c.Peers)
	if err != nil {
		t.Fatal(err)
	}
	// A mapping, as in earnest: what peers do to each other there is no race of
	// this program.
	memory, err := unix.Mmap(-1, 0, int(layout.Total()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(memory) })
	b := &Board{Layout: layout, Memory: memory, config: c, states: make([]uint32, c.Peers), peers: make([]*Peer, c.Peers)}
	for range c.Peers {
		b.rung = append(b.rung, map[int]int{})
	}
	return b
}

// Vectors is how many vectors each peer has.
func (b *Board) Vectors() int { return b.config.Vectors }

// ReadWrite is the R/W section.
func (b *Board) ReadWrite() []byte {
	return b.Memory[b.Layout.ReadWriteOffset():][:b.Layout.ReadWrite]
}

// Output is the output section of a peer.
func (b *Board) Output(peer uint32) []byte {
	return b.Memory[b.Layout.OutputOffset(peer):][:b.Layout.Output]
}

// Device is a fresh device of a peer, as after a restart.
func (b *Board) Device(t testing.TB, id uint32, w Wiring) *ivshmem.Device {
	t.Helper()
	var opts []ivshmem.Option
	if w == OneShots {
		opts = append(opts, ivshmem.WithOneShot())
	}
	d, err := ivshmem.New(b.Attach(t, id, w), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// Peer is what the device of a peer is made of: a back end.
type Peer struct {
	board    *Board
	id       uint32
	wiring   Wiring
	config   []byte
	sections shmem.Sections
	fds      []int
	control  uint32 // Interrupt Control
	closed   atomic.Bool
	loads    atomic.Int64
	script   atomic.Pointer[func() uint32]
}

// Attach is Device without what package ivshmem adds.
func (b *Board) Attach(t testing.TB, id uint32, w Wiring) *Peer {
	t.Helper()
	p := &Peer{board: b, id: id, wiring: w, config: make([]byte, 256)}
	class := b.config.Protocol.ForPeer(id)
	copy(p.config, []byte{0x0a, 0x11, 0x06, 0x41, 6: 0x10, 9: byte(class), byte(class >> 8), 0xff})
	p.config[0x34] = 0x40
	copy(p.config[0x40:], []byte{9, 0x60, 0x18, 0, 0, stateTable >> 8})
	copy(p.config[0x60:], []byte{0x11, 0, byte(b.config.Vectors - 1)})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	memory, err := shmem.NewMemory(b.Memory)
	must(err)
	l := b.Layout
	p.sections = shmem.Sections{Layout: l, States: p.table()}
	if l.ReadWrite > 0 {
		p.sections.ReadWrite, err = memory.ReadWrite(shmem.NameReadWrite, l.ReadWriteOffset(), l.ReadWrite)
		must(err)
	}
	if l.Output > 0 {
		p.sections.Output, err = memory.ReadWrite(shmem.NameOutput, l.OutputOffset(id), l.Output)
		must(err)
		p.sections.Inputs, err = memory.ReadOnly(shmem.NameInputs, l.OutputOffset(0), l.Output*uint64(len(b.peers)))
		must(err)
	}
	fds := map[Wiring]int{Apart: b.config.Vectors, OneShots: b.config.Vectors, Merged: 1, Vector0: 1}[w]
	for range fds {
		fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		must(err)
		p.fds = append(p.fds, fd)
	}
	b.mu.Lock()
	b.peers[id] = p
	b.mu.Unlock()
	t.Cleanup(func() { p.Close() })
	return p
}

func (p *Peer) Address() string           { return "board" }
func (p *Peer) Driver() string            { return "board" }
func (p *Peer) Config() ([]byte, error)   { return p.config, nil }
func (p *Peer) Sections() *shmem.Sections { return &p.sections }

func (p *Peer) Interrupts() ivshmem.Interrupts {
	return ivshmem.Interrupts{FDs: p.fds, Shared: p.wiring == Merged}
}

func (p *Peer) WriteConfig(offset int, v uint8) error {
	p.config[offset] = v
	return nil
}

// table is the State Table as a device sees it.
type table struct{ p *Peer }

func (p *Peer) table() table { return table{p} }

func (s table) Load(peer uint32) (uint32, error) {
	s.p.loads.Add(1)
	if trap := s.p.board.config.Trap; trap != nil {
		trap()
	}
	if script := s.p.script.Load(); script != nil {
		return (*script)(), nil
	}
	return s.p.board.State(peer), nil
}

func (p *Peer) Load(r regs.Register) (uint32, error) {
	switch {
	case p.closed.Load():
		return 0, os.ErrClosed
	case r == regs.MaxPeers:
		return uint32(len(p.board.peers)), nil
	}
	return p.id, nil
}

func (p *Peer) Store(r regs.Register, v uint32) error {
	if p.closed.Load() {
		return os.ErrClosed
	}
	b := p.board
	b.mu.Lock()
	defer b.mu.Unlock()
	switch r {
	case regs.InterruptControl:
		p.control = v
	case regs.DoorbellRegister:
		if peer, vector := v>>16, int(v&0xffff); peer < uint32(len(b.peers)) {
			b.rung[peer][vector]++
			b.interrupt(peer, vector)
		}
	case regs.State:
		b.setState(p.id, v)
	}
	return nil
}

func (p *Peer) Close() error {
	p.closed.Store(true)
	b := p.board
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forget(p)
	return nil
}

// forget takes a peer from the board. The caller holds mu.
func (b *Board) forget(p *Peer) {
	if b.peers[p.id] == p {
		b.peers[p.id] = nil
	}
	for _, fd := range p.fds {
		unix.Close(fd)
	}
	p.fds = nil
}

// interrupt raises a vector. The caller holds mu.
func (b *Board) interrupt(peer uint32, vector int) {
	p := b.peers[peer]
	if p == nil || p.control == 0 || vector >= b.config.Vectors {
		return
	}
	if p.config[0x43]&1 != 0 {
		p.control = 0
	}
	if p.wiring == Merged {
		vector = 0
	}
	raise := func() {
		if vector < len(p.fds) {
			unix.Write(p.fds[vector], []byte{1, 0, 0, 0, 0, 0, 0, 0})
		}
	}
	if b.config.Delay == 0 {
		raise()
		return
	}
	time.AfterFunc(b.config.Delay, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		raise()
	})
}

// setState sets a State, and tells the others. The caller holds mu.
func (b *Board) setState(peer, v uint32) {
	if atomic.SwapUint32(&b.states[peer], v) == v {
		return
	}
	for other := range b.peers {
		if uint32(other) != peer {
			b.interrupt(uint32(other), 0)
		}
	}
}
