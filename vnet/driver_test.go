package vnet_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/vnet"
)

var errNoCarrier = errors.New("no carrier")

// driver is one end: a model, or ours.
type driver interface {
	up()
	down()
	carrier() bool
	// send sends frames in their order, and waits for room.
	send(frames [][]byte) error
	// end ends it, in order or suddenly. Nothing of it does anything afterwards.
	end(kill bool)
	// fault is what it did wrong that only a restart mends: the page says so.
	fault() string
	// drained takes back what has come back, and reports whether that is all.
	drained() bool
	// tally is what it counted.
	tally() tally
}

// loader starts a driver.
type loader func(dev *ivshmem.Device, mtu int, deliver func(frame []byte)) driver

type tally struct {
	sent, received uint64 // frames
	returned       uint64 // of those that were sent
	doorbells      uint64
	resets         uint64
	waits          uint64 // for room
	sleeps         uint64
	stalls         uint64 // of the reference, that only chance ends
	early          uint64 // starts of the reference, see linuxDriver
	violations     uint64
	dropped        uint64
	last           string // violation
	wrong          string // what the other must not do
}

func (t *tally) add(u tally) {
	t.sent += u.sent
	t.received += u.received
	t.returned += u.returned
	t.doorbells += u.doorbells
	t.resets += u.resets
	t.waits += u.waits
	t.sleeps += u.sleeps
	t.stalls += u.stalls
	t.early += u.early
	t.violations += u.violations
	t.dropped += u.dropped
	if u.last != "" {
		t.last = u.last
	}
	if t.wrong == "" {
		t.wrong = u.wrong
	}
}

// shared is what models know of the device: where the page says that things are.
type shared struct {
	dev                                *ivshmem.Device
	peer                               uint32
	vectors                            int
	own, other                         []byte
	n, header, data                    uint64
	avail, usedEvent, used, availEvent uint64
}

// queueGeometry is the loop of the page.
func queueGeometry(L uint64) (n, H uint64) {
	align := func(x uint64) uint64 { return (x + 63) / 64 * 64 }
	for n = 4096; n > 32; n /= 2 {
		if H = align(align(16*n+2*(3+n)) + 6 + 8*n); H < L/8 {
			break
		}
	}
	return n, H
}

func share(dev *ivshmem.Device) shared {
	s := dev.Sections()
	L := s.Layout.Output
	n, H := queueGeometry(L)
	m := shared{dev: dev, peer: 1 - dev.ID(), vectors: dev.Vectors(), n: n, header: H, data: L - H}
	m.avail = 16 * n
	m.usedEvent = m.avail + 4 + 2*n
	m.used = (m.usedEvent + 2 + 63) / 64 * 64
	m.availEvent = m.used + 4 + 8*n
	other, err := s.Input(m.peer)
	if err == nil {
		m.other, err = other.UnsafeBytes(0, L)
	}
	if err == nil {
		m.own, err = s.Output.ReadOnly().UnsafeBytes(0, L)
	}
	if err != nil {
		panic(err)
	}
	return m
}

func (m *shared) ring() { m.dev.Ring(m.peer, min(1, m.vectors-1)) }

// interrupts calls a handler once for each interrupt, or for some that came
// together.
func (m *shared) interrupts(ctx context.Context, vectors []int, handle func()) {
	count := func() (n uint64) {
		for v := range m.vectors {
			if vectors == nil || vectors[0] == v {
				n += m.dev.Interrupts(v)
			}
		}
		return n
	}
	for seen := uint64(0); m.dev.Wait(ctx, vectors, func() bool { return count() != seen }) == nil; {
		seen = count()
		handle()
	}
}

// ours is a link as a driver.
type ours struct {
	*vnet.Link
	deliver func([]byte)
	all     sync.WaitGroup
	random  *rand.Rand
	mu      sync.Mutex
	failed  error
	// zeros are frames that were dropped because the memory was closed, and so
	// their descriptors read as 0.
	zeros uint64
}

func loadOurs(dev *ivshmem.Device, mtu int, deliver func([]byte)) driver {
	l, err := vnet.Open(dev, vnet.Config{MTU: mtu})
	if err != nil {
		panic(err)
	}
	o := &ours{Link: l, deliver: deliver, random: rand.New(rand.NewPCG(modelsForm.seed, 1))}
	o.all.Go(o.read)
	return o
}

func (o *ours) up()           { o.Up() }
func (o *ours) down()         { o.Down() }
func (o *ours) carrier() bool { return o.Carrier() }
func (o *ours) fault() string { return "" }
func (o *ours) drained() bool { return true }

func (o *ours) end(kill bool) {
	before := o.Stats().Received.Address
	if kill {
		o.Device().Close()
	}
	o.Close()
	o.all.Wait()
	if kill {
		o.zeros = o.Stats().Received.Address - before
	}
}

// read receives by all kinds of calls, and looks at what is received only once
// that is known to be valid.
func (o *ours) read() {
	random := rand.New(rand.NewPCG(modelsForm.seed, 2))
	p := make([]byte, vnet.MaxFrame)
	var views, copies [64][]byte
	for {
		var err error
		if random.IntN(4) == 0 {
			var n int
			if n, err = o.Receive(context.Background(), p); err == nil {
				o.deliver(p[:n])
			}
		} else {
			var n int
			n, err = o.UnsafePeekAll(context.Background(), views[:1+random.IntN(64)])
			for i, v := range views[:n] {
				copies[i] = append(copies[i][:0], v...)
			}
			if err == nil {
				err = o.UnsafeReleaseAll(n)
			}
			for i := range n {
				if err == nil {
					o.deliver(copies[i])
				}
			}
		}
		if errors.Is(err, os.ErrClosed) {
			return
		}
		var violation *vnet.ViolationError
		if err != nil && !errors.Is(err, vnet.ErrReset) && !errors.As(err, &violation) {
			o.mu.Lock()
			o.failed = err
			o.mu.Unlock()
			return
		}
	}
}

func (o *ours) send(frames [][]byte) error {
	ctx := context.Background()
	switch o.random.IntN(4) {
	case 0:
		for _, f := range frames {
			if err := o.Send(ctx, f); err != nil {
				return err
			}
		}
	case 1:
		for _, f := range frames {
			p, err := o.UnsafeReserve(ctx)
			if err == nil {
				err = o.UnsafeCommit(copy(p, f))
			}
			if err != nil {
				return err
			}
		}
		o.Flush()
	case 2:
		var slots [32][]byte
		var lengths [32]int
		for len(frames) > 0 {
			n, err := o.UnsafeReserveAll(ctx, slots[:min(len(frames), 32)])
			for i := range n {
				lengths[i] = copy(slots[i], frames[i])
			}
			if err == nil {
				err = o.UnsafeCommitAll(lengths[:n])
			}
			if err != nil {
				return err
			}
			frames = frames[n:]
			if len(frames) == 0 || o.random.IntN(2) == 0 {
				o.Flush()
			}
		}
	default:
		_, err := o.SendAll(ctx, frames)
		return err
	}
	return nil
}

func (o *ours) tally() tally {
	s := o.Stats()
	o.mu.Lock()
	defer o.mu.Unlock()
	t := tally{
		sent: s.Sent.Frames, received: s.Received.Frames,
		doorbells: s.Sent.Doorbells + s.Received.Doorbells,
		resets:    s.Resets.Peer + s.Resets.Violation + s.Resets.Down,
		waits:     s.Sent.Waits, sleeps: s.WakeUps,
	}
	v := s.Violations
	t.violations = v.AvailIndex + v.UsedID + v.UsedIndex + v.UsedLength
	t.dropped = s.Received.Dropped() - s.Received.Reset - o.zeros
	if t.violations > 0 {
		t.last = s.LastViolation
	}
	if o.failed != nil {
		t.wrong = o.failed.Error()
	}
	return t
}
