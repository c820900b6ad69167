package ivshmem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/regs"
)

// Tags of the set's descriptors that are no vectors.
const (
	tagKick = -1
	tagGone = -2
)

// waiters is everybody who waits for interrupts of a device. One of them, the
// leader, sleeps for all; it looks after the others' conditions and wakes
// those that hold. When its own holds it leaves, and another leads.
type waiters struct {
	device  *Device
	set     *evfd.Set // nil: no interrupts
	sleep   Sleep
	oneShot bool
	shared  bool         // one counter for all vectors
	rearm   func() error // after each write to Interrupt Control; may be nil
	uio     bool         // fds are UIO files
	fds     []int        // by vector
	kick    int          // eventfd that wakes the leader, -1: none
	counts  []atomic.Uint64
	// armed is false once an interrupt disarmed the device in one-shot mode.
	// It belongs to the leader.
	armed bool
	// counted and total are the last reading of a UIO file. They belong to the
	// leader, too.
	counted bool
	total   uint32
	// rung is the vectors of the last interrupts, nil: any may have been. It
	// belongs to the leader; rungOf is where it lives.
	rung   []int
	rungOf [16]int

	mu      sync.Mutex
	all     []*waiter
	leading bool
	end     error         // why nobody can wait any more
	idle    chan struct{} // closed when the last leader left, after end
}

type waiter struct {
	vectors []int // nil: all
	ready   func() bool
	wake    chan bool // true: lead
}

// waiterPool keeps waiting free of allocation.
var waiterPool = sync.Pool{New: func() any { return &waiter{wake: make(chan bool, 1)} }}

// free gives a waiter that is off the list back: nobody sends to it any more,
// but what it did not look at may be left.
func (w *waiter) free() {
	select {
	case <-w.wake:
	default:
	}
	w.vectors, w.ready = nil, nil
	waiterPool.Put(w)
}

func (w *waiter) wants(vector int) bool {
	return w.vectors == nil || slices.Contains(w.vectors, vector)
}

func (ws *waiters) init(d *Device, o options) error {
	ws.device = d
	i := d.back.Interrupts()
	ws.sleep, ws.fds, ws.shared, ws.uio, ws.rearm = o.sleep, i.FDs, i.Shared, i.UIO, i.Rearm
	ws.oneShot = o.oneShot || i.OneShot()
	ws.counts = make([]atomic.Uint64, d.vectors)
	if d.observer || len(i.FDs) == 0 {
		ws.oneShot = false
		return nil
	}
	most := d.vectors
	if i.Shared {
		most = 1
	}
	if len(i.FDs) > most {
		return fmt.Errorf("interrupts: expected at most %d descriptors of the back end, found %d", most, len(i.FDs))
	}
	kick, err := evfd.New()
	if err != nil {
		return err
	}
	ws.kick = kick
	if ws.set, err = evfd.NewSet(ws.sleep); err != nil {
		return err
	}
	if err := ws.set.Add(ws.kick, unix.EPOLLIN, tagKick); err != nil {
		return err
	}
	for v, fd := range i.FDs {
		if err := ws.set.Add(fd, unix.EPOLLIN, int32(v)); err != nil {
			return err
		}
	}
	if i.Gone.Events != 0 {
		return ws.set.Add(i.Gone.FD, i.Gone.Events, tagGone)
	}
	return nil
}

// Interrupts is the number of interrupts of a vector that waits of this
// handle have seen. Several events may arrive as one interrupt. Where one
// counter serves all vectors, all of them count on vector 0.
//
// Waiting for the next interrupt of a vector, whatever it means, is waiting
// for this number to change.
func (d *Device) Interrupts(vector int) uint64 {
	if vector < 0 || vector >= len(d.wait.counts) {
		return 0
	}
	return d.wait.counts[vector].Load()
}

// Wait waits until ready reports true. It asks at once, and then again after
// each interrupt of one of the vectors (nil: any); so what makes ready true
// has to be announced by an interrupt. The order that the device needs (arm,
// ask, sleep) is kept: no interrupt between the question and the sleep is
// lost.
//
// ready is called from any goroutine that waits on the device, must be quick,
// and must not wait itself. Any number of goroutines may wait.
//
// Wait returns nil when ready reported true, the context's error,
// [os.ErrClosed] after Close, [ErrGone] when the device is gone, or
// [ErrNotSupported] where the device is held without interrupts.
func (d *Device) Wait(ctx context.Context, vectors []int, ready func() bool) error {
	ws := &d.wait
	if ws.set == nil {
		return fmt.Errorf("wait: %w: %s has no interrupts as it is held (back end %s): poll instead", ErrNotSupported, d.Address(), d.Driver())
	}
	for _, v := range vectors {
		if v < 0 || v >= d.vectors {
			return fmt.Errorf("wait: vector %d, expected a vector below %d", v, d.vectors)
		}
	}
	if ws.shared {
		vectors = nil
	}
	for _, v := range vectors {
		if v >= len(ws.fds) {
			return fmt.Errorf("wait: %w: vector %d does not arrive through %s, only those below %d: agree on these with the peers", ErrNotSupported, v, d.Driver(), len(ws.fds))
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	w := waiterPool.Get().(*waiter)
	defer w.free()
	w.vectors, w.ready = vectors, ready
	done, lead, err := ws.join(w)
	if done {
		return err
	}
	if !lead {
		select {
		case lead = <-w.wake:
			if !lead {
				return ws.result(w)
			}
		case <-ctx.Done():
			if ws.leave(w) {
				return nil
			}
			return ctx.Err()
		}
	}
	return ws.lead(ctx, w)
}

// join adds a waiter unless its wait is over at once.
func (ws *waiters) join(w *waiter) (done, lead bool, err error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	// An interrupt may have come between the caller's last look and now, and
	// been seen by a leader: so ask under the lock, which the next look waits
	// for.
	if ws.end != nil || w.ready() {
		return true, false, ws.end
	}
	ws.all = append(ws.all, w)
	lead = !ws.leading
	ws.leading = true
	return false, lead, nil
}

// result is what a woken follower returns.
func (ws *waiters) result(w *waiter) error {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if slices.Contains(ws.all, w) { // not removed as ready: the end
		ws.remove(w)
		return ws.end
	}
	return nil
}

// leave takes a follower out that does not want to wait any more, and reports
// whether it was ready already: ready may have taken what it found, so its word
// counts. The follower may also just have been made the leader.
func (ws *waiters) leave(w *waiter) (ready bool) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if !slices.Contains(ws.all, w) {
		return true
	}
	ws.remove(w)
	select {
	case lead := <-w.wake:
		if lead {
			ws.handOver()
		}
	default:
	}
	return false
}

func (ws *waiters) remove(w *waiter) {
	if i := slices.Index(ws.all, w); i >= 0 {
		ws.all = slices.Delete(ws.all, i, i+1)
	}
}

// handOver makes another waiter the leader. The caller holds ws.mu.
func (ws *waiters) handOver() {
	if ws.end == nil && len(ws.all) > 0 {
		ws.all[0].wake <- true
		return
	}
	ws.leading = false
	if ws.end != nil {
		for _, w := range ws.all {
			w.wake <- false
		}
		close(ws.idle)
	}
}

// lead sleeps for all until its own condition holds.
func (ws *waiters) lead(ctx context.Context, own *waiter) error {
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { ws.wakeLeader() })
		defer stop()
	}
	ws.rung = nil
	for {
		if ws.oneShot && !ws.armed {
			if err := ws.arm(); err != nil {
				return ws.fail(own, err)
			}
			// What came while the device was disarmed is lost, on whichever
			// vector: everybody has to look.
			ws.rung = nil
		}
		done, woken, err := ws.look(ctx, own)
		if done {
			return err
		}
		if woken > 0 {
			// They run where this one did, if it lets them: a thread that sleeps
			// briefly keeps what they need, and another has to be woken for it.
			runtime.Gosched()
		}
		events, err := ws.set.Wait()
		if err != nil {
			return ws.fail(own, err)
		}
		ws.rung = ws.rungOf[:0]
		kicked := false
		for _, e := range events {
			switch e.Fd {
			case tagKick:
				evfd.Drain(ws.kick)
				kicked = true
			case tagGone:
				return ws.fail(own, ErrGone)
			default:
				if err := ws.count(int(e.Fd)); err != nil {
					return ws.fail(own, err)
				}
				ws.rung = append(ws.rung, int(e.Fd))
				ws.armed = false
			}
		}
		if kicked {
			ws.rung = nil
		}
	}
}

// arm enables interrupts.
func (ws *waiters) arm() error {
	if err := ws.device.back.Store(regs.InterruptControl, regs.InterruptEnable); err != nil {
		return err
	}
	ws.armed = true
	if ws.rearm == nil {
		return nil
	}
	return ws.rearm()
}

// count takes the interrupts of a descriptor.
func (ws *waiters) count(vector int) error {
	if !ws.uio {
		ws.counts[vector].Add(evfd.Take(ws.fds[vector]))
		return nil
	}
	var b [4]byte
	switch _, err := unix.Read(ws.fds[vector], b[:]); {
	case err == unix.EIO: // the driver was unbound
		return ErrGone
	case err != nil: // nothing new after all
		return nil
	}
	// The kernel's total wraps. It began before the handle did, so the first
	// one tells only that there was something.
	total := binary.NativeEndian.Uint32(b[:])
	n := uint32(1)
	if ws.counted {
		n = total - ws.total
	}
	ws.counted, ws.total = true, total
	ws.counts[vector].Add(uint64(n))
	return nil
}

// look asks the conditions of the waiters that the vectors concern, wakes
// those whose condition holds, and reports whether the leader itself is done,
// and how many others were woken. A leader that is done has handed over.
func (ws *waiters) look(ctx context.Context, own *waiter) (done bool, woken int, err error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if err = ws.end; err == nil {
		err = ctx.Err()
	}
	done = err != nil
	asked := false
	defer func() {
		if !asked { // ready panicked, or ended the goroutine: Close must not wait for it
			ws.leading = false
		}
	}()
	concerned := func(w *waiter) bool {
		return ws.rung == nil || slices.ContainsFunc(ws.rung, w.wants)
	}
	ws.all = slices.DeleteFunc(ws.all, func(w *waiter) bool {
		switch {
		case w == own && done:
			return true
		case !concerned(w) || !w.ready():
			return false
		case w == own:
			done = true
		default:
			woken++
			w.wake <- false
		}
		return true
	})
	asked = true
	if done {
		ws.handOver()
	}
	return done, woken, err
}

// Recheck makes everybody who waits ask their condition again, for conditions
// that something in this process made true.
func (d *Device) Recheck() { d.wait.wakeLeader() }

func (ws *waiters) wakeLeader() {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.leading {
		evfd.Signal(ws.kick)
	}
}

// fail ends all waits: the leader found that the device cannot be waited for
// any more.
func (ws *waiters) fail(own *waiter, err error) error {
	if !errors.Is(err, ErrGone) && !errors.Is(err, os.ErrClosed) {
		err = &DeviceError{Device: ws.device.Address(), Op: "wait", Err: err}
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.end == nil {
		ws.end, ws.idle = err, make(chan struct{})
	}
	ws.remove(own)
	ws.handOver()
	return ws.end
}

// close ends all waits and waits until the leader is out.
func (ws *waiters) close(err error) {
	if err == nil {
		err = os.ErrClosed
	}
	ws.mu.Lock()
	if ws.end == nil {
		ws.end, ws.idle = err, make(chan struct{})
		if !ws.leading {
			close(ws.idle)
		} else {
			evfd.Signal(ws.kick)
		}
	}
	idle := ws.idle
	ws.mu.Unlock()
	<-idle
	if ws.set != nil {
		ws.set.Close()
	}
	if ws.kick >= 0 {
		unix.Close(ws.kick)
		ws.kick = -1
	}
}
