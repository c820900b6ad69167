package vnet_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem"
)

// linuxDriver is a model of the ivshmem-net driver of Linux, made from the
// protocol page: what it does, in the order in which it does it, its faults
// included. It acts on interrupts only, and on what the system asks for.
type linuxDriver struct {
	shared
	mtu     int
	deliver func([]byte)
	cancel  context.CancelFunc
	all     sync.WaitGroup

	// The states. machine comes before napi, that before tx.
	machine sync.Mutex
	state   uint32
	last    int64 // the peer's, when it was last looked at, or unknown
	isUp    bool  // the interface
	// early says that it runs, and began when the peer was not READY: it was
	// brought up then. It has read, and returned, what was left in its section.
	early bool

	napi      sync.Mutex // receiving
	running   bool
	lastAvail uint16
	usedIndex uint16
	completed int
	buffer    []byte

	tx                     sync.Mutex // sending
	awake                  *sync.Cond
	stopped                bool // the system's queue
	on                     bool // carrier
	freeHead               uint16
	free                   uint64
	availIndex, lastUsed   uint16
	added                  uint16 // published, and the peer not notified
	head, tail             uint64 // of the data
	counts                 tally
	receivedHere, rungHere uint64 // of counts, under napi
}

// unknown is no State.
const unknown = -1

// slotBytes is what a frame of n bytes has of the data.
func slotBytes(n uint64) uint64 { return (18 + n + 63) &^ 63 }

const pollBudget = 64

// loadLinux is the driver's start. Its interface is down.
func loadLinux(dev *ivshmem.Device, mtu int, deliver func([]byte)) driver {
	ctx, cancel := context.WithCancel(context.Background())
	m := &linuxDriver{shared: share(dev), mtu: mtu, deliver: deliver, cancel: cancel, last: unknown, buffer: make([]byte, 1<<17)}
	m.awake = sync.NewCond(&m.tx)
	m.stopped = true
	m.set(0)
	if m.vectors == 1 { // INTx
		m.all.Go(func() { m.interrupts(ctx, []int{0}, func() { m.look(); m.poll() }) })
	} else {
		m.all.Go(func() { m.interrupts(ctx, []int{0}, m.look) })
		m.all.Go(func() { m.interrupts(ctx, []int{1}, m.poll) })
	}
	m.look()
	return m
}

// end is the end of the driver: in order, or of the system with it.
func (m *linuxDriver) end(kill bool) {
	m.cancel()
	if !kill {
		m.down()
	}
	m.machine.Lock()
	m.isUp = false // nothing starts any more
	m.halt()
	m.machine.Unlock()
	m.all.Wait()
}

func (m *linuxDriver) set(state uint32) {
	m.state = state
	m.dev.SetState(state)
}

// look is what the interrupt of a state change leads to.
func (m *linuxDriver) look() {
	m.machine.Lock()
	defer m.machine.Unlock()
	peer, err := m.dev.State(m.peer)
	if err != nil || int64(peer) == m.last {
		return
	}
	m.last = int64(peer)
	switch m.state {
	case 0:
		if peer < 2 {
			m.set(1)
		}
	case 1:
		if peer > 0 {
			m.initialise()
			m.set(2)
		}
	case 2, 3:
		if peer >= 2 {
			m.run()
		} else if peer == 0 {
			m.stop()
		}
	}
}

func (m *linuxDriver) initialise() {
	m.napi.Lock()
	m.tx.Lock()
	clear(m.own)
	for i := range m.n - 1 {
		binary.LittleEndian.PutUint16(m.own[16*i+14:], uint16(i+1))
	}
	m.freeHead, m.free = 0, m.n
	m.availIndex, m.lastUsed, m.added, m.head, m.tail = 0, 0, 0, 0, 0
	m.lastAvail, m.usedIndex = 0, 0
	m.early = false
	m.tx.Unlock()
	m.napi.Unlock()
}

// run starts, if there is what that needs. The caller holds machine.
func (m *linuxDriver) run() {
	if m.state < 2 || !m.isUp {
		return
	}
	m.napi.Lock()
	started := !m.running
	m.running = true
	m.tx.Lock()
	m.on = m.on || m.last == 3
	if started {
		m.stopped = false
		peer, _ := m.dev.State(m.peer)
		if m.early = peer < 2; m.early {
			m.counts.early++
		}
	}
	m.awake.Broadcast()
	m.tx.Unlock()
	m.napi.Unlock()
	if started {
		m.poll()
		m.set(3)
	}
}

// stop goes to RESET. The caller holds machine.
func (m *linuxDriver) stop() {
	m.set(0)
	m.halt()
}

// halt ends what runs.
func (m *linuxDriver) halt() {
	m.napi.Lock()
	m.tx.Lock()
	if m.running {
		m.counts.resets++
	}
	m.running, m.on, m.stopped = false, false, true
	m.awake.Broadcast()
	m.tx.Unlock()
	m.napi.Unlock()
}

func (m *linuxDriver) up() {
	m.machine.Lock()
	defer m.machine.Unlock()
	m.isUp = true
	m.run()
}

func (m *linuxDriver) down() {
	m.machine.Lock()
	defer m.machine.Unlock()
	m.isUp = false
	m.stop()
}

func (m *linuxDriver) carrier() bool {
	m.tx.Lock()
	defer m.tx.Unlock()
	return m.on
}

// fault is that it started early; or that it went down before the peer saw that
// it had gone on, so that both wait for a change of the other.
func (m *linuxDriver) fault() string {
	m.machine.Lock()
	defer m.machine.Unlock()
	peer, _ := m.dev.State(m.peer)
	switch {
	case m.early:
		return "started before the peer was READY"
	case m.state == 0 && peer == 1 && m.last == 1:
		return "waits for a change that has been"
	}
	return ""
}

// Sending.

// advance is where a frame of n bytes goes that comes after a position.
func (m *linuxDriver) advance(at *uint64, n uint64) uint64 {
	p := *at
	if m.data-p < slotBytes(n) {
		p = 0
	}
	*at = p + slotBytes(n)
	return p
}

// room is "tx ok".
func (m *linuxDriver) room() bool {
	space := max(m.data-m.head, m.tail)
	if m.head < m.tail {
		space = m.tail - m.head
	}
	return m.free >= 2 && space >= 2*slotBytes(uint64(m.mtu))
}

// wrong notes what the peer must not have done. One that read before the peer was
// READY has only itself to blame.
func (m *linuxDriver) wrong(format string, args ...any) {
	if !m.early && m.counts.wrong == "" {
		m.counts.wrong = fmt.Sprintf(format, args...)
	}
}

// reclaim takes frames back that the peer returned, and reports whether there
// is room. What is wrong is there again next time.
func (m *linuxDriver) reclaim() bool {
	first := true
	var lowest, top uint16
	for ; m.lastUsed != get16(m.other, m.used+2); m.lastUsed++ {
		at := m.used + 4 + 8*(uint64(m.lastUsed)%m.n)
		id, one := uint64(get32(m.other, at)), get32(m.other, at+4)
		if id >= m.n || one != 1 {
			m.wrong("completion %d is {%d, %d}", m.lastUsed, id, one)
			break
		}
		d := m.own[16*id:]
		addr, n := binary.LittleEndian.Uint64(d), uint64(binary.LittleEndian.Uint32(d[8:]))
		if addr < m.header || addr >= uint64(len(m.own)) || n > uint64(len(m.own))-addr {
			m.wrong("completion %d is of descriptor %d, which is not in use", m.lastUsed, id)
			break
		}
		if at := m.advance(&m.tail, n); addr != m.header+at {
			m.wrong("completion %d is of the frame at %#x, expected that at %#x", m.lastUsed, addr, m.header+at)
			break
		}
		if first {
			first, lowest = false, uint16(id)
		} else {
			binary.LittleEndian.PutUint16(d[14:], top)
		}
		top = uint16(id)
		m.free++
		m.counts.returned++
		if !m.room() {
			put16(m.own, m.usedEvent, m.lastUsed+1)
		}
	}
	if !first {
		binary.LittleEndian.PutUint16(m.own[16*uint64(lowest)+14:], m.freeHead)
		m.freeHead = top
	}
	return m.room()
}

// send sends frames as a batch, as the system does.
func (m *linuxDriver) send(frames [][]byte) error {
	m.tx.Lock()
	defer m.tx.Unlock()
	for i := 0; i < len(frames); {
		for m.stopped && m.on {
			m.awake.Wait()
		}
		if !m.on {
			return errNoCarrier
		}
		if m.transmit(frames[i], i+1 < len(frames)) {
			i++
		}
	}
	return nil
}

// transmit sends a frame, or stops the queue and reports that it is busy.
func (m *linuxDriver) transmit(frame []byte, more bool) bool {
	if !m.reclaim() {
		m.stopped = true
		return false
	}
	id := uint64(m.freeHead)
	d := m.own[16*id:]
	m.freeHead = binary.LittleEndian.Uint16(d[14:])
	m.free--
	addr := m.header + m.advance(&m.head, uint64(len(frame)))
	copy(m.own[addr:], frame)
	binary.LittleEndian.PutUint64(d, addr)
	binary.LittleEndian.PutUint32(d[8:], uint32(len(frame)))
	binary.LittleEndian.PutUint16(d[12:], 0)
	put16(m.own, m.avail+4+2*(uint64(m.availIndex)%m.n), uint16(id))
	m.availIndex++
	m.added++
	m.counts.sent++
	put16(m.own, m.avail+2, m.availIndex)
	if !m.room() {
		put16(m.own, m.usedEvent, m.lastUsed)
		m.stopped, more = true, false
		m.counts.waits++
		// It does not look again. What has come back by now came before the peer
		// could see that it has to ring: the driver waits for the next poll for
		// whatever reason, and here one comes for none.
		if get16(m.other, m.used+2) != m.lastUsed {
			m.counts.stalls++
			time.AfterFunc(time.Millisecond, m.poll)
		}
	}
	if !more {
		m.notify(&m.counts.doorbells, m.availEvent, m.availIndex, m.added)
		m.added = 0
	}
	return true
}

// notify rings, if one of the last n indexes is the one that the peer waits for.
func (m *linuxDriver) notify(count *uint64, event uint64, index, n uint16) {
	if index-get16(m.other, event)-1 < n {
		*count++
		m.ring()
	}
}

// Receiving.

// poll is what the interrupt for frames leads to.
func (m *linuxDriver) poll() {
	for m.round() {
	}
}

func (m *linuxDriver) round() (again bool) {
	m.napi.Lock()
	defer m.napi.Unlock()
	if !m.running {
		return false
	}
	m.tx.Lock()
	if m.reclaim() && m.stopped {
		m.stopped = false
		m.awake.Broadcast()
	}
	m.tx.Unlock()
	received := 0
	for received < pollBudget && m.receive() {
		received++
	}
	if received < pollBudget {
		put16(m.own, m.availEvent, m.lastAvail)
		again = get16(m.other, m.avail+2) != m.lastAvail
	}
	if received > 0 {
		m.notify(&m.rungHere, m.usedEvent, m.usedIndex, uint16(received))
	}
	return again || received == pollBudget
}

// receive takes a frame, and returns it. One that is bad is skipped, and the
// round over.
func (m *linuxDriver) receive() bool {
	if get16(m.other, m.avail+2) == m.lastAvail {
		return false
	}
	id := uint64(get16(m.other, m.avail+4+2*(uint64(m.lastAvail)%m.n)))
	m.lastAvail++
	if id >= m.n {
		m.bad("frame %d has descriptor %d", m.lastAvail-1, id)
		return false
	}
	d := m.other[16*id:]
	addr, n, flags := binary.LittleEndian.Uint64(d), uint64(binary.LittleEndian.Uint32(d[8:])), binary.LittleEndian.Uint16(d[12:])
	if flags != 0 || addr < m.header || addr >= uint64(len(m.other)) || n > uint64(len(m.other))-addr {
		m.bad("frame %d has %d bytes at %#x, flags %#x", m.lastAvail-1, n, addr, flags)
		return false
	}
	frame := m.buffer[:copy(m.buffer, m.other[addr:addr+n])]
	m.receivedHere++
	if !m.early {
		m.deliver(frame)
	}
	if m.completed++; modelsForm.sabotage && m.completed%3000 == 0 {
		return true // and never returns it
	}
	at := m.used + 4 + 8*(uint64(m.usedIndex)%m.n)
	put32(m.own, at, uint32(id))
	put32(m.own, at+4, 1)
	m.usedIndex++
	put16(m.own, m.used+2, m.usedIndex)
	return true
}

func (m *linuxDriver) bad(format string, args ...any) {
	m.tx.Lock()
	m.wrong(format, args...)
	m.tx.Unlock()
}

func (m *linuxDriver) drained() bool {
	m.tx.Lock()
	defer m.tx.Unlock()
	m.reclaim()
	return m.free == m.n
}

func (m *linuxDriver) tally() tally {
	m.napi.Lock()
	defer m.napi.Unlock()
	m.tx.Lock()
	defer m.tx.Unlock()
	t := m.counts
	t.received, t.doorbells = m.receivedHere, t.doorbells+m.rungHere
	return t
}
