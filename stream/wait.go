package stream

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Mode is how connections of an endpoint wait.
type Mode int

const (
	// Adaptive looks for a while where that paid off before, and then sleeps.
	// The default.
	Adaptive Mode = iota
	// Sleep sleeps at once.
	Sleep
	// Poll looks all the time: the lowest latency, for a CPU per waiter.
	Poll
)

const (
	// An endpoint's spinLimit is the longest that Adaptive looks: about as long as
	// it takes the peer to wake up and answer. With less, two that are busy with
	// each other would never look again once both have slept.
	minSpinLimit, maxSpinLimit = 50 * time.Microsecond, 2 * time.Millisecond
	// A wait that ended with a sleep, and took no longer than so many limits, says
	// that looking is worth trying again.
	paidOff = 2
	// spinStride is how many looks there are between two readings of the clock.
	spinStride = 32
)

// Reasons to stop waiting, as bits of waiter.stop.
const (
	stopDeadline = 1 << iota
	stopClosed   // by the own side
	stopBroken   // reset, or the device is gone: the error is kept
	stopLost     // the peer left: what it wrote can still be read
	stopRefusing // the peer reads no more
	stopFinished // CloseWrite was called
)

// waiter is who may wait for a condition: the reader and the writer of a
// connection, an Accept, a Dial.
type waiter struct {
	ep *Endpoint
	// ready is the condition. It is called with ep.mu held or not, and looks
	// at memory only.
	ready func() bool
	// rx is the receiver of which ready is the condition, nil: another.
	rx *receiver
	// stop has reasons to end the wait, whatever the condition.
	stop atomic.Uint32

	spin  time.Duration // what Adaptive spends on looking
	left  time.Time     // when it woke up the last time
	quick bool          // it came back soon after that

	// Below: with ep.mu held.
	asleep     bool
	next, prev *waiter // in ep.queue
	wake       chan bool
}

func (w *waiter) init(ep *Endpoint, ready func() bool) {
	w.ep, w.ready, w.wake = ep, ready, make(chan bool, 1)
	w.spin = ep.spinLimit
}

func (w *waiter) done() bool { return w.ready() || w.stop.Load() != 0 }

// wait waits until the condition holds or there is a reason to stop. Arm tells
// the peer that it has to ring.
func (w *waiter) wait(arm func()) {
	if w.done() {
		return
	}
	switch w.ep.config.Mode {
	case Poll:
		w.look(0)
	case Sleep:
		w.sleep(arm)
	default:
		w.adapt(arm)
	}
}

// sleep waits asleep. Arm tells the peer that it has to ring.
func (w *waiter) sleep(arm func()) {
	for arm(); !w.done(); arm() {
		w.ep.sleep(w)
	}
}

func (w *waiter) adapt(arm func()) {
	start := time.Now()
	if w.spin > 0 && startSpinning() {
		found := w.look(w.spin)
		stopSpinning()
		if found {
			w.spin = w.ep.spinLimit
			return
		}
		w.spin /= 2
		if w.spin < time.Microsecond {
			w.spin = 0
		}
	}
	w.sleep(arm)
	if time.Since(start) < paidOff*w.ep.spinLimit {
		w.spin = w.ep.spinLimit
	}
}

// measureWake sets spinLimit. What a doorbell takes is very different: between
// host processes it is a system call, from a guest an exit to the hypervisor,
// and a message to the service. So the endpoint rings itself. The interrupt is
// there when the call has hardly returned: to sleep and to wake takes longer.
func (ep *Endpoint) measureWake() {
	const rings, patience, times = 3, 10 * time.Millisecond, 4
	ep.spinLimit = minSpinLimit
	if !ep.dev.HasInterrupts() {
		return
	}
	best := time.Duration(maxSpinLimit)
	for range rings {
		before := ep.dev.Interrupts(ep.vector)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		begin := time.Now()
		err := ep.dev.Ring(ep.dev.ID(), ep.vector)
		if err == nil {
			err = ep.dev.Wait(ctx, nil, func() bool { return ep.dev.Interrupts(ep.vector) != before })
		}
		best = min(best, time.Since(begin))
		cancel()
		if err != nil { // whatever it is, it shows elsewhere
			return
		}
	}
	ep.spinLimit = min(max(times*best, minSpinLimit), maxSpinLimit)
}

// look looks for the condition, for a time limit if it is not 0.
func (w *waiter) look(limit time.Duration) bool {
	var end time.Time
	for i := 1; ; i++ {
		if w.glances() {
			return true
		}
		switch {
		case limit > 0:
			now := time.Now()
			if end.IsZero() {
				end = now.Add(limit)
			} else if now.After(end) {
				return false
			}
		case lonely && i%64 == 0:
			// The peer may be another process that needs the only CPU.
			// Yielding to the kernel, not to Go's scheduler: that would hand
			// the thread over.
			unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
	}
}

// glances looks a few times in a row.
func (w *waiter) glances() bool {
	if w.rx != nil {
		return w.rx.glances(&w.stop)
	}
	for range spinStride {
		if w.done() {
			return true
		}
	}
	return false
}

// A machine with fewer CPUs than spinners gets slower by every one of them.
// The peers are often on the same machine: so a process takes half of the CPUs
// that it may use, but one where the machine has more.
var (
	lonely      = onlineCPUs() == 1
	maxSpinners = spinnersOf(onlineCPUs(), runtime.NumCPU())
	spinners    atomic.Int32
)

func spinnersOf(online, usable int) int32 {
	if online == 1 {
		return 0
	}
	return int32(max(1, usable/2))
}

// onlineCPUs is the number of the machine's CPUs, also of those that this
// process is kept from using; at least 1.
func onlineCPUs() int {
	// A list of ranges, such as 0-3,5 (kernel documentation, "cputopology").
	text, err := os.ReadFile("/sys/devices/system/cpu/online")
	n := 0
	for r := range strings.SplitSeq(strings.TrimSpace(string(text)), ",") {
		var first, last int
		switch c, _ := fmt.Sscanf(r, "%d-%d", &first, &last); c {
		case 2:
			n += last - first + 1
		case 1:
			n++
		}
	}
	if err != nil || n < 1 {
		return runtime.NumCPU()
	}
	return n
}

func startSpinning() bool {
	if spinners.Add(1) <= maxSpinners {
		return true
	}
	spinners.Add(-1)
	return false
}

func stopSpinning() { spinners.Add(-1) }

// halt ends the wait for a reason, now and in future.
func (w *waiter) halt(reason uint32) {
	w.stop.Or(reason)
	w.ep.mu.Lock()
	w.ep.rouse(w)
	w.ep.unlock()
}

// deadline ends a waiter's waits at a time.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	set   int // how often it was set
}

// setDeadline replaces the deadline; the zero time is none.
func (d *deadline) setDeadline(w *waiter, t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.set++
	if t.IsZero() {
		w.stop.And(^uint32(stopDeadline))
		return
	}
	left := time.Until(t)
	if left <= 0 {
		w.halt(stopDeadline)
		return
	}
	w.stop.And(^uint32(stopDeadline))
	set := d.set
	d.timer = time.AfterFunc(left, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if set == d.set { // not replaced in the meantime
			w.halt(stopDeadline)
		}
	})
}
