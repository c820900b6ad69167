package virtio

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem"
)

// Device is a virtio device: what it offers, and what it does.
type Device struct {
	// ID is the virtio device ID: 2 block, 3 console, 4 entropy. The link's
	// protocol type has to name it.
	ID uint16
	// Features is the device type's own feature bits. Those of rings and
	// transport are added.
	Features Features
	// Queues is the most entries that each queue may have: powers of two up to
	// 32768. Linux puts 16·n + 8·n + 2·n bytes for each into the R/W section,
	// and with receive queues a buffer per entry.
	Queues []int
	// Config is what the configuration space is at first, little-endian, up to
	// 1024 bytes. [BackEnd.SetConfig] changes it.
	Config []byte
	// Run does the device's work. It is called in a goroutine of its own each
	// time the driver says DRIVER_OK. Its context ends when the session does: at a
	// reset, when the driver leaves, with Serve. Run has to return soon then; there is
	// one at a time. What it returns after that does not matter. An error before
	// that ends Serve, except one of the session's queues; nil leaves the driver
	// without a device until it resets it.
	Run func(ctx context.Context, s *Session) error
	// ConfigWritten is told of a write of the driver to the configuration space:
	// at which byte, and up to 8 bytes from there on, since the transport does not
	// tell how many were written. The space itself keeps what SetConfig
	// said. It may be called at any time, also without a session; the driver waits
	// until it returns, so it must not block, nor call methods of the BackEnd.
	// nil: writes have no effect.
	ConfigWritten func(offset int, value []byte)
	// Spin is for how long [Queue.Next] looks for a buffer after the last one,
	// before it asks to be rung and sleeps: less latency, and fewer doorbells, for
	// a CPU. As many look at a time as half of the CPUs. 0 sleeps at once.
	Spin time.Duration
}

// BackEnd serves a virtio device to the driver at the other end of a link.
type BackEnd struct {
	end
	device   Device
	features Features // that are offered
	size     uint64   // of the register block
	config   []byte   // of the device's configuration space
	watch    watch
	vectors  []int // that register writes are announced on
	guard

	// mu is taken before those of a queue. It is not held when the device waits
	// or is told to recheck: the conditions take it.
	mu sync.Mutex
	// Below: with mu held.
	busy      bool // Serve was called
	live      bool // the block means something: the own state is READY
	present   bool // the peer was READY since
	left      bool // and is not any more
	todo      bool // Serve has something to do
	status    Status
	accepted  Features
	selDevice uint32 // device_features_sel
	selDriver uint32 // driver_features_sel
	selQueue  uint32 // queue_sel
	// generation is config_generation.
	generation uint32
	queues     []*Queue
	session    *Session // the driver said DRIVER_OK, and it is not over
	running    *Session // whose Run has not returned
	failed     error    // what Run returned before its session was over
	stats      Stats
}

// Session is the time between a driver's DRIVER_OK and the end: a reset, or the
// driver's leaving.
type Session struct {
	features Features
	queues   []*Queue
	started  bool
	ctx      context.Context
	cancel   context.CancelCauseFunc
	ended    chan struct{} // closed when Run has returned
}

// Features is what driver and device agreed on.
func (s *Session) Features() Features { return s.features }

// Queues is the number of queues of the device.
func (s *Session) Queues() int { return len(s.queues) }

// Queue is a queue of the device, below Queues. The driver may have left it out:
// then it has nothing, ever.
func (s *Session) Queue(i int) *Queue { return s.queues[i] }

// NewBackEnd checks a virtio device and the link. Links of another kind are
// refused with [ErrUnsuitable].
func NewBackEnd(dev *ivshmem.Device, d Device) (*BackEnd, error) {
	b, err := newBackEnd(dev, d)
	if err != nil {
		return nil, fmt.Errorf("virtio back-end over %s: %w", dev.Address(), err)
	}
	return b, nil
}

func newBackEnd(dev *ivshmem.Device, d Device) (*BackEnd, error) {
	e, err := newEnd(dev, d.ID, true)
	if err != nil {
		return nil, err
	}
	if len(d.Config) > maxConfig {
		return nil, fmt.Errorf("configuration space of %d bytes: expected at most %d", len(d.Config), maxConfig)
	}
	if more := d.Features &^ ofDevice; more != 0 {
		return nil, fmt.Errorf("features %#x: expected the device type's own bits only, 0 to 23 and 50 to 63", uint64(more))
	}
	for i, n := range d.Queues {
		if n < 1 || n > 1<<15 || bits.OnesCount(uint(n)) != 1 {
			return nil, fmt.Errorf("queue %d of %d entries: expected a power of two up to 32768", i, n)
		}
	}
	b := &BackEnd{end: e, device: d, features: d.Features | transport, watch: e.newWatch(), vectors: []int{0}}
	b.size = (regConfig + uint64(len(d.Config)) + 7) &^ 7
	b.config = make([]byte, b.size-regConfig)
	copy(b.config, d.Config)
	b.guard.init()
	return b, nil
}

// Device is the device that carries the link.
func (b *BackEnd) Device() *ivshmem.Device { return b.dev }

// Serve serves drivers, one after the other, until the context ends, which it
// returns nil for; the device is gone ([ivshmem.ErrGone]) or closed
// ([os.ErrClosed]); or Run fails. It writes the State, which is RESET
// afterwards, and waits for Run to return.
func (b *BackEnd) Serve(ctx context.Context) error {
	b.mu.Lock()
	if b.busy {
		b.mu.Unlock()
		return errors.New("the virtio device is being served already")
	}
	b.busy, b.failed = true, nil
	b.mu.Unlock()

	inner, cancel := context.WithCancel(ctx)
	var err error
	for err == nil {
		if err = b.begin(inner); err == nil {
			err = b.attend(inner)
		}
	}
	cancel()
	b.mu.Lock()
	b.leave()
	running := b.running
	b.mu.Unlock()
	b.dev.Recheck()
	if stateErr := b.dev.SetState(stateReset); stateErr != nil && !errors.Is(stateErr, ivshmem.ErrGone) && !errors.Is(stateErr, os.ErrClosed) {
		err = errors.Join(err, stateErr)
	}
	if running != nil {
		<-running.ended
	}
	b.mu.Lock()
	b.busy = false
	b.mu.Unlock()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// begin goes from RESET to READY: what is left of a driver before goes away
// first, and finds the registers as they are at the start.
func (b *BackEnd) begin(ctx context.Context) error {
	if err := b.dev.SetState(stateReset); err != nil {
		return err
	}
	if err := b.wait(ctx, b.vectors, func() bool { return b.stateNow() == stateReset }); err != nil {
		return err
	}
	b.mu.Lock()
	b.initialise()
	b.live, b.present, b.left = true, false, false
	b.mu.Unlock()
	return b.dev.SetState(stateReady)
}

// attend serves a driver until it leaves.
func (b *BackEnd) attend(ctx context.Context) error {
	for {
		if err := b.sleep(ctx); err != nil {
			return err
		}
		b.mu.Lock()
		todo, left, err := b.todo, b.left, b.failed
		b.todo = false
		if !left && err == nil {
			b.start(ctx)
		}
		b.mu.Unlock()
		if todo || left {
			b.dev.Recheck() // who waits for a queue has to see that it is gone
		}
		if left || err != nil {
			return err
		}
	}
}

// transactionBudget is how many register writes are answered in one go.
const transactionBudget = 64

// look answers register writes and follows the peer's state. It reports
// whether Serve has something to do.
func (b *BackEnd) look() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.live {
		return b.left
	}
	switch state := b.peerState(&b.watch); {
	case state == stateReady:
		b.present = true
	case b.present:
		b.leave()
		return true
	}
	// A driver that is going away still writes registers, and waits for the
	// answers: so they are answered whatever its state is.
	for range transactionBudget {
		at := b.mem.load32(regWriteTransaction)
		if at == 0 {
			return b.todo
		}
		b.stats.Transactions++
		b.written(at)
		b.mem.Store32(regWriteTransaction, 0) // a full barrier
	}
	return true // others have their turn
}

// leave ends everything with the driver. The caller holds mu.
func (b *BackEnd) leave() {
	b.live, b.left = false, true
	b.retire(ErrReset)
	b.status = 0
}

// retire ends the session, and the use of all buffers. The caller holds mu.
func (b *BackEnd) retire(cause error) {
	for _, q := range b.queues {
		q.kill()
	}
	b.session = nil
	if b.running != nil {
		b.running.cancel(cause)
	}
}

// start lets the device run for a session that has not begun. The caller holds
// mu.
func (b *BackEnd) start(ctx context.Context) {
	s := b.session
	if s == nil || s.started || b.running != nil {
		return
	}
	s.started = true
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	s.ended = make(chan struct{})
	for _, q := range s.queues {
		q.mu.Lock()
		q.ctx = s.ctx
		q.mu.Unlock()
	}
	b.running = s
	b.stats.Sessions++
	go b.run(s)
}

// run is a session.
func (b *BackEnd) run(s *Session) {
	err := b.device.Run(s.ctx, s)
	b.mu.Lock()
	var violation *ViolationError
	if err != nil && s.ctx.Err() == nil && !errors.Is(err, ErrReset) && !errors.As(err, &violation) {
		b.failed = err
	}
	s.cancel(nil)
	b.running, b.todo = nil, true
	close(s.ended)
	b.mu.Unlock()
	b.poke()
}

// violated ends the session because of what the driver wrote in a queue, unless
// it is over already.
func (b *BackEnd) violated(q *Queue, v *ViolationError) {
	b.mu.Lock()
	if !q.killed() {
		b.needsReset(v)
	}
	b.mu.Unlock()
	b.poke()
}
