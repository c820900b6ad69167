package stream

import (
	"context"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
)

// One waiter of an endpoint, the leader, sleeps in the kernel. It looks at
// what the peers have to say, and wakes the others that it concerns. Being
// woken by the leader costs more than by the kernel: so a waiter that keeps
// coming back at once finds its place free, and takes it from a leader that
// sleeps for others only.
const (
	// vacancy is how long nobody may lead while others sleep: events of that
	// time are seen late. Where nobody does, it takes longer until the caretaker
	// leads, for those who knock.
	vacancy, idleVacancy = time.Millisecond, 10 * time.Millisecond
	// soon is how soon a leader has to come back for its place to be kept.
	soon = 200 * time.Microsecond
	// patience is how often a leader is woken for nothing but others before
	// a newcomer takes its place.
	patience = 3
)

// sleep sleeps until somebody thinks that the waiter should look again. The
// peer has been told to ring before.
func (ep *Endpoint) sleep(w *waiter) {
	ep.mu.Lock()
	if w.done() {
		ep.mu.Unlock()
		return
	}
	w.asleep = true
	w.quick = time.Since(w.left) < soon
	if ep.leader == nil {
		ep.leader = w
		ep.mu.Unlock()
		ep.lead(w)
	} else {
		ep.push(w)
		if ep.leader == &ep.caretaker || ep.misses >= patience {
			ep.claimant, ep.kick = w, true
		}
		ep.unlock()
		if <-w.wake {
			ep.lead(w)
		}
	}
	w.left = time.Now()
}

// pollInterval is how often an endpoint without interrupts looks for those who
// sleep.
const pollInterval = 500 * time.Microsecond

// patrol leads where there are no interrupts.
func (ep *Endpoint) patrol() {
	for i := 1; ; i++ {
		time.Sleep(pollInterval)
		var err error
		if i%patrolsPerCheck == 0 {
			err = ep.check()
		}
		ep.mu.Lock()
		if err != nil {
			ep.fail(err)
		}
		ep.pollLocked()
		ended := ep.err != nil
		ep.mu.Unlock()
		if ended {
			return
		}
	}
}

// patrolsPerCheck is how often patrol finds out whether there is a device at
// all: a register access may cost as much as a sleep.
const patrolsPerCheck = 64

// check fails if the device was closed or is gone.
func (ep *Endpoint) check() error {
	id, err := ep.dev.Register(regs.ID)
	if err == nil && id == regs.AllOnes {
		err = ivshmem.ErrGone
	}
	return err
}

// lead sleeps in the kernel for all. The waiter is the leader already.
func (ep *Endpoint) lead(w *waiter) {
	err := ep.dev.Wait(context.Background(), nil, ep.leaderAsked)
	ep.mu.Lock()
	defer ep.mu.Unlock()
	if err != nil {
		ep.fail(err)
	}
	w.asleep = false
	ep.misses = 0
	claimant := ep.claimant
	ep.claimant = nil
	switch {
	case claimant != nil && claimant.asleep:
		ep.appoint(claimant)
	case ep.queue != nil && claimant == nil && !w.quick:
		ep.appoint(ep.queue)
	default: // it comes back soon, as does a claimant who has been woken meanwhile
		ep.vacate()
	}
}

// vacate leaves nobody to lead, for a while. The caller holds ep.mu.
func (ep *Endpoint) vacate() {
	ep.leader = nil
	if ep.vacant || ep.err != nil {
		return
	}
	ep.vacant = true
	if ep.queue != nil {
		ep.vacancy.Reset(vacancy)
	} else {
		ep.vacancy.Reset(idleVacancy)
	}
}

// leaderReady is the condition of the leader's sleep: after an interrupt it looks
// at what the peers say.
func (ep *Endpoint) leaderReady() bool {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	ep.pollLocked()
	ep.kick = false // whoever it is for asks right now
	w := ep.leader
	if w.done() {
		return true
	}
	ep.misses++
	return ep.queue != nil && (w == &ep.caretaker || ep.misses > patience)
}

// appoint makes one in the queue the leader. The caller holds ep.mu.
func (ep *Endpoint) appoint(w *waiter) {
	ep.remove(w)
	ep.leader = w
	w.wake <- true
}

// endVacancy is what happens when nobody has led for a while.
func (ep *Endpoint) endVacancy() {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	ep.vacant = false
	switch {
	case ep.leader != nil || ep.err != nil:
	case ep.queue != nil:
		ep.appoint(ep.queue)
	default:
		ep.caretaker.asleep = true
		ep.leader = &ep.caretaker
		go ep.lead(&ep.caretaker)
	}
}

// rouse makes a waiter look again. The caller holds ep.mu, and gives it back by
// unlock.
func (ep *Endpoint) rouse(w *waiter) {
	switch {
	case !w.asleep:
	case w == ep.leader:
		ep.kick = true
	default:
		ep.remove(w)
		w.asleep = false
		w.wake <- false
	}
}

// unlock gives ep.mu back, and wakes the leader if it has to look: it may hold
// the device's lock and want ep.mu, so not before.
func (ep *Endpoint) unlock() {
	kick := ep.kick
	ep.kick = false
	ep.mu.Unlock()
	if kick {
		ep.dev.Recheck()
	}
}

// push appends to the queue, a ring of waiters of which ep.queue is the first.
func (ep *Endpoint) push(w *waiter) {
	if ep.queue == nil {
		w.next, w.prev = w, w
		ep.queue = w
		return
	}
	first := ep.queue
	w.next, w.prev = first, first.prev
	first.prev.next, first.prev = w, w
}

func (ep *Endpoint) remove(w *waiter) {
	if w.next == w {
		ep.queue = nil
	} else {
		w.next.prev, w.prev.next = w.prev, w.next
		if ep.queue == w {
			ep.queue = w.next
		}
	}
	w.next, w.prev = nil, nil
}
