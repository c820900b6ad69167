package vnet_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/vnet"
)

// seat is one end of a duel: a driver, and those that were there before it.
type seat struct {
	load loader
	open func() *ivshmem.Device
	mtu  int
	in   *flow // what it receives

	mu     sync.RWMutex // held while a driver sends; changing it waits for that
	dev    *ivshmem.Device
	d      driver
	past   tally
	faulty int // looks at a fault
}

func (s *seat) send(frames [][]byte) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.d.send(frames)
}

// restart ends the driver, and loads another. The model's interface is down then.
func (s *seat) restart(kill bool) {
	s.d.end(kill)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.past.add(s.d.tally())
	s.dev.Close()
	s.dev = s.open()
	s.d = s.load(s.dev, s.mtu, s.in.take)
}

func (s *seat) total() tally {
	t := s.past
	t.add(s.d.tally())
	return t
}

// flow is frames one way. Each tells its number, and has the length and the
// content that follow from that.
type flow struct {
	*duel
	from   *seat
	name   string
	mu     sync.Mutex // one sends at a time
	random *rand.Rand
	frames [][]byte
	sent   atomic.Uint64

	next atomic.Uint64 // the number behind the last one that came
	got  atomic.Uint64
	// mark is the number from which on none may be missing.
	mark  atomic.Uint64
	pause func() // of the receiver
}

var filling = func() []byte {
	p := make([]byte, 1<<18+vnet.MaxFrame)
	rand.NewChaCha8([32]byte{}).Read(p)
	return p
}()

func scatter(n uint64) uint64 {
	n = (n ^ n>>30) * 0xbf58476d1ce4e5b9
	n = (n ^ n>>27) * 0x94d049bb133111eb
	return n ^ n>>31
}

// content is a frame but its number, which comes first. A few are as long as they
// may be, many are short.
func (f *flow) content(number uint64) []byte {
	x := scatter(number + 1)
	most := f.from.mtu + 18
	n := most
	switch x % 8 {
	case 0:
	case 1, 2, 3:
		n = 14 + int(x>>8%uint64(most-13))
	default:
		n = min(14+int(x>>8%200), most)
	}
	return filling[x>>40%(1<<18):][:n-8]
}

// some sends frames.
func (f *flow) some(n int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.frames) < n {
		f.frames = append(f.frames, nil)
	}
	first := f.sent.Load()
	for i := range n {
		number := first + uint64(i)
		f.frames[i] = append(binary.LittleEndian.AppendUint64(f.frames[i][:0], number), f.content(number)...)
	}
	f.sent.Add(uint64(n)) // before they arrive
	return f.from.send(f.frames[:n])
}

// take checks a frame that came.
func (f *flow) take(p []byte) {
	if len(p) < 14 {
		f.fail("%s: a frame of %d bytes", f.name, len(p))
		return
	}
	number, next := binary.LittleEndian.Uint64(p), f.next.Load()
	switch {
	case number >= f.sent.Load():
		f.fail("%s: frame %#x, which was not sent", f.name, number)
		return
	case number < next:
		f.fail("%s: frame %d comes behind %d", f.name, number, next-1)
	case number > max(next, f.mark.Load()):
		f.fail("%s: frame %d comes, expected %d", f.name, number, next)
	case !bytes.Equal(p[8:], f.content(number)):
		f.fail("%s: frame %d is not what was sent", f.name, number)
	}
	f.next.Store(number + 1)
	f.got.Add(1)
	if f.pause != nil {
		f.pause()
	}
}

// arrived reports whether all that was sent has come.
func (f *flow) arrived() bool { return f.next.Load() == f.sent.Load() }

// duel is a link of ours, or a model, against a model.
type duel struct {
	testing.TB
	seats  [2]*seat
	flows  [2]*flow // by who sends
	failed atomic.Bool
	faults int // of the model, that a restart mended
	random *rand.Rand
	told   string // what happened last
}

func (d *duel) fail(format string, args ...any) {
	if !d.failed.Swap(true) {
		d.Errorf(format, args...)
	}
}

// newDuel starts both drivers. Their interfaces are as they come.
func newDuel(t testing.TB, loads [2]loader, open [2]func() *ivshmem.Device, mtus [2]int) *duel {
	t.Helper()
	d := &duel{TB: t, random: rand.New(rand.NewPCG(modelsForm.seed, 3))}
	for i := range d.seats {
		d.seats[i] = &seat{load: loads[i], open: open[i], mtu: mtus[i]}
		d.flows[i] = &flow{duel: d, from: d.seats[i], name: []string{"to the model", "from the model"}[i], random: rand.New(rand.NewPCG(modelsForm.seed, uint64(4+i)))}
	}
	for i, s := range d.seats {
		s.in = d.flows[1-i]
		s.dev = s.open()
		s.d = s.load(s.dev, s.mtu, s.in.take)
		t.Cleanup(func() {
			s.d.end(false)
			s.dev.Close()
		})
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d, after%s", modelsForm.seed, d.told)
		}
	})
	return d
}

// boardDuel is a duel on a board. The model is either peer.
func boardDuel(t testing.TB, model loader, output uint64, vectors int, w wiring, own, its int) *duel {
	b := newBoard(t, output, vectors)
	id := uint32(modelsForm.seed+output/4096) & 1
	return newDuel(t, [2]loader{loadOurs, model}, [2]func() *ivshmem.Device{
		func() *ivshmem.Device { return b.Device(t, id, w) },
		func() *ivshmem.Device { return b.Device(t, 1-id, apart) },
	}, [2]int{own, its})
}

// await waits for a condition for as long as frames arrive.
func (d *duel) await(what string, f func() bool) {
	d.Helper()
	moved := func() uint64 { return d.flows[0].got.Load() + d.flows[1].got.Load() }
	last, deadline := moved(), time.Now().Add(30*time.Second)
	for looks := 1; !f(); looks++ {
		if d.failed.Load() {
			d.FailNow()
		}
		if n := moved(); n != last {
			last, deadline = n, time.Now().Add(30*time.Second)
		}
		for _, s := range d.seats {
			if looks%100 > 0 {
				continue
			}
			if t := s.d.tally(); t.wrong != "" {
				d.Fatalf("%s: %T: %s", what, s.d, t.wrong)
			}
		}
		if time.Now().After(deadline) {
			for i, s := range d.seats {
				state, _ := s.dev.State(s.dev.ID())
				d.Logf("%T: State %d, carrier %v, %+v, %q; %s: %d of %d frames", s.d, state, s.d.carrier(), s.total(), s.d.fault(), d.flows[i].name, d.flows[i].next.Load(), d.flows[i].sent.Load())
			}
			d.Fatalf("never: %s", what)
		}
		time.Sleep(20 * time.Microsecond)
	}
}

// settle brings both up, and waits until they have carrier. A model that did what
// only a restart mends is restarted.
func (d *duel) settle() {
	d.Helper()
	for _, s := range d.seats {
		s.d.up()
	}
	d.await("carrier", func() bool {
		for _, s := range d.seats {
			if s.d.fault() == "" {
				s.faulty = 0
				continue
			}
			if s.faulty++; s.faulty > 20 {
				s.faulty = 0
				d.faults++
				s.restart(false)
				s.d.up()
			}
			return false
		}
		return d.seats[0].d.carrier() && d.seats[1].d.carrier()
	})
}

// both sends frames each way, and none may be missing.
func (d *duel) both(frames uint64) {
	d.Helper()
	for again := true; again; {
		var all sync.WaitGroup
		var violated atomic.Bool
		for _, f := range d.flows {
			end := f.sent.Load() + frames
			f.mark.Store(f.sent.Load())
			all.Go(func() {
				for f.sent.Load() < end && !d.failed.Load() {
					err := f.some(int(min(end-f.sent.Load(), 1+f.random.Uint64N(40))))
					var violation *vnet.ViolationError
					switch {
					case errors.As(err, &violation) && d.seats[1].total().early > 0:
						// Of a model that has been restarted for it.
						violated.Store(true)
						return
					case err != nil:
						d.fail("%s: %v", f.name, err)
					}
				}
			})
		}
		d.arrive(&all, violated.Load)
		if again = violated.Load(); again {
			d.forgive()
			d.settle()
		}
	}
}

// arrive waits until all who send are done, and what they sent has come, or is
// given up.
func (d *duel) arrive(senders *sync.WaitGroup, givenUp func() bool) {
	d.Helper()
	sent := make(chan struct{})
	go func() { senders.Wait(); close(sent) }()
	d.await("all are sent, and arrive", func() bool {
		select {
		case <-sent:
			return givenUp() || d.flows[0].arrived() && d.flows[1].arrived()
		default:
			return false
		}
	})
}

// forgive lets frames be lost from now on.
func (d *duel) forgive() {
	for _, f := range d.flows {
		f.mark.Store(math.MaxUint64)
	}
}

// pump sends frames each way for as long as it takes, whether they arrive or not.
func (d *duel) pump() (stop func()) {
	var over atomic.Bool
	var all sync.WaitGroup
	d.forgive()
	for _, f := range d.flows {
		all.Go(func() {
			for !over.Load() && !d.failed.Load() {
				if f.some(1+f.random.IntN(9)) != nil {
					time.Sleep(50 * time.Microsecond)
				}
			}
		})
	}
	return func() { over.Store(true); all.Wait() }
}

// judge fails the test for what must not have been, and reports the rest.
func (d *duel) judge(check, name string, output uint64, resets bool) {
	d.Helper()
	model := d.seats[1]
	d.await("all come back to the model", func() bool { return !model.d.carrier() || model.d.drained() })
	own, its := d.seats[0].total(), model.total()
	// A model that started early has returned frames that were not sent to it.
	if own.wrong != "" || its.wrong != "" || own.dropped > 0 || own.violations > its.early {
		d.Errorf("ours %+v\nthe model %+v", own, its)
	}
	if !resets && (own.resets > 0 || its.resets > 0) {
		d.Errorf("reset: ours %+v, the model %+v", own, its)
	}
	if !modelsForm.print {
		return
	}
	row, err := json.Marshal([]any{
		check, name, output, d.flows[0].got.Load(), d.flows[1].got.Load(), its.returned + its.received,
		own.resets, own.doorbells, its.doorbells, own.waits, own.sleeps, its.waits, its.stalls, uint64(d.faults),
	})
	if err != nil {
		d.Fatal(err)
	}
	fmt.Printf("\nrow %s\n", row)
}
