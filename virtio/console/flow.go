package console

import (
	"context"
	"sync"
	"time"
)

// What the wires do with a port.

// attach lets a wire work for the port.
func (p *Port) attach(h hooks, eager bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hooks, p.eager = h, eager
	h.send.wake()
	h.room.wake()
	h.tell.wake()
	p.change()
}

// detach ends that: the other side is not there any more.
func (p *Port) detach() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hooks = hooks{}
	p.throttled, p.starved, p.sending = false, false, false
	p.reopened = false
	p.hangUp()
}

// remove ends the port. What has arrived can be read unless the port was taken
// away on purpose.
func (p *Port) remove(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.removed != nil {
		return
	}
	p.removed, p.out = err, fifo{}
	if err == ErrRemoved {
		p.unread = fifo{}
	}
	p.tail = false
	p.hooks.tell.wake()
	p.hooks.room.wake()
	p.change()
}

// peerOpened says that the other side opened its end.
func (p *Port) peerOpened() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.leaving { // what it wrote before comes first
		p.reopened = true
		p.hooks.room.wake()
		return
	}
	if !p.peerOpen {
		p.peerOpen = true
		p.hooks.send.wake()
		p.change()
	}
}

// peerLeaving says that the other side closed its end; hangUp follows when all
// that it wrote before has arrived.
func (p *Port) peerLeaving() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leaving, p.reopened = p.peerOpen, false
	p.hooks.room.wake()
}

// isLeaving says which closing of the other side has been told of, but has not
// come yet; 0: none.
func (p *Port) isLeaving() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.leaving {
		return 0
	}
	return p.hangups + 1
}

// arrived says that nothing was on the way since a closing was told of.
func (p *Port) arrived(closing uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.leaving && p.hangups+1 == closing {
		p.hangUp()
	}
}

// hangUp is the end of the other side's. The caller holds mu.
func (p *Port) hangUp() {
	p.leaving = false
	if p.peerOpen {
		p.peerOpen = false
		p.hangups++
	}
	if !p.eager || p.hooks.send == nil {
		p.out.Reset()
		p.tail = p.sending
	}
	p.starved = false
	if p.reopened {
		p.peerOpen, p.reopened = true, false
		p.hooks.send.wake()
	}
	p.hooks.tell.wake()
	p.change()
}

// room is how many bytes of unread data the port takes now, slack more than its
// limit.
func (p *Port) room(slack int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.discards() || p.stuck {
		return maxLimit
	}
	return max(p.limit+slack-p.unread.Len(), 0)
}

// stuckAfter is for how long who reads a console may take nothing before what
// arrives is dropped.
const stuckAfter = time.Second

// impatient reports whether the other side may stand still as long as a buffer
// is kept: a CPU of Linux does nothing else until it has what it wrote to a
// console back.
func (p *Port) impatient() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.owner && p.console && p.wire != Original
}

// giveUp waits for room, but not for ever.
func (p *Port) giveUp(wake context.Context) {
	later := time.NewTimer(stuckAfter)
	defer later.Stop()
	select {
	case <-wake.Done():
	case <-later.C:
		p.mu.Lock()
		p.stuck = p.full()
		p.mu.Unlock()
	}
}

// discards reports whether what arrives is dropped. The caller holds mu.
func (p *Port) discards() bool { return p.removed != nil || !p.isOpen() && !p.cache }

// full reports whether the limit of unread data is reached. The caller holds mu.
func (p *Port) full() bool { return !p.discards() && p.unread.Len() >= p.limit }

// receive takes data from the other side, for which there is room. It may come
// before the message that says that the port is open: they are in different
// queues. Without that there would be an end of file behind the first bytes.
func (p *Port) receive(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.peerOpen && p.removed == nil {
		p.peerOpen = true
		p.hooks.send.wake()
		p.change()
	}
	if p.discards() || p.stuck {
		p.dropped += uint64(len(b))
		return
	}
	full := p.full()
	p.unread.Write(b)
	if p.full() != full {
		p.hooks.tell.wake()
	}
	p.change()
}

// hasOut reports whether there is something to send now.
func (p *Port) hasOut() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.canPull()
}

// canPull reports whether something may be sent: nothing new before the other
// side knows that the port is open again. The caller holds mu.
func (p *Port) canPull() bool {
	return p.removed == nil && p.mayGoOut() && !p.throttled && p.out.Len() > 0 &&
		(p.tail || p.announced == p.turns || p.hooks.tell == nil)
}

// pull takes what is to be sent; sent says that it is on the way.
func (p *Port) pull(b []byte) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.canPull() {
		return 0
	}
	n := p.out.Read(b)
	p.sending, p.starved = true, false
	p.change()
	return n
}

func (p *Port) sent() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sending = false
	if p.tail && p.out.Len() == 0 {
		p.tail = false
		p.hooks.tell.wake() // that it is closed
	}
	p.change()
}

// starve says that there is no room in the queue for what is to be sent.
func (p *Port) starve() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.starved && p.canPull() {
		p.starved = true
		p.change()
	}
}

func (p *Port) setThrottled(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.throttled != on {
		p.throttled = on
		p.hooks.send.wake()
		p.change()
	}
}

func (p *Port) setSize(s Size) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.size != s {
		p.size = s
		p.resizes++
		p.hooks.tell.wake()
		p.change()
	}
}

// describe sets what the device said of the port. Only its first name counts.
func (p *Port) describe(name string, console bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.name == "" {
		p.name = name
	}
	if console {
		p.console = true
		p.turnOpen() // mandatory
	}
	p.change()
}

// told is what the other side knows of a port.
type told struct {
	console, name bool
	turns         uint64
	resizes       uint64
	full          bool
	asks          asks
}

// afresh is what a side knows that has just begun: that the own end is closed.
func (p *Port) afresh() told {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.announced = p.turns &^ 1
	return told{turns: p.announced}
}

// turn is what is to be told of opening and closing: all that happened since the
// last time is one message, or two, so that no closing goes unseen. The caller
// holds mu.
func (p *Port) turn(t *told) (open, due bool) {
	switch {
	case t.turns == p.turns:
		return false, false
	case p.tail:
		return false, false // what was written goes first
	case (p.turns-t.turns)%2 == 0:
		t.turns = p.turns - 1
	default:
		t.turns = p.turns
	}
	p.announced = t.turns
	p.hooks.send.wake()
	return t.turns&1 == 1, true
}

// waker wakes a goroutine that waits for a queue and for something else.
type waker struct {
	parent context.Context
	mu     sync.Mutex
	ctx    context.Context
	cancel context.CancelFunc
}

func newWaker(ctx context.Context) *waker { return &waker{parent: ctx} }

// next is a context that ends at the next wake.
func (w *waker) next() context.Context {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ctx == nil {
		w.ctx, w.cancel = context.WithCancel(w.parent)
	}
	return w.ctx
}

func (w *waker) wake() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ctx != nil {
		w.cancel()
		w.ctx = nil
	}
}

// peerTurned is peerOpened or peerLeaving.
func (p *Port) peerTurned(open bool) {
	if open {
		p.peerOpened()
	} else {
		p.peerLeaving()
	}
}
