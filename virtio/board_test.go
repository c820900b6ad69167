package virtio_test

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

// wiring is how interrupts of a board arrive.
type wiring int

const (
	apart    wiring = iota // a descriptor for each vector
	merged                 // one for all, as behind uio_ivshmem, in one-shot mode
	oneShots               // a descriptor for each vector, in one-shot mode
	silent                 // none
	vector0                // only those of vector 0
)

// board is a link of two peers that is nothing but memory and eventfds, for what
// the service does not do, and for a thousand links in a second.
type board struct {
	memory   []byte // R/W section
	layout   shmem.Layout
	vectors  int
	protocol regs.Protocol

	mu     sync.Mutex
	states [2]uint32
	peers  [2]*boardPeer
	rung   [2][16]int // doorbells, by peer and vector
}

// boardPeer is the device of one peer: a back end.
type boardPeer struct {
	*board
	id       uint32
	wiring   wiring
	config   []byte
	sections shmem.Sections
	fds      []int
	control  uint32 // Interrupt Control
	closed   atomic.Bool
}

func newBoard(t testing.TB, protocol regs.Protocol, rw uint64, vectors int) *board {
	t.Helper()
	layout, err := shmem.NewLayout(4096, rw, 0, 2)
	if err != nil {
		t.Fatal(err)
	}
	// A mapping, as in earnest: what peers do to each other there is no race of
	// this program.
	memory, err := unix.Mmap(-1, 0, int(rw), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(memory) })
	return &board{memory: memory, layout: layout, vectors: vectors, protocol: protocol}
}

// peer is a fresh device of a peer, as after a restart.
func (b *board) peer(t testing.TB, id uint32, w wiring) *ivshmem.Device {
	t.Helper()
	var opts []ivshmem.Option
	if w == oneShots {
		opts = append(opts, ivshmem.WithOneShot())
	}
	d, err := ivshmem.New(b.attach(t, id, w), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// attach is what the device is made of.
func (b *board) attach(t testing.TB, id uint32, w wiring) *boardPeer {
	t.Helper()
	p := &boardPeer{board: b, id: id, wiring: w, config: make([]byte, 256)}
	class := b.protocol.ForPeer(id)
	copy(p.config, []byte{0x0a, 0x11, 0x06, 0x41, 6: 0x10, 9: byte(class), byte(class >> 8), 0xff})
	p.config[0x34] = 0x40
	copy(p.config[0x40:], []byte{9, 0x60, 0x18, 0, 0, 0x10}) // State Table of 1000h bytes
	copy(p.config[0x60:], []byte{0x11, 0, byte(b.vectors - 1)})
	memory, err := shmem.NewMemory(b.memory)
	if err != nil {
		t.Fatal(err)
	}
	p.sections = shmem.Sections{Layout: b.layout, States: b}
	if b.layout.ReadWrite > 0 {
		if p.sections.ReadWrite, err = memory.ReadWrite(shmem.NameReadWrite, 0, b.layout.ReadWrite); err != nil {
			t.Fatal(err)
		}
	}
	fds := map[wiring]int{apart: b.vectors, oneShots: b.vectors, merged: 1, vector0: 1}[w]
	for range fds {
		fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		p.fds = append(p.fds, fd)
	}
	b.mu.Lock()
	b.peers[id] = p
	b.mu.Unlock()
	return p
}

func (p *boardPeer) Address() string           { return "board" }
func (p *boardPeer) Driver() string            { return "board" }
func (p *boardPeer) Config() ([]byte, error)   { return p.config, nil }
func (p *boardPeer) Sections() *shmem.Sections { return &p.sections }

func (p *boardPeer) Interrupts() ivshmem.Interrupts {
	return ivshmem.Interrupts{FDs: p.fds, Shared: p.wiring == merged}
}

func (p *boardPeer) WriteConfig(offset int, v uint8) error {
	p.config[offset] = v
	return nil
}

// Load is the State Table.
func (b *board) Load(peer uint32) (uint32, error) { return atomic.LoadUint32(&b.states[peer]), nil }

func (p *boardPeer) Load(r regs.Register) (uint32, error) {
	switch {
	case p.closed.Load():
		return 0, os.ErrClosed
	case r == regs.MaxPeers:
		return 2, nil
	}
	return p.id, nil
}

func (p *boardPeer) Store(r regs.Register, v uint32) error {
	if p.closed.Load() {
		return os.ErrClosed
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch r {
	case regs.InterruptControl:
		p.control = v
	case regs.DoorbellRegister:
		p.rung[v>>16&1][v&15]++
		p.interrupt(v>>16, int(v&0xffff))
	case regs.State:
		p.setState(p.id, v)
	}
	return nil
}

// interrupt raises a vector. The caller holds b.mu.
func (b *board) interrupt(peer uint32, vector int) {
	p := b.peers[peer]
	if p == nil || p.control == 0 || vector >= b.vectors {
		return
	}
	if p.config[0x43]&1 != 0 {
		p.control = 0
	}
	switch {
	case p.wiring == merged:
		vector = 0
	case vector >= len(p.fds):
		return
	}
	unix.Write(p.fds[vector], []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// setState sets a State, and tells the other. The caller holds b.mu.
func (b *board) setState(peer, v uint32) {
	if atomic.SwapUint32(&b.states[peer], v) != v {
		b.interrupt(1-peer, 0)
	}
}

// doorbells is how often a vector of a peer was rung.
func (b *board) doorbells(peer uint32, vector int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rung[peer][vector]
}

// alive reports whether a peer is there.
func (b *board) alive(peer uint32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.peers[peer] != nil
}

// kill is the death of a peer: its State, and nothing else. Its device works no
// more.
func (b *board) kill(peer uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.peers[peer]; p != nil {
		p.closed.Store(true)
		b.peers[peer] = nil
	}
	b.setState(peer, 0)
}

func (p *boardPeer) Close() error {
	p.closed.Store(true)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.board.peers[p.id] == p {
		p.board.peers[p.id] = nil
	}
	for _, fd := range p.fds {
		unix.Close(fd)
	}
	p.fds = nil
	return nil
}

// until waits for a condition.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !f(); time.Sleep(20 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: ", what)
		}
	}
}
