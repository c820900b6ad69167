package virtio

import (
	"context"
	"sync/atomic"
	"time"
)

// vacancy is how long nobody may wait for buffers before Serve waits for
// register writes itself.
const vacancy = 5 * time.Millisecond

// guard is who answers register writes. Whoever waits for a buffer does, in the
// same wait of the device; while nobody does, Serve. It steps back as soon as
// somebody comes, since being woken by another goroutine takes longer than by
// the kernel.
type guard struct {
	waiting  atomic.Int32 // for buffers
	serving  atomic.Bool  // Serve waits for interrupts
	vacant   atomic.Bool  // timer is running
	timer    *time.Timer
	attended chan struct{} // full: Serve has something to do
}

func (g *guard) init() {
	g.attended = make(chan struct{}, 1)
	g.timer = time.AfterFunc(time.Hour, g.endVacancy)
	g.timer.Stop()
}

// call makes Serve look.
func (g *guard) call() {
	select {
	case g.attended <- struct{}{}:
	default:
	}
}

// endVacancy is Serve's turn.
func (g *guard) endVacancy() {
	g.vacant.Store(false)
	if g.waiting.Load() == 0 {
		g.call()
	}
}

// await waits for a buffer, and answers register writes meanwhile.
func (b *BackEnd) await(ctx context.Context, q *Queue) error {
	b.waiting.Add(1)
	if b.guard.serving.Load() {
		b.dev.Recheck()
	}
	err := b.wait(ctx, q.vectors, q.ready)
	if b.waiting.Add(-1) == 0 && b.vacant.CompareAndSwap(false, true) {
		b.timer.Reset(vacancy)
	}
	return err
}

// sleep waits until Serve has something to do, or may have.
func (b *BackEnd) sleep(ctx context.Context) error {
	replaced := func() bool { return b.waiting.Load() > 0 && b.dev.HasInterrupts() }
	if replaced() {
		select {
		case <-b.attended:
		case <-ctx.Done():
			return ctx.Err()
		}
		if b.look() {
			b.call() // what is left is for the next time
		}
		return nil
	}
	b.guard.serving.Store(true)
	err := b.wait(ctx, b.vectors, func() bool { return b.look() || replaced() })
	b.guard.serving.Store(false)
	return err
}

// poke makes Serve and all who wait for buffers look.
func (b *BackEnd) poke() {
	b.call()
	b.dev.Recheck()
}
