package virtio_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

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

// linux is a guest with the driver.
type linux struct {
	testing.TB
	b      *board
	p      *boardPeer
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
	l := &linux{TB: t, b: b, m: b.memory}
	l.cond = sync.NewCond(&l.mu)
	return l
}

func (l *linux) stepped() {
	if l.step != nil {
		l.step()
	}
}

func (l *linux) ready() bool { return atomic.LoadUint32(&l.b.states[0]) == 1 }

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
	if int(vector) < l.b.vectors { // others the hypervisor drops
		l.p.Store(regs.DoorbellRegister, uint32(vector))
	}
}

// probe binds the driver and a device driver that wants so many queues.
func (l *linux) probe(queues int) error {
	l.p = l.b.attach(l, 1, apart)
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
	case l.b.vectors >= with+1:
		l.mode = perQueue
	case l.b.vectors >= 2:
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
	go l.interrupts(l.p.fds, l.stop, l.ended)
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

// initMemory is the allocator of section 7.
func (l *linux) initMemory(block uint64) {
	size := uint64(len(l.m))
	l.chunk = min(max(size/4096, 64), 4096)
	if l.chunk&(l.chunk-1) != 0 {
		l.chunk = 1 << bits.Len64(l.chunk)
	}
	l.bitmap = make([]bool, size/l.chunk)
	for i := range l.chunks(block) {
		l.bitmap[i] = true
	}
}

func (l *linux) chunks(n uint64) uint64 {
	c := (n + l.chunk - 1) / l.chunk
	return 1 << bits.Len64(c-1)
}

func (l *linux) alloc(n uint64) (uint64, error) {
	c := l.chunks(n)
next:
	for at := uint64(0); at+c <= uint64(len(l.bitmap)); at += c {
		for _, taken := range l.bitmap[at : at+c] {
			if taken {
				continue next
			}
		}
		for i := range c {
			l.bitmap[at+i] = true
		}
		l.stepped()
		clear(l.m[at*l.chunk : (at+c)*l.chunk])
		return at * l.chunk, nil
	}
	return 0, errNoSpace
}

func (l *linux) release(at, n uint64) {
	for i := range l.chunks(n) {
		l.bitmap[at/l.chunk+i] = false
	}
}

// interrupts runs the handlers of section 6.
func (l *linux) interrupts(fds []int, stop, ended chan struct{}) {
	defer close(ended)
	poll := []unix.PollFd{{Fd: int32(l.wake), Events: unix.POLLIN}}
	for _, fd := range fds {
		poll = append(poll, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	for {
		unix.Poll(poll, -1)
		select {
		case <-stop:
			return
		default:
		}
		for i, p := range poll[1:] {
			if p.Revents&unix.POLLIN == 0 {
				continue
			}
			var n [8]byte
			unix.Read(int(p.Fd), n[:])
			l.mu.Lock()
			l.handle(i)
			l.cond.Broadcast()
			l.mu.Unlock()
		}
	}
}

// handle is an interrupt. The caller holds mu.
func (l *linux) handle(vector int) {
	if vector == 0 {
		if !l.ready() {
			l.broken = true
			put8(l.m, 0x40, 0)
			put8(l.m, 0x41, 0)
			return
		}
		if get8(l.m, 0x40)&1 != 0 {
			put8(l.m, 0x40, 0)
			l.configChanges++
		}
		if l.mode != oneShared {
			return
		}
	}
	if l.mode == perQueue {
		if vector-1 < len(l.queues) {
			l.queues[vector-1].callback()
		}
		return
	}
	if get8(l.m, 0x41)&1 == 0 {
		l.spurious++
		return
	}
	put8(l.m, 0x41, 0)
	for _, q := range l.queues {
		q.callback()
	}
}

func (l *linux) eventIdx() bool { return l.features>>29&1 != 0 }

// callback takes what is used: with callbacks disabled, and again once they are
// enabled. The caller holds mu.
func (q *linuxQueue) callback() {
	m := q.l.m
	for {
		if !q.l.eventIdx() {
			put16(m, q.avail, 1)
		}
		for q.last != get16(m, q.used+2) {
			q.take()
		}
		if !q.l.eventIdx() {
			put16(m, q.avail, 0)
		} else {
			put16(m, q.avail+4+2*q.n, q.last)
		}
		if q.last == get16(m, q.used+2) {
			return
		}
	}
}

// take takes a used buffer.
func (q *linuxQueue) take() {
	l := q.l
	at := q.used + 4 + 8*(uint64(q.last)%q.n)
	id, n := uint16(get32(l.m, at)), get32(l.m, at+4)
	q.last++
	r := q.requests[id]
	if r == nil {
		l.Errorf("queue %d: id %d is not a head", q.index, id)
		return
	}
	delete(q.requests, id)
	for _, s := range r.segments {
		if s.in {
			r.in = append(r.in, l.m[s.at:s.at+s.n]...)
		}
		l.release(s.at, s.n)
	}
	if r.table != 0 {
		l.release(r.table, r.tableLen)
	}
	q.free = append(q.free, r.ids...)
	r.length, r.done = n, true
}

// add maps and adds a request: bytes for the device, then lengths of what it
// writes. The caller holds mu.
func (q *linuxQueue) add(out [][]byte, in ...int) (*linuxRequest, error) {
	l := q.l
	r := &linuxRequest{}
	total := len(out) + len(in)
	indirect := l.features>>28&1 != 0 && total > 1
	need := total
	if indirect {
		need = 1
	}
	if need > len(q.free) {
		return nil, errNoSpace
	}
	for i := range total {
		var s linuxSegment
		if i < len(out) {
			s = linuxSegment{n: uint64(len(out[i])), out: out[i]}
		} else {
			s = linuxSegment{n: uint64(in[i-len(out)]), in: true}
		}
		var err error
		if s.at, err = l.alloc(s.n); err != nil {
			for _, s := range r.segments {
				l.release(s.at, s.n)
			}
			return nil, err
		}
		copy(l.m[s.at:], s.out)
		r.segments = append(r.segments, s)
	}
	table := make([]byte, 16*total)
	r.ids, q.free = append(r.ids, q.free[:need]...), q.free[need:]
	for i, s := range r.segments {
		next, flags := uint16(i+1), uint16(0)
		if !indirect && i+1 < total {
			next = r.ids[i+1]
		}
		if i+1 < total {
			flags |= 1
		}
		if s.in {
			flags |= 2
		}
		putDescriptor(table[16*i:], s.at, uint32(s.n), flags, next)
	}
	if indirect {
		var err error
		if r.table, err = l.alloc(uint64(len(table))); err != nil {
			q.free = append(q.free, r.ids...)
			for _, s := range r.segments {
				l.release(s.at, s.n)
			}
			return nil, err
		}
		r.tableLen = uint64(len(table))
		copy(l.m[r.table:], table)
		table = make([]byte, 16)
		putDescriptor(table, r.table, uint32(r.tableLen), 4, 0)
	}
	for i, id := range r.ids {
		copy(l.m[q.desc+16*uint64(id):], table[16*i:16*i+16])
	}
	q.requests[r.ids[0]] = r
	l.stepped()
	put16(l.m, q.avail+4+2*(uint64(q.next)%q.n), r.ids[0])
	q.next++
	l.stepped()
	put16(l.m, q.avail+2, q.next)
	return r, nil
}

func putDescriptor(p []byte, at uint64, n uint32, flags, next uint16) {
	binary.LittleEndian.PutUint64(p, at)
	binary.LittleEndian.PutUint32(p[8:], n)
	binary.LittleEndian.PutUint16(p[12:], flags)
	binary.LittleEndian.PutUint16(p[14:], next)
}

// kick rings if the device wants it.
func (q *linuxQueue) kick() {
	m := q.l.m
	old := q.told
	q.told = q.next
	q.l.stepped()
	if q.l.eventIdx() {
		event := get16(m, q.used+4+8*q.n)
		if q.next-event-1 >= q.next-old {
			return
		}
	} else if get16(m, q.used)&1 != 0 {
		return
	}
	q.l.ring(q.deviceVector)
}

// request adds a request, kicks and sleeps until its callback.
func (q *linuxQueue) request(out [][]byte, in ...int) (*linuxRequest, error) {
	l := q.l
	l.mu.Lock()
	defer l.mu.Unlock()
	r, err := q.add(out, in...)
	if err != nil {
		return nil, err
	}
	q.kick()
	return r, q.await(r)
}

// await sleeps until a request is done. The caller holds mu.
func (q *linuxQueue) await(r *linuxRequest) error {
	l := q.l
	late := time.AfterFunc(30*time.Second, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if !r.done && !l.broken {
			l.Errorf("queue %d: a request hangs", q.index)
		}
		l.broken = true
		l.cond.Broadcast()
	})
	defer late.Stop()
	for !r.done {
		if l.broken {
			return errBroken
		}
		l.cond.Wait()
	}
	return nil
}
