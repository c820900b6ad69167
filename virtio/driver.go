package virtio

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// DriverConfig is what a driver wants.
type DriverConfig struct {
	// ID is the virtio device ID. The link's protocol type has to name it.
	ID uint16
	// Features is the device type's own feature bits that the driver can use.
	// What is used is what the device offers, too: [Driver.Features].
	Features Features
	// Spin is for how long [DriverQueue.Next] looks for a buffer after the last
	// one, before it asks for an interrupt and sleeps: less latency, for a CPU.
	// As many look at a time as half of the CPUs. 0 sleeps at once.
	Spin time.Duration
}

// Driver is a virtio driver in user space: the front-end of a link. It is safe
// for concurrent use.
type Driver struct {
	end
	features Features
	block    uint64 // size of the register block
	spin     time.Duration

	write sync.Mutex // one register write at a time

	// life is held for reading while shared memory is touched for a buffer, and
	// by fail.
	life sync.RWMutex
	err  error // why nothing works any more

	mu sync.Mutex
	// Below: with mu held.
	watch   watch
	memory  space
	started bool
	// How often the configuration changed, and how often ConfigChanged said so.
	changes  atomic.Uint64
	reported atomic.Uint64
	changed  func() bool
}

// Open takes the device at the other end of the link into use, up to and with
// the features; queues and Start follow. It waits until there is a back-end,
// and writes the State. A link of another kind is refused with
// [ErrUnsuitable]; what the back-end does wrong, with a *[ViolationError].
func Open(ctx context.Context, dev *ivshmem.Device, c DriverConfig) (*Driver, error) {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		d, err := open(ctx, dev, c)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, ErrBackEndGone) && !errors.Is(err, errStale) {
			return nil, fmt.Errorf("virtio front-end over %s: %w", dev.Address(), err)
		}
		// The back-end has not noticed yet, or just has, that the last driver
		// left: give it time with this one away.
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// errStale says that the back-end has kept what a driver before said.
var errStale = errors.New("the virtio back-end has not noticed a reset")

func open(ctx context.Context, dev *ivshmem.Device, c DriverConfig) (*Driver, error) {
	e, err := newEnd(dev, c.ID, false)
	if err != nil {
		return nil, err
	}
	d := &Driver{end: e, watch: e.newWatch(), spin: c.Spin}
	d.changed = func() bool { return d.look() || d.changes.Load() != d.reported.Load() }
	if err := dev.SetState(stateReset); err != nil {
		return nil, err
	}
	if err := d.wait(ctx, []int{0}, func() bool { return d.state() == stateReady }); err != nil {
		return nil, err
	}
	if err := d.identify(); err != nil {
		return nil, err
	}
	if err := dev.SetState(stateReady); err != nil {
		return nil, err
	}
	if err := d.negotiate(ctx, c.Features); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// identify reads what the block says of itself.
func (d *Driver) identify() error {
	if r := d.mem.load32(regRevision); r < revision {
		return &ViolationError{-1, "revision", uint64(r), "1 or more"}
	}
	size := uint64(d.mem.load32(regSize))
	if size < regConfig || size > d.mem.Size() {
		return &ViolationError{-1, "size", size, fmt.Sprintf("%d to %d", regConfig, d.mem.Size())}
	}
	d.block = size
	d.memory = newSpace(size, d.mem.Size())
	return nil
}

// negotiate goes from a reset to FEATURES_OK.
func (d *Driver) negotiate(ctx context.Context, own Features) error {
	for _, s := range []Status{0, StatusAcknowledge, StatusAcknowledge | StatusDriver} {
		if err := d.put32(ctx, regDeviceStatus, uint32(s)); err != nil {
			return err
		}
	}
	// Example back-ends ignore the reset.
	if err := d.put32(ctx, regQueueSel, 0); err != nil {
		return err
	}
	if err := d.answered(ctx); err != nil {
		return err
	}
	if d.mem.load16(regQueueEnable) != 0 {
		return errStale
	}
	var offered Features
	for i := range uint32(2) {
		if err := d.put32(ctx, regDeviceFeaturesSel, 1-i); err != nil {
			return err
		}
		if err := d.answered(ctx); err != nil {
			return err
		}
		offered = offered<<32 | Features(d.mem.load32(regDeviceFeatures))
	}
	if !offered.Has(required) {
		return fmt.Errorf("%w: expected features VERSION_1 and ACCESS_PLATFORM (%#x), found %#x", ErrUnsuitable, uint64(required), uint64(offered))
	}
	d.features = offered & (own&ofDevice | transport)
	for i := range uint32(2) {
		if err := d.put32(ctx, regDriverFeaturesSel, 1-i); err != nil {
			return err
		}
		if err := d.put32(ctx, regDriverFeatures, d.features.word(1-i)); err != nil {
			return err
		}
	}
	if err := d.put32(ctx, regDeviceStatus, uint32(StatusAcknowledge|StatusDriver|StatusFeaturesOK)); err != nil {
		return err
	}
	if err := d.answered(ctx); err != nil {
		return err
	}
	if s := Status(d.mem.load32(regDeviceStatus)); s&StatusFeaturesOK == 0 {
		return fmt.Errorf("%w: the device refuses the features %#x", ErrUnsuitable, uint64(d.features))
	}
	return nil
}

// Features is what driver and device agreed on.
func (d *Driver) Features() Features { return d.features }

// Device is the device that carries the link.
func (d *Driver) Device() *ivshmem.Device { return d.dev }

// Start says DRIVER_OK: from now on the device serves its queues.
func (d *Driver) Start(ctx context.Context) error {
	return d.put32(ctx, regDeviceStatus, uint32(StatusAcknowledge|StatusDriver|StatusFeaturesOK|StatusDriverOK))
}

// Close ends everything that waits with [os.ErrClosed], and sets State RESET:
// the device forgets the driver. The ivshmem device stays open.
func (d *Driver) Close() error {
	d.life.Lock()
	again := errors.Is(d.err, os.ErrClosed)
	d.err = os.ErrClosed
	d.life.Unlock()
	d.dev.Recheck()
	if again {
		return nil
	}
	err := d.dev.SetState(stateReset)
	if errors.Is(err, ivshmem.ErrGone) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// fail ends everything that has not ended yet, and returns why it did.
func (d *Driver) fail(err error) error {
	d.life.Lock()
	defer d.life.Unlock()
	if d.err == nil {
		d.err = err
	}
	return d.err
}

// ended says why nothing works any more.
func (d *Driver) ended() error {
	d.life.RLock()
	defer d.life.RUnlock()
	return d.err
}

// state is the back-end's state.
func (d *Driver) state() uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.peerState(&d.watch)
}

// look follows the back-end's state and its configuration events, and reports
// whether everything has ended.
func (d *Driver) look() bool {
	if d.state() != stateReady {
		d.fail(ErrBackEndGone)
	}
	if d.mem.load8(regConfigEvent) != 0 {
		d.mem.Store8(regConfigEvent, 0)
		// The look at the status is behind that: a full barrier.
		if Status(d.mem.load32(regDeviceStatus))&StatusNeedsReset != 0 {
			d.fail(ErrNeedsReset)
		}
		d.changes.Add(1)
	}
	return d.ended() != nil
}

const (
	// answerSpin is how long the driver looks for an answer without sleeping;
	// answerSleep is the longest that it sleeps then.
	answerSpin  = 50 * time.Microsecond
	answerSleep = time.Millisecond
	// looksPerState is how often it does for each look at the back-end's state.
	looksPerState = 64
)

// answered waits until the back-end has answered the last register write. It
// does so without a doorbell.
func (d *Driver) answered(ctx context.Context) error {
	start, sleep := time.Now(), 20*time.Microsecond
	for i := 1; d.mem.load32(regWriteTransaction) != 0; i++ {
		spinning := time.Since(start) < answerSpin
		if spinning {
			shmem.Pause()
		} else {
			time.Sleep(sleep)
			sleep = min(2*sleep, answerSleep)
		}
		if spinning && i%looksPerState != 0 {
			continue
		}
		if d.stateNow() != stateReady {
			return d.fail(ErrBackEndGone)
		}
		if err := d.ended(); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	// A back-end that has begun anew has answered nothing.
	if d.stateNow() != stateReady {
		return d.fail(ErrBackEndGone)
	}
	return d.ended()
}

// put writes a register once the last write has been answered.
func (d *Driver) put(ctx context.Context, at uint64, store func()) error {
	d.write.Lock()
	defer d.write.Unlock()
	if err := d.answered(ctx); err != nil {
		return err
	}
	store()
	d.mem.Store32(regWriteTransaction, uint32(at))
	return d.dev.Ring(d.peer, 0)
}

func (d *Driver) put16(ctx context.Context, at uint64, v uint16) error {
	return d.put(ctx, at, func() { d.mem.Store16(at, v) })
}

func (d *Driver) put32(ctx context.Context, at uint64, v uint32) error {
	return d.put(ctx, at, func() { d.mem.Store32(at, v) })
}

func (d *Driver) put64(ctx context.Context, at uint64, v uint64) error {
	return d.put(ctx, at, func() { d.mem.Store64(at, v) })
}

// ConfigSize is the size of the device's configuration space in bytes, rounded
// up to 8 by some devices.
func (d *Driver) ConfigSize() int { return int(d.block - regConfig) }

func (d *Driver) inConfig(offset, n int) error {
	if size := d.ConfigSize(); offset < 0 || offset > size || n > size-offset {
		return fmt.Errorf("configuration space of %d bytes: expected an access inside, found %d bytes at %d", size, n, offset)
	}
	return nil
}

// ReadConfig reads the configuration space from a byte on, all of p or, with an
// error, nothing that counts: it waits until the device is not changing it.
func (d *Driver) ReadConfig(ctx context.Context, p []byte, offset int) error {
	if err := d.inConfig(offset, len(p)); err != nil {
		return err
	}
	sleep := time.Microsecond
	for {
		before := d.mem.load32(regConfigGeneration)
		d.mem.ReadAt(p, regConfig+int64(offset))
		if before&1 == 0 && d.mem.load32(regConfigGeneration) == before {
			return d.ended()
		}
		if d.stateNow() != stateReady {
			return d.fail(ErrBackEndGone)
		}
		if err := d.ended(); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		time.Sleep(sleep)
		sleep = min(2*sleep, answerSleep)
	}
}

// WriteConfig writes a field of 1, 2, 4 or 8 bytes to the configuration space.
// The device may see it after the call returned.
func (d *Driver) WriteConfig(ctx context.Context, p []byte, offset int) error {
	if err := d.inConfig(offset, len(p)); err != nil {
		return err
	}
	at := uint64(regConfig + offset)
	return d.put(ctx, at, func() { d.mem.WriteAt(p, int64(at)) })
}

// ConfigChanged waits until the device says that its configuration changed,
// since the last time that it returned nil.
func (d *Driver) ConfigChanged(ctx context.Context) error {
	if err := d.wait(ctx, []int{0}, d.changed); err != nil {
		return err
	}
	if err := d.ended(); err != nil {
		return err
	}
	d.reported.Store(d.changes.Load())
	return nil
}
