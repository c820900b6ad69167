package pingpong

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
)

// Mode is how a peer notices a message.
type Mode int

// Modes.
const (
	Poll      Mode = iota // look at the shared memory all the time
	Interrupt             // sleep until the doorbell rings
)

func (m Mode) String() string {
	switch m {
	case Poll:
		return "poll"
	case Interrupt:
		return "interrupt"
	}
	return fmt.Sprintf("%d (unknown)", int(m)) // a peer's state may say anything
}

// ParseMode reads the name of a mode.
func ParseMode(s string) (Mode, error) {
	for _, m := range []Mode{Poll, Interrupt} {
		if m.String() == s {
			return m, nil
		}
	}
	return 0, fmt.Errorf("mode %q: expected poll or interrupt", s)
}

// Config of a run. Both peers need the same Mode.
type Config struct {
	Mode Mode
	// Messages is the number of round trips that count, and Duration how long
	// they may take: the pinger's limits hold for both peers, and the first
	// that is reached ends the run. 0 is no limit. Warmup is the number of
	// round trips before that do not count.
	Messages, Warmup uint64
	Duration         time.Duration
	// Blind keeps the peer that answers from measuring: reading the clock
	// would be part of the other's round trips.
	Blind bool
	// Batch is how many round trips make a sample: more than one keep the
	// reading of the clock out of them. 0 is 1.
	Batch uint64
	// Rate is the pinger's messages per second, in an open loop: see Task.
	Rate float64
	// Phase numbers the runs of one pair of handles, from 0.
	Phase uint32
	// Silence is how long the peer may say nothing before the run fails.
	Silence time.Duration
}

// Result of a run.
type Result struct {
	Mode     Mode
	Role     string // "ping" leads, "pong" answers
	Messages uint64 // round trips that were counted
	Errors   uint64
	Elapsed  time.Duration
	// RTT is the round trips in nanoseconds: from a message to the peer's
	// next. nil for pong if it is blind.
	RTT *hdrhistogram.Histogram
	// Rung is the interrupts seen, by vector, in mode interrupt.
	Rung map[int]uint64
}

// The State register carries how far a peer is: phase, mode, step.
const (
	stepHello = 1 // own lane is clear
	stepGo    = 2 // peer's hello was seen
	stepDone  = 3 // all messages were exchanged
)

func state(c Config, step uint32) uint32 {
	return (c.Phase+1)<<8 | uint32(c.Mode)<<4 | step
}

// endOfRun is the sequence number that ends a run.
const endOfRun = 1<<48 - 1

// vectors of a link with so many: messages with odd numbers ring the first,
// with even numbers the second, so that vectors are told apart where there
// is more than the one of state changes.
func vectors(n int) [2]int {
	switch {
	case n >= 3:
		return [2]int{1, 2}
	case n == 2:
		return [2]int{0, 1}
	}
	return [2]int{0, 0}
}

type run struct {
	Config
	dev     *ivshmem.Device
	peer    uint32
	pinger  bool
	lanes   lanes
	vectors [2]int
	rung    [2]uint64 // interrupts expected so far, by parity
	base    [2]uint64
	last    uint64 // the word that was received last
	// progress is the number of messages received.
	progress atomic.Uint64
}

// Run plays with the one other peer of the link, or the peer with the given
// ID on a link of more.
func Run(parent context.Context, dev *ivshmem.Device, peer uint32, c Config) (*Result, error) {
	if c.Mode == Interrupt && !dev.HasInterrupts() {
		return nil, fmt.Errorf("mode interrupt: %w by back end %s: bind the device to vfio-pci, or use mode poll", ivshmem.ErrNotSupported, dev.Driver())
	}
	if peer == dev.ID() || peer >= dev.MaxPeers() {
		return nil, fmt.Errorf("peer %d: expected another peer below %d", peer, dev.MaxPeers())
	}
	r := &run{Config: c, dev: dev, peer: peer, pinger: dev.ID() < peer, vectors: vectors(dev.Vectors())}
	var err error
	if r.lanes, err = openLanes(dev, peer); err != nil {
		return nil, err
	}
	for i, v := range r.vectors {
		r.base[i] = dev.Interrupts(v)
	}
	if err := r.meet(parent); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	// One call at the end of all waits, instead of one in each.
	defer context.AfterFunc(ctx, dev.Recheck)()
	go r.watch(ctx, cancel)
	res := &Result{Mode: c.Mode, Role: "pong"}
	if r.pinger || !c.Blind {
		res.RTT = hdrhistogram.New(1, int64(longest), 3)
	}
	if r.pinger {
		res.Role = "ping"
		err = r.ping(ctx, res)
	} else {
		err = r.pong(ctx, res)
	}
	if c.Mode == Interrupt {
		res.Rung = map[int]uint64{}
		for i, v := range r.vectors {
			res.Rung[v] = dev.Interrupts(v) - r.base[i]
		}
	}
	if err != nil {
		res.Errors++
		return res, err
	}
	// Its departure is no surprise any more.
	cancel(nil)
	return res, r.part(parent)
}

// meet waits until both peers are ready.
func (r *run) meet(ctx context.Context) error {
	r.last = word(0, false)
	r.lanes.out.Store(0, r.last)
	if err := r.step(ctx, stepHello, stepHello); err != nil {
		return err
	}
	return r.step(ctx, stepGo, stepGo)
}

// part waits until the peer has seen the end, so that neither takes the
// other's next phase, or departure, for part of this one. Then both take their
// states back: what follows may be another protocol, and who looks for that
// must not take this one's section for it.
func (r *run) part(ctx context.Context) error {
	if err := r.step(ctx, stepDone, stepDone); err != nil {
		return err
	}
	if err := r.dev.SetState(0); err != nil {
		return err
	}
	return await(ctx, r.dev, r.peer, func(s uint32) (bool, error) { return s>>8 != r.Phase+1, nil })
}

// step sets the own state and waits for the peer's.
func (r *run) step(ctx context.Context, own, peer uint32) error {
	if err := r.dev.SetState(state(r.Config, own)); err != nil {
		return err
	}
	seen := peer > stepHello
	return await(ctx, r.dev, r.peer, func(s uint32) (bool, error) {
		switch this := s>>8 == r.Phase+1; {
		case this && s>>4&0xf != uint32(r.Mode):
			r.linger(ctx)
			return false, fmt.Errorf("peer %d runs mode %v, expected %v: start both with the same --mode", r.peer, Mode(s>>4&0xf), r.Mode)
		case this && s&0xf >= peer:
			return true, nil
		case this:
			seen = true
		case peer == stepDone:
			return true, nil // it has seen the end, and gone on
		case seen && s == 0:
			return false, fmt.Errorf("%w: peer %d left", ivshmem.ErrGone, r.peer)
		}
		return false, nil
	})
}

// await waits until the peer's state is as expected.
func await(ctx context.Context, dev *ivshmem.Device, peer uint32, reached func(state uint32) (bool, error)) error {
	for {
		s, err := dev.State(peer)
		if err != nil {
			return err
		}
		if ok, err := reached(s); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for peer %d: %w", peer, context.Cause(ctx))
		case <-time.After(time.Millisecond):
		}
	}
}

// linger stays until a peer of another mode has seen that too, and left.
func (r *run) linger(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		if s, err := r.dev.State(r.peer); s == 0 || err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (r *run) ping(ctx context.Context, res *Result) error {
	batch := max(r.Batch, 1)
	if r.Rate > 0 {
		batch = 1
	}
	var pace pacer
	var begin, sent, now time.Time // begin is that of what counts
	for seq := uint64(1); ; {
		if seq == r.Warmup+1 {
			begin = time.Now()
			sent = begin
			if r.Rate > 0 {
				pace = newPacer(r.Rate)
			}
		}
		counts := seq > r.Warmup
		n := batch
		switch {
		case !counts:
			n = min(n, r.Warmup+1-seq)
		case r.Messages > 0:
			n = min(n, r.Messages+r.Warmup+1-seq)
		}
		switch {
		case r.Rate > 0 && counts:
			sent = pace.wait(seq - r.Warmup - 1)
		case batch == 1:
			sent = time.Now()
		}
		if err := r.rounds(ctx, seq, n); err != nil {
			return err
		}
		seq += n
		now = time.Now()
		if counts && n == batch {
			rtt := now.Sub(sent)
			res.Messages += n
			res.Elapsed += rtt
			if err := res.RTT.RecordValue(max(1, int64(rtt)/int64(n))); err != nil {
				return err
			}
		}
		sent = now
		if counts && (seq > r.Warmup+r.Messages && r.Messages > 0 || r.Duration > 0 && now.Sub(begin) >= r.Duration) {
			r.lanes.out.Store(0, word(endOfRun, false))
			if r.Rate > 0 {
				res.Elapsed = now.Sub(begin)
			}
			if r.Mode == Interrupt {
				return r.dev.Ring(r.peer, r.vectors[seq&1^1])
			}
			return nil
		}
	}
}

// rounds are n round trips from the message seq on.
func (r *run) rounds(ctx context.Context, seq, n uint64) error {
	if r.Mode == Interrupt {
		for end := seq + n; seq < end; seq++ {
			if err := r.send(seq); err != nil {
				return err
			}
			if err := r.receive(ctx, seq); err != nil {
				return err
			}
		}
		return nil
	}
	next := word(seq, false)
	for end := seq + n; seq < end; seq++ {
		r.lanes.out.Store(0, next)
		// While it is on its way.
		want := word(seq, true)
		next = word(seq+1, false)
		r.progress.Store(seq)
		got, err := r.spin(ctx, seq)
		if err != nil {
			return err
		}
		if r.last = got; got != want {
			return &MessageError{Field: "word", Expected: want, Found: got}
		}
	}
	return nil
}

func (r *run) pong(ctx context.Context, res *Result) error {
	if r.Mode == Poll && res.RTT == nil {
		return r.pollPong(ctx, res)
	}
	var sent time.Time
	for seq := uint64(1); ; seq++ {
		switch err := r.receive(ctx, seq); {
		case errors.Is(err, errEnd):
			return nil
		case err != nil:
			return err
		}
		if res.RTT == nil {
			res.Messages++
		} else if seq > 1 { // nothing was sent before the first
			if err := r.record(res, seq, sent); err != nil {
				return err
			}
		}
		if res.RTT != nil {
			sent = time.Now()
		}
		if err := r.send(seq); err != nil {
			return err
		}
	}
}

// pollPong answers at once, and sees to all else while the next message is on
// its way.
func (r *run) pollPong(ctx context.Context, res *Result) error {
	for seq := uint64(1); ; seq++ {
		want, answer := word(seq, false), word(seq, true)
		got, err := r.spin(ctx, seq)
		if err != nil {
			return err
		}
		if got != want {
			if got == word(endOfRun, false) {
				return nil
			}
			return &MessageError{Field: "word", Expected: want, Found: got}
		}
		r.lanes.out.Store(0, answer)
		r.last = got
		res.Messages++
		r.progress.Store(seq)
	}
}

// record counts the round trip that ended with the message seq.
func (r *run) record(res *Result, seq uint64, sent time.Time) error {
	if seq <= r.Warmup {
		return nil
	}
	rtt := time.Since(sent)
	res.Messages++
	res.Elapsed += rtt
	return res.RTT.RecordValue(max(1, int64(rtt)))
}

func (r *run) send(seq uint64) error {
	r.lanes.out.Store(0, word(seq, !r.pinger))
	if r.Mode == Interrupt {
		return r.dev.Ring(r.peer, r.vectors[seq&1^1])
	}
	return nil
}

var errEnd = errors.New("end of run")

// receive waits for the message seq and checks it.
func (r *run) receive(ctx context.Context, seq uint64) error {
	var got uint64
	var err error
	if r.Mode == Interrupt {
		got, err = r.sleep(ctx, seq)
	} else {
		got, err = r.spin(ctx, seq)
	}
	if err != nil {
		return err
	}
	r.last = got
	if want := word(seq, r.pinger); got != want {
		if !r.pinger && got == word(endOfRun, false) {
			return errEnd
		}
		return &MessageError{Field: "word", Expected: want, Found: got}
	}
	r.progress.Store(seq)
	return nil
}

// spin looks until there is another message than the last one.
func (r *run) spin(ctx context.Context, seq uint64) (uint64, error) {
	// On a single CPU the peer may be another process that needs it. Yielding
	// to the kernel, not to Go's scheduler: that would hand the thread over.
	yield := runtime.NumCPU() == 1
	in, last := r.lanes.in, r.last
	for {
		for range 1 << 10 {
			if got := in.Load(0); got != last {
				return got, nil
			}
		}
		if yield {
			unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("waiting for message %d: %w", seq, context.Cause(ctx))
		}
	}
}

// watch cancels the run when the peer left, or said nothing for too long.
func (r *run) watch(ctx context.Context, cancel context.CancelCauseFunc) {
	const looks = 8 // in the time of Silence
	tick := time.NewTicker(max(r.Silence/looks, time.Millisecond))
	defer tick.Stop()
	var last uint64
	for quiet := 0; ; quiet++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if n := r.progress.Load(); n != last {
			last, quiet = n, 0
		}
		if quiet == looks {
			cancel(fmt.Errorf("peer %d has been silent for %v: message lost", r.peer, r.Silence))
		}
		if s, err := r.dev.State(r.peer); err == nil && s == 0 {
			cancel(fmt.Errorf("%w: peer %d left in the middle", ivshmem.ErrGone, r.peer))
		}
	}
}

// sleep waits for the interrupt of the message seq, on its vector and no
// other.
func (r *run) sleep(ctx context.Context, seq uint64) (uint64, error) {
	i := seq&1 ^ 1
	v := r.vectors[i]
	r.rung[i]++
	due := r.base[i] + r.rung[i]
	// Interrupts are counted only where they tell their vector, and where
	// state changes do not share it, as on vector 0.
	strict := v != 0 && r.dev.VectorsApart()
	var got uint64
	err := r.dev.Wait(context.Background(), r.vectors[i:i+1], func() bool {
		got = r.lanes.in.Load(0)
		return got != r.last && (!strict || r.dev.Interrupts(v) >= due) || ctx.Err() != nil
	})
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return 0, fmt.Errorf("waiting for message %d on vector %d: %w", seq, v, err)
	}
	return got, nil
}
