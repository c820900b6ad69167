package virtio_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
)

// A model of Linux's front-end, written from the protocol page alone: its
// register writes, vectors, memory and rings, byte for byte.

var (
	errNoDevice = errors.New("ENODEV: back-end is not ready")
	errBackEnd  = errors.New("backend failed")
	errNoEntry  = errors.New("ENOENT: no such queue")
	errBroken   = errors.New("the queues are broken")
	errNoSpace  = errors.New("the section is full")
)

// killed is what the model panics with when it is killed.
type killed struct{}

// host is what a guest has of the link, as peer 1.
type host struct {
	vectors int
	// bind makes a device, and the R/W section as the guest maps it.
	bind  func() (hostDevice, []byte)
	ready func() bool // the back-end's State is 1
	alive func() bool // there may be a back-end again
}

type hostDevice interface {
	Store(r regs.Register, v uint32) error
	Interrupts() ivshmem.Interrupts
	Close() error
}

// linux is a guest with the driver.
type linux struct {
	testing.TB
	host
	b      *board // nil: the link is another
	p      hostDevice
	m      []byte        // R/W section
	step   func()        // before each store, nil: nothing
	accept uint64        // feature bits of the device type
	want   func() uint64 // what of the offered ring features it takes; nil: all
	// callbacks says which queues have one; nil: all.
	callbacks func(q int) bool

	features    uint64
	chunk       uint64
	bitmap      []bool
	queues      []*linuxQueue
	mode        linuxMode
	stop, ended chan struct{}
	wake        int // eventfd

	mu            sync.Mutex
	broken        bool
	configChanges int
	spurious      int // interrupts without an event byte
	cond          *sync.Cond
}

type linuxMode int

const (
	perQueue  linuxMode = iota
	twoShared           // configuration, and all queues
	oneShared
)

type linuxQueue struct {
	l                 *linux
	index             int
	n                 uint64
	deviceVector      uint16
	memory            uint64
	desc, avail, used uint64
	free              []uint16
	next, told, last  uint16
	requests          map[uint16]*linuxRequest
}

type linuxRequest struct {
	segments []linuxSegment
	ids      []uint16
	table    uint64 // indirect, 0: none
	tableLen uint64
	done     bool
	length   uint32
	in       []byte // what the device wrote
}

type linuxSegment struct {
	at  uint64
	n   uint64
	in  bool
	out []byte
}

// Shared memory, as the CPU accesses it.
func word32(p []byte, at uint64) *uint32 { return (*uint32)(unsafe.Pointer(&p[at&^3])) }

func get32(p []byte, at uint64) uint32 { return atomic.LoadUint32(word32(p, at)) }

func get16(p []byte, at uint64) uint16 { return uint16(get32(p, at) >> (at & 2 * 8)) }

func get8(p []byte, at uint64) uint8 { return uint8(get32(p, at) >> (at & 3 * 8)) }

func put32(p []byte, at uint64, v uint32) { atomic.StoreUint32(word32(p, at), v) }

func putPart(p []byte, at uint64, mask, v uint32) {
	shift := at & 3 * 8
	for {
		old := get32(p, at)
		if atomic.CompareAndSwapUint32(word32(p, at), old, old&^(mask<<shift)|v<<shift) {
			return
		}
	}
}

func put16(p []byte, at uint64, v uint16) { putPart(p, at, 0xffff, uint32(v)) }
func put8(p []byte, at uint64, v uint8)   { putPart(p, at, 0xff, uint32(v)) }

func newLinux(t testing.TB, b *board) *linux {
	l := &linux{TB: t, b: b, m: b.ReadWrite(), host: host{
		vectors: b.Vectors(),
		bind:    func() (hostDevice, []byte) { return b.Attach(t, 1, apart), b.ReadWrite() },
		ready:   func() bool { return b.State(0) == 1 },
		alive:   func() bool { return b.Alive(0) },
	}}
	l.cond = sync.NewCond(&l.mu)
	return l
}

func (l *linux) stepped() {
	if l.step != nil {
		l.step()
	}
}

func (l *linux) register(r regs.Register, v uint32) {
	l.stepped()
	l.p.Store(r, v)
}

// write is the handshake of section 3.
func (l *linux) write(at, width, v uint64) error {
	if err := l.idle(); err != nil {
		return err
	}
	l.stepped()
	switch width {
	case 1:
		put8(l.m, at, uint8(v))
	case 2:
		put16(l.m, at, uint16(v))
	case 4:
		if at%4 == 0 {
			put32(l.m, at, uint32(v))
		} else { // the unaligned one at 26h
			put16(l.m, at, uint16(v))
			put16(l.m, at+2, uint16(v>>16))
		}
	case 8:
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&l.m[at])), v)
	}
	l.stepped()
	put32(l.m, 8, uint32(at))
	l.stepped()
	l.ring(0)
	return nil
}

// idle spins until write_transaction is 0.
func (l *linux) idle() error {
	for deadline := time.Now().Add(30 * time.Second); ; {
		if !l.ready() {
			return errBackEnd
		}
		if get32(l.m, 8) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			l.Error("the guest's CPU spins for ever")
			return errBackEnd
		}
		time.Sleep(time.Microsecond)
	}
}

func (l *linux) ring(vector uint16) {
	if int(vector) < l.vectors { // others the hypervisor drops
		l.p.Store(regs.DoorbellRegister, uint32(vector))
	}
}

// probe binds the driver and a device driver that wants so many queues.
func (l *linux) probe(queues int) error {
	l.p, l.m = l.bind()
	l.broken, l.queues = false, nil
	if len(l.m) < 2*4096 {
		return fmt.Errorf("R/W section is too small")
	}
	if get32(l.m, 0) < 1 {
		return errNoDevice
	}
	l.initMemory(uint64(get32(l.m, 4)))
	if !l.ready() {
		return errNoDevice
	}
	l.register(regs.State, 1)
	// The virtio core: reset, acknowledge, features.
	for _, s := range []uint64{0, 1, 3} {
		if err := l.status(s); err != nil {
			return err
		}
	}
	if err := l.negotiate(); err != nil {
		return err
	}
	if err := l.status(0xb); err != nil {
		return err
	}
	if get32(l.m, 0x44)&8 == 0 {
		return fmt.Errorf("device refused features: %x", l.features)
	}
	if err := l.findQueues(queues); err != nil {
		return err
	}
	l.register(regs.InterruptControl, 1)
	if err := l.status(0xf); err != nil {
		return err
	}
	if !l.ready() { // it left before there were interrupts
		return errBackEnd
	}
	return nil
}

func (l *linux) status(s uint64) error { return l.write(0x44, 4, s) }

func (l *linux) negotiate() error {
	var offered uint64
	for _, sel := range []uint64{1, 0} {
		if err := l.write(0x10, 4, sel); err != nil {
			return err
		}
		if err := l.idle(); err != nil {
			return err
		}
		offered |= uint64(get32(l.m, 0x0c)) << (32 * sel)
	}
	if offered>>32&1 == 0 {
		return errors.New("virtio_ivshmem: device does not offer VERSION_1")
	}
	if offered>>33&1 == 0 {
		return errors.New("buffers would be out of the back-end's reach without ACCESS_PLATFORM")
	}
	if offered>>34&1 != 0 {
		return errors.New("packed rings are offered")
	}
	take := uint64(1<<32 | 1<<33 | 1<<36 | 1<<28 | 1<<29)
	if l.want != nil {
		take = l.want()
	}
	l.features = offered & (take | l.accept)
	for _, sel := range []uint64{1, 0} {
		if err := l.write(0x18, 4, sel); err != nil {
			return err
		}
		if err := l.write(0x14, 4, l.features>>(32*sel)&(1<<32-1)); err != nil {
			return err
		}
	}
	return nil
}

func (l *linux) findQueues(n int) error {
	with := 0
	for i := range n {
		if l.callbacks == nil || l.callbacks(i) {
			with++
		}
	}
	switch {
	case l.vectors >= with+1:
		l.mode = perQueue
	case l.vectors >= 2:
		l.mode = twoShared
	default:
		l.mode = oneShared
	}
	for i := range n {
		vector := uint64(i + 1)
		switch l.mode {
		case twoShared:
			vector = 1
		case oneShared:
			vector = 0
		}
		if l.mode == perQueue && l.callbacks != nil && !l.callbacks(i) {
			vector = 0xffff
		}
		if l.mode == perQueue && vector != 0xffff && int(vector) > with {
			// It counts all queues, and has vectors for those with a callback.
			return fmt.Errorf("queue %d: vector %d is beyond those that the driver has", i, vector)
		}
		q, err := l.setUp(i, vector)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		l.queues = append(l.queues, q)
	}
	var err error
	if l.wake, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return err
	}
	l.stop, l.ended = make(chan struct{}), make(chan struct{})
	go l.interrupts(l.p.Interrupts().FDs, l.stop, l.ended)
	return nil
}

func (l *linux) setUp(index int, vector uint64) (*linuxQueue, error) {
	if err := l.write(0x1c, 4, uint64(index)); err != nil {
		return nil, err
	}
	if err := l.idle(); err != nil {
		return nil, err
	}
	q := &linuxQueue{l: l, index: index, n: uint64(get16(l.m, 0x20)), deviceVector: get16(l.m, 0x22), requests: map[uint16]*linuxRequest{}}
	if get16(l.m, 0x26) != 0 || q.n == 0 {
		return nil, errNoEntry
	}
	for {
		// One block: descriptors, avail, used aligned to a cache line.
		used := (16*q.n + 2*(3+q.n) + 63) &^ 63
		at, err := l.alloc(used + 6 + 8*q.n)
		if err == nil {
			q.memory, q.desc, q.avail, q.used = at, at, at+16*q.n, at+used
			break
		}
		if q.n /= 2; q.n == 0 {
			return nil, err
		}
	}
	for i := range q.n {
		q.free = append(q.free, uint16(i))
	}
	for _, w := range [][3]uint64{{0x20, 2, q.n}, {0x24, 2, vector}, {0x28, 8, q.desc}, {0x30, 8, q.avail}, {0x38, 8, q.used}, {0x26, 2, 1}} {
		if err := l.write(w[0], w[1], w[2]); err != nil {
			return nil, err
		}
	}
	return q, nil
}

// remove unbinds the driver. Its register writes may fail.
func (l *linux) remove() {
	l.register(regs.State, 0)
	l.register(regs.InterruptControl, 0)
	l.status(0)
	for _, q := range l.queues {
		l.write(0x1c, 4, uint64(q.index))
		l.write(0x26, 4, 0)
	}
	l.halt()
	l.p.Close()
}

// halt stops the interrupts, as death does.
func (l *linux) halt() {
	if l.stop != nil {
		close(l.stop)
		unix.Write(l.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		<-l.ended
		unix.Close(l.wake)
		l.stop = nil
	}
}
