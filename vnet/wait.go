package vnet

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
)

const (
	// pollInterval is how often a link without interrupts is looked at.
	pollInterval = 500 * time.Microsecond
	// pollsPerLook is how often it is, for each look at the State Table: that, and
	// finding out whether there is a device at all, may cost as much as a sleep.
	pollsPerLook = 16
	// vacancy is how long nobody may wait for interrupts before the caretaker does.
	vacancy = 100 * time.Millisecond
)

// waiting is how a link waits. Whoever waits, for a frame or for room, looks at
// the peer's state too, in one wait of the device. While nobody does, the
// caretaker waits for changes of the state alone; it leaves as soon as somebody comes,
// since being woken by another goroutine takes longer than by the kernel.
type waiting struct {
	link       *Link
	interrupts bool  // all that are needed arrive
	vectors    []int // these
	// apart says that interrupts of vector 0 are counted, and none are lost: the
	// State Table, which may be a message away, need not be read for any other.
	apart  bool
	looked atomic.Uint64 // the number of them when the state was last looked at
	seen   atomic.Uint64 // the state then
	polls  atomic.Uint64
	due    atomic.Bool // the state has to be looked at

	waiters    atomic.Int32
	caretaking atomic.Bool
	vacant     atomic.Bool // timer is running
	timer      *time.Timer
	ended      atomic.Bool
	wakeUps    atomic.Uint64
	// Conditions, bound once.
	rxReady, txReady, caretakerReady func() bool
}

func (w *waiting) init(l *Link, vector int) {
	dev := l.dev
	w.link = l
	w.interrupts = dev.HasInterrupts() && dev.Delivers(0) && dev.Delivers(vector)
	w.vectors = []int{0, vector}[:vector+1]
	w.apart = w.interrupts && dev.VectorsApart() && !dev.OneShot()
	w.rxReady = func() bool { return w.ask() || l.rx.ready() }
	w.txReady = func() bool { return w.ask() || l.tx.ready() }
	w.caretakerReady = func() bool { return w.waiters.Load() > 0 || w.ended.Load() || w.ask() }
	w.vacant.Store(true)
	w.timer = time.AfterFunc(time.Hour, w.endVacancy)
}

// ask reports whether the peer's state has to be looked at.
func (w *waiting) ask() bool {
	var due bool
	switch {
	case w.apart:
		due = w.link.dev.Interrupts(0) != w.looked.Load()
	case w.interrupts || w.polls.Add(1)%pollsPerLook == 0:
		v, err := w.link.dev.State(w.link.peer)
		due = err != nil || uint64(v) != w.seen.Load()
	}
	if due {
		w.due.Store(true)
	}
	return due
}

// unsettled says that the state has to be looked at whatever happens.
func (w *waiting) unsettled() {
	w.looked.Store(^uint64(0))
	w.seen.Store(^uint64(0))
}

// load loads the peer's state.
func (w *waiting) load() (uint32, error) {
	w.looked.Store(w.link.dev.Interrupts(0)) // what comes from here on is due
	v, err := w.link.dev.State(w.link.peer)
	w.seen.Store(uint64(v))
	return v, err
}

// wait does what err of a queue says: sleeps until ready, or gives up. Session is
// that of the queue then. After nil the caller tries again.
func (l *Link) wait(ctx context.Context, err error, session uint32, ready func() bool) error {
	switch err {
	case errFull, errEmpty:
		if err := ctx.Err(); err != nil {
			return err
		}
		return l.sleep(ctx, ready)
	case errBudget:
		return ctx.Err()
	}
	var v *ViolationError
	if errors.As(err, &v) {
		l.violated(v, session)
	}
	return err
}

// sleep waits until ready, and takes over what the peer's state has become.
func (l *Link) sleep(ctx context.Context, ready func() bool) error {
	l.waiters.Add(1)
	if l.caretaking.Load() {
		l.dev.Recheck()
	}
	err := l.sleepOnce(ctx, ready)
	if l.waiters.Add(-1) == 0 {
		l.vacate()
	}
	return err
}

func (l *Link) sleepOnce(ctx context.Context, ready func() bool) error {
	var err error
	if l.interrupts {
		err = l.dev.Wait(ctx, l.vectors, ready)
	} else {
		err = l.poll(ctx, ready)
	}
	l.wakeUps.Add(1)
	switch {
	case err == nil:
		if l.due.Swap(false) {
			l.look()
		}
	case ctx.Err() == nil:
		l.mu.Lock()
		l.fail(err)
		err = l.err
		l.mu.Unlock()
	}
	return err
}

// poll waits without interrupts.
func (l *Link) poll(ctx context.Context, ready func() bool) error {
	for !ready() {
		if err := ctx.Err(); err != nil {
			return err
		}
		time.Sleep(pollInterval)
		if l.polls.Load()%pollsPerLook != 0 {
			continue
		}
		id, err := l.dev.Register(regs.ID)
		if err == nil && id == regs.AllOnes {
			err = ivshmem.ErrGone
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// vacate has the caretaker come if nobody waits for a while.
func (w *waiting) vacate() {
	if w.vacant.CompareAndSwap(false, true) {
		w.timer.Reset(vacancy)
	}
}

// endVacancy is the caretaker's turn.
func (w *waiting) endVacancy() {
	w.vacant.Store(false)
	if w.ended.Load() || w.waiters.Load() > 0 || !w.caretaking.CompareAndSwap(false, true) {
		return
	}
	for w.waiters.Load() == 0 && !w.ended.Load() {
		w.link.sleepOnce(context.Background(), w.caretakerReady)
	}
	w.caretaking.Store(false)
	if w.waiters.Load() == 0 && !w.ended.Load() {
		w.vacate()
	}
}

// WaitCarrier waits until there is carrier, or none. It fails with the
// context's error, or [os.ErrClosed]. Who calls it in turns sees all changes but
// those that are undone before it comes back.
func (l *Link) WaitCarrier(ctx context.Context, on bool) error {
	for {
		l.mu.Lock()
		err, changed := l.err, l.changed
		l.mu.Unlock()
		switch {
		case err != nil:
			return err
		case l.carrier.Load() == on:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
