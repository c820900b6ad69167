package virtio

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// pollInterval is how often a device without interrupts is looked at.
const pollInterval = 500 * time.Microsecond

// pollsPerProbe is how often it is, for each time that somebody finds out
// whether there is a device at all.
const pollsPerProbe = 16

// end is what both ends of a link have: a device of two peers whose R/W section
// is theirs.
type end struct {
	dev  *ivshmem.Device
	mem  section
	peer uint32
}

// newEnd checks that the link is one for a virtio device.
func newEnd(dev *ivshmem.Device, id uint16, backEnd bool) (end, error) {
	e := end{dev: dev, peer: 1 - dev.ID(), mem: section{dev.Sections().ReadWrite}}
	want := regs.ProtocolVirtio | regs.Protocol(id)
	if backEnd {
		want |= regs.VirtioBackEnd
	}
	switch p := dev.Protocol(); {
	case p != want:
		return e, fmt.Errorf("%w: expected protocol type %04Xh (%v), found %04Xh (%v): serve the link with --protocol %#x; its peer 0 is the back-end",
			ErrUnsuitable, uint16(want), want, uint16(p), p, uint16(want))
	case dev.MaxPeers() != 2:
		return e, fmt.Errorf("%w: expected 2 peers, found %d: serve the link with --peers 2", ErrUnsuitable, dev.MaxPeers())
	case e.mem.ReadWrite == nil:
		return e, fmt.Errorf("%w: expected an R/W section, found none that %s reaches: serve the link with --rw", ErrUnsuitable, dev.Driver())
	case e.mem.Size() < minSection:
		return e, fmt.Errorf("%w: expected an R/W section of at least %d bytes, found %d: serve the link with a larger --rw", ErrUnsuitable, minSection, e.mem.Size())
	}
	return e, nil
}

// vectorOf is the vector for queue q: one of its own where there are enough,
// the last one otherwise. There may be vectors that do not arrive.
func (e *end) vectorOf(q int) int {
	v := min(q+1, e.dev.Vectors()-1)
	if e.dev.HasInterrupts() && !e.dev.Delivers(v) {
		return 0
	}
	return v
}

// wait waits until ready, by interrupts of the vectors where there are any.
func (e *end) wait(ctx context.Context, vectors []int, ready func() bool) error {
	if e.dev.HasInterrupts() {
		return e.dev.Wait(ctx, vectors, ready)
	}
	for polls := 1; !ready(); polls++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		time.Sleep(pollInterval)
		if polls%pollsPerProbe != 0 {
			continue
		}
		id, err := e.dev.Register(regs.ID)
		if err == nil && id == regs.AllOnes {
			err = ivshmem.ErrGone
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// watch is the peer's state. Where interrupts of vector 0 are counted, and none
// are lost, the State Table, which may be a message away, is read only after
// one that some wait has counted. It is not safe for concurrent use.
type watch struct {
	apart  bool
	looked uint64 // interrupts of vector 0 when it was read last
	known  bool
	state  uint32
}

func (e *end) newWatch() watch {
	return watch{apart: e.dev.HasInterrupts() && e.dev.Delivers(0) && e.dev.VectorsApart() && !e.dev.OneShot()}
}

// peerState is the peer's state. One that cannot be read is not there.
func (e *end) peerState(w *watch) uint32 {
	n := e.dev.Interrupts(0)
	if w.apart && w.known && n == w.looked {
		return w.state
	}
	w.looked, w.known, w.state = n, true, e.stateNow()
	return w.state
}

// stateNow is the peer's state, for those who do not wait for interrupts.
func (e *end) stateNow() uint32 {
	v, err := e.dev.State(e.peer)
	if err != nil {
		return stateReset
	}
	return v
}

// looksPerTime is how often spin looks between two readings of the clock.
const looksPerTime = 32

// Of its CPUs a process takes half to look, but one where it has more: for those
// who began last, as whoever has just received something gets more the soonest.
var (
	lookers     atomic.Uint64 // that have begun
	maxSpinners = uint64(max(1, runtime.NumCPU()/2))
)

// spin looks for a condition for a while, and reports whether to look the next
// time.
func spin(ctx context.Context, limit time.Duration, found func() bool) bool {
	own := lookers.Add(1)
	var end time.Time
	for {
		// Whom it has just woken runs here, where there is nothing else to wake.
		runtime.Gosched()
		for range looksPerTime {
			if found() {
				return true
			}
			shmem.Pause()
		}
		now := time.Now()
		switch {
		case end.IsZero():
			end = now.Add(limit)
		case now.After(end) || ctx.Err() != nil || lookers.Load()-own >= maxSpinners:
			return false
		}
	}
}
