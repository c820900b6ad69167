package stream_test

import (
	"encoding/hex"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// board is a link of nothing but memory and eventfds, for what the service does
// not do: devices without interrupts, doorbells that nobody drops or delays,
// and a thousand links in a second.
type board struct {
	boardConfig
	memory []byte
	layout shmem.Layout

	mu     sync.Mutex
	states []uint32
	peers  []*boardPeer
}

type boardConfig struct {
	peers             uint32
	vectors           int
	readWrite, output uint64
	silent            bool // no interrupts
	// trap is what each look at a word of the State Table takes; may be nil.
	trap func()
	// delay is how long an interrupt is on its way.
	delay time.Duration
}

// boardPeer is the device of one peer: a back end.
type boardPeer struct {
	*board
	id       uint32
	config   []byte
	sections shmem.Sections
	fds      []int
	memory   *shmem.Memory
	closed   atomic.Bool
	control  uint32 // Interrupt Control
	dropped  int    // interrupts, for want of it
}

func newBoard(t testing.TB, c boardConfig) *board {
	t.Helper()
	layout, err := shmem.NewLayout(4096, c.readWrite, c.output, c.peers)
	if err != nil {
		t.Fatal(err)
	}
	// A mapping, as in earnest: what peers do to each other there is no race
	// of this program.
	memory, err := unix.Mmap(-1, 0, int(layout.Total()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(memory) })
	return &board{boardConfig: c, memory: memory, layout: layout, states: make([]uint32, c.peers), peers: make([]*boardPeer, c.peers)}
}

// device is a fresh device of a peer, as after a restart.
func (b *board) device(t testing.TB, id uint32, opts ...ivshmem.Option) *ivshmem.Device {
	t.Helper()
	p := &boardPeer{board: b, id: id, config: make([]byte, 256)}
	for at, row := range map[int]string{
		0x00: "0a110641 00001000 000000ff", 0x34: "40",
		0x40: "09601800 00100000", // State Table of 1000h bytes
		0x60: "11000000",          // MSI-X
	} {
		bytes, err := hex.DecodeString(strings.ReplaceAll(row, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		copy(p.config[at:], bytes)
	}
	p.config[0x62] = byte(b.vectors - 1)
	p.memory = must(shmem.NewMemory(b.board().memory))
	p.sections = shmem.Sections{Layout: b.layout, States: b}
	if b.readWrite > 0 {
		p.sections.ReadWrite = must(p.memory.ReadWrite(shmem.NameReadWrite, b.layout.ReadWriteOffset(), b.readWrite))
	}
	if b.output > 0 {
		p.sections.Output = must(p.memory.ReadWrite(shmem.NameOutput, b.layout.OutputOffset(id), b.output))
		p.sections.Inputs = must(p.memory.ReadOnly(shmem.NameInputs, b.layout.OutputOffset(0), b.output*uint64(b.board().boardConfig.peers)))
	}
	if !b.silent {
		for range b.vectors {
			p.fds = append(p.fds, must(unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)))
		}
	}
	b.mu.Lock()
	b.peers[id] = p
	b.mu.Unlock()
	d, err := ivshmem.New(p, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func (b *board) board() *board { return b }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Load is the State Table.
func (b *board) Load(peer uint32) (uint32, error) {
	if b.trap != nil {
		b.trap()
	}
	return atomic.LoadUint32(&b.states[peer]), nil
}

func (p *boardPeer) Address() string                { return "board" }
func (p *boardPeer) Driver() string                 { return "board" }
func (p *boardPeer) Config() ([]byte, error)        { return p.config, nil }
func (p *boardPeer) Sections() *shmem.Sections      { return &p.sections }
func (p *boardPeer) Interrupts() ivshmem.Interrupts { return ivshmem.Interrupts{FDs: p.fds} }

func (p *boardPeer) WriteConfig(offset int, v uint8) error {
	p.config[offset] = v
	return nil
}

func (p *boardPeer) oneShot() bool { return p.config[0x43]&1 != 0 }

func (p *boardPeer) Load(r regs.Register) (uint32, error) {
	switch {
	case p.closed.Load():
		return 0, os.ErrClosed
	case r == regs.MaxPeers:
		return uint32(len(p.states)), nil
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
		p.interrupt(v>>16, int(v&0xffff))
	case regs.State:
		p.setState(p.id, v)
	}
	return nil
}

// interrupt raises a vector. The caller holds b.mu.
func (b *board) interrupt(peer uint32, vector int) {
	p := b.peers[peer]
	if p == nil || vector >= len(p.fds) {
		return
	}
	if p.control == 0 {
		p.dropped++
		return
	}
	if p.oneShot() {
		p.control = 0
	}
	raise := func() { unix.Write(p.fds[vector], []byte{1, 0, 0, 0, 0, 0, 0, 0}) }
	if b.delay == 0 {
		raise()
		return
	}
	time.AfterFunc(b.delay, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if !p.closed.Load() {
			raise()
		}
	})
}

// setState sets a State, and tells the others. The caller holds b.mu.
func (b *board) setState(peer, v uint32) {
	if atomic.SwapUint32(&b.states[peer], v) == v {
		return
	}
	for other := range b.peers {
		if uint32(other) != peer {
			b.interrupt(uint32(other), 0)
		}
	}
}

// kill is the death of a peer: its State, and nothing else.
func (b *board) kill(peer uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.setState(peer, 0)
}

func (p *boardPeer) Close() error {
	if p.closed.Swap(true) {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.board.peers[p.id] == p {
		p.board.peers[p.id] = nil
	}
	for _, fd := range p.fds {
		unix.Close(fd)
	}
	return nil
}
