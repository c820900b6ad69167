package vnet_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem"
)

// zephyrDriver is a model of Zephyr's Ethernet driver for ivshmem, made from the
// protocol page. Its thread looks at everything at each wake-up.
type zephyrDriver struct {
	shared
	deliver func([]byte)
	cancel  context.CancelFunc
	all     sync.WaitGroup
	signal  chan struct{}

	// The thread's.
	rxAvail, rxUsed uint16

	mu          sync.Mutex // the rest
	enabled     bool
	on          bool // carrier
	state       uint32
	next, inUse uint64 // descriptors
	head, tail  uint64 // of the data
	filled      uint64 // bytes of the data, with those that were skipped
	sent, back  uint16 // indexes
	counts      tally
}

// loadZephyr is a system's start. Its interface is not enabled.
func loadZephyr(dev *ivshmem.Device, _ int, deliver func([]byte)) driver {
	ctx, cancel := context.WithCancel(context.Background())
	z := &zephyrDriver{shared: share(dev), deliver: deliver, cancel: cancel, signal: make(chan struct{}, 1)}
	// Zephyr clears its header here, too. Its system takes so long to start that
	// the peer has seen by then that it was gone; this one takes microseconds.
	z.set(0)
	z.all.Go(func() { z.interrupts(ctx, nil, z.raise) })
	z.all.Go(func() {
		for {
			select {
			case <-z.signal:
				z.wake()
			case <-ctx.Done():
				return
			}
		}
	})
	z.raise()
	return z
}

// end is the end of the system: the driver itself has none.
func (z *zephyrDriver) end(bool) {
	z.cancel()
	z.all.Wait()
	z.mu.Lock()
	z.on = false
	z.mu.Unlock()
}

func (z *zephyrDriver) raise() {
	select {
	case z.signal <- struct{}{}:
	default:
	}
}

func (z *zephyrDriver) enable(on bool) {
	z.mu.Lock()
	z.enabled = on
	z.mu.Unlock()
	z.raise()
}

func (z *zephyrDriver) up()           { z.enable(true) }
func (z *zephyrDriver) down()         { z.enable(false) }
func (z *zephyrDriver) fault() string { return "" }

func (z *zephyrDriver) carrier() bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.on
}

func (z *zephyrDriver) set(state uint32) {
	z.state = state
	z.dev.SetState(state)
}

func (z *zephyrDriver) restartQueues() {
	clear(z.own[:z.header])
	for i := range z.n {
		binary.LittleEndian.PutUint16(z.own[16*i+14:], uint16((i+1)%z.n))
	}
	z.next, z.inUse, z.head, z.tail, z.filled, z.sent, z.back = 0, 0, 0, 0, 0, 0, 0
	z.rxAvail, z.rxUsed = 0, 0
}

// update is at most one step of the states. It reports whether that is RUN.
func (z *zephyrDriver) update() bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	peer, err := z.dev.State(z.peer)
	if err != nil {
		return false
	}
	switch {
	case z.state == 0 && (peer == 0 || peer == 1):
		z.set(1)
	case z.state == 1 && peer != 0:
		z.restartQueues()
		z.set(2)
	case z.state >= 2 && peer == 0:
		if z.state == 3 {
			z.counts.resets++
		}
		z.on = false
		z.set(0)
	case z.state == 2 && (peer == 2 || peer == 3) && z.enabled:
		z.set(3)
		z.on = true
	case z.state == 3 && (peer == 2 || peer == 3) && !z.enabled:
		z.counts.resets++
		z.on = false
		z.set(0)
	}
	return z.state == 3
}

// wake is what each wake-up leads to.
func (z *zephyrDriver) wake() {
	if !z.update() {
		return
	}
	for z.receive() {
	}
}

// receive takes a frame, and returns it with a doorbell. At one that is bad it
// stays for ever.
func (z *zephyrDriver) receive() bool {
	if get16(z.other, z.avail+2) == z.rxAvail {
		return false
	}
	id := uint64(get16(z.other, z.avail+4+2*(uint64(z.rxAvail)%z.n)))
	if id >= z.n {
		z.wrong("frame %d has descriptor %d", z.rxAvail, id)
		return false
	}
	d := z.other[16*id:]
	at, n := binary.LittleEndian.Uint64(d)-z.header, uint64(binary.LittleEndian.Uint32(d[8:]))
	if at > z.data || n > z.data || at > z.data-n {
		z.wrong("frame %d has %d bytes at %#x", z.rxAvail, n, at+z.header)
		return false
	}
	z.deliver(z.other[z.header+at:][:n])
	entry := z.used + 4 + 8*(uint64(z.rxUsed)%z.n)
	put32(z.own, entry, uint32(id))
	put32(z.own, entry+4, 1)
	z.rxUsed++
	put16(z.own, z.used+2, z.rxUsed)
	z.rxAvail++
	put16(z.own, z.availEvent, z.rxAvail)
	z.mu.Lock()
	z.counts.received++
	z.counts.doorbells++
	z.mu.Unlock()
	z.ring()
	return true
}

// wrong notes what the peer must not have done.
func (z *zephyrDriver) wrong(format string, args ...any) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.fail(format, args...)
}

func (z *zephyrDriver) fail(format string, args ...any) {
	if z.counts.wrong == "" {
		z.counts.wrong = fmt.Sprintf(format, args...)
	}
}

// advance is where a frame of n bytes goes that comes after a position, how much
// that takes with what it skips, and what comes after it.
func (z *zephyrDriver) advance(at, n uint64) (here, takes, after uint64) {
	slot := (18 + n + 63) / 64 * 64
	if slot > z.data-at {
		return 0, slot + z.data - at, slot
	}
	return at, slot, at + slot
}

// reclaim takes frames back that the peer returned. At what is wrong it stays for
// ever.
func (z *zephyrDriver) reclaim() bool {
	for z.back != get16(z.other, z.used+2) {
		at := z.used + 4 + 8*(uint64(z.back)%z.n)
		id, one := uint64(get32(z.other, at)), get32(z.other, at+4)
		if id >= z.n || one != 1 {
			z.fail("completion %d is {%d, %d}", z.back, id, one)
			return false
		}
		d := z.own[16*id:]
		here, takes, after := z.advance(z.tail, uint64(binary.LittleEndian.Uint32(d[8:])))
		if addr := binary.LittleEndian.Uint64(d); takes > z.filled || addr != z.header+here {
			z.fail("completion %d is of the frame at %#x, expected that at %#x", z.back, addr, z.header+here)
			return false
		}
		z.tail = after
		z.filled -= takes
		z.inUse--
		z.back++
		z.counts.returned++
	}
	return true
}

// transmit sends a frame, with a doorbell, or drops it.
func (z *zephyrDriver) transmit(frame []byte) (sent bool, err error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if !z.on {
		return false, errNoCarrier
	}
	here, takes, after := z.advance(z.head, uint64(len(frame)))
	if !z.reclaim() || z.inUse == z.n || z.data-z.filled < takes {
		z.counts.waits++
		return false, nil
	}
	d := z.own[16*z.next:]
	binary.LittleEndian.PutUint64(d, z.header+here)
	binary.LittleEndian.PutUint32(d[8:], uint32(len(frame)))
	binary.LittleEndian.PutUint16(d[12:], 0)
	copy(z.own[z.header+here:], frame)
	if z.counts.sent++; modelsForm.sabotage && z.counts.sent%3000 == 0 {
		z.own[z.header+here+9] ^= 1
	}
	put16(z.own, z.avail+4+2*(uint64(z.sent)%z.n), uint16(z.next))
	z.sent++
	put16(z.own, z.avail+2, z.sent)
	z.next = (z.next + 1) % z.n
	z.inUse++
	z.head = after
	z.filled += takes
	z.counts.doorbells++
	z.ring()
	return true, nil
}

// send sends frames. Those that the driver drops somebody sends again.
func (z *zephyrDriver) send(frames [][]byte) error {
	for i := 0; i < len(frames); {
		switch sent, err := z.transmit(frames[i]); {
		case err != nil:
			return err
		case sent:
			i++
		default:
			time.Sleep(20 * time.Microsecond)
		}
	}
	return nil
}

func (z *zephyrDriver) drained() bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.reclaim() && z.inUse == 0
}

func (z *zephyrDriver) tally() tally {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.counts
}
