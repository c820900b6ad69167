package vnet_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
)

// The tests here have a link of ours on one side, and on the other a model of a
// driver that others wrote. The models are made from the protocol page, and
// share nothing with this package.

// modelsForm is how much is done: as a test, or, by the campaign, for longer.
var modelsForm = struct {
	duration time.Duration // of what takes time
	frames   uint64        // each way, for each size
	common   uint64        // for sizes that people use
	events   int           // length of the longest of all sequences of events
	random   int           // random sequences
	seed     uint64
	sabotage bool
	print    bool
}{duration: 250 * time.Millisecond, frames: 800, common: 1600, events: 2, random: 15, seed: rand.Uint64()}

// The campaign says: duration, frames, those for common sizes, events, random,
// seed, sabotage.
func init() {
	form := os.Getenv("IVSHMEM_VNET_MODELS")
	if form == "" {
		return
	}
	f := &modelsForm
	var d string
	_, err := fmt.Sscan(form, &d, &f.frames, &f.common, &f.events, &f.random, &f.seed, &f.sabotage)
	if err == nil {
		f.duration, err = time.ParseDuration(d)
	}
	if err != nil {
		panic(fmt.Sprintf("IVSHMEM_VNET_MODELS=%q: %v", form, err))
	}
	f.print = true
}

// models are what is on the other side.
var models = []struct {
	name    string
	load    loader
	vectors int
}{
	{"Linux", loadLinux, 2},
	{"Linux, INTx", loadLinux, 1},
	{"Zephyr", loadZephyr, 2},
	{"Zephyr, one vector", loadZephyr, 1},
}

// sizes are those of the page's table.
var sizes = []struct {
	output, n, H uint64
	common       bool
}{
	{0x1000, 32, 0x700, false},
	{0x2000, 32, 0x700, false},
	{0x4000, 64, 0x700, false},
	{0x8000, 128, 0xD80, false},
	{0x10000, 256, 0x1A80, false},
	{0x20000, 512, 0x3480, false},
	{0x40000, 1024, 0x6880, false},
	{0x7F000, 2048, 0xD080, true},
	{0x100000, 4096, 0x1A080, true},
}

// TestModelsTransfer sends frames both ways at once, for all sizes of sections.
func TestModelsTransfer(t *testing.T) {
	for _, s := range sizes {
		if n, H := queueGeometry(s.output); n != s.n || H != s.H {
			t.Errorf("%#x: the models have %d entries and headers of %#x, want %d and %#x", s.output, n, H, s.n, s.H)
		}
		for _, m := range models {
			t.Run(fmt.Sprintf("%s/%#x", m.name, s.output), func(t *testing.T) {
				t.Parallel()
				frames := modelsForm.frames
				if s.common && m.vectors > 1 {
					frames = modelsForm.common
				}
				mtu := min(1500, int(s.output-s.H)/8)
				d := boardDuel(t, m.load, s.output, m.vectors, apart, min(1500, int(s.output-s.H)/4), mtu)
				d.settle()
				d.both(frames)
				d.judge("transfer", m.name, s.output, false)
			})
		}
	}
}

// TestModelsMTU has the link's MTU at its limits, and the model's from its least to
// what Linux can do without a stall.
func TestModelsMTU(t *testing.T) {
	for _, m := range models[:3] {
		for _, output := range []uint64{0x1000, 0x8000, 0x100000} {
			t.Run(fmt.Sprintf("%s/%#x", m.name, output), func(t *testing.T) {
				t.Parallel()
				_, H := queueGeometry(output)
				D := int(output - H)
				for _, own := range []int{68, min(16384, D/16), min(65535, D/4)} {
					for _, its := range []int{68, min(16384, D/16), min(65535, D/8)} {
						d := boardDuel(t, m.load, output, m.vectors, apart, own, its)
						d.settle()
						d.both(modelsForm.frames / 8)
						d.judge("every MTU", m.name, output, false)
					}
				}
			})
		}
	}
}

// events are what can happen to an end.
var events = []struct {
	name string
	do   func(*seat)
}{
	{"up", func(s *seat) { s.d.up() }},
	{"down", func(s *seat) { s.d.down() }},
	{"restart", func(s *seat) { s.restart(false) }},
	{"kill", func(s *seat) { s.restart(true) }},
}

// happen has things happen one after the other, with more or less time between
// them.
func (d *duel) happen(sequence []int) {
	d.told = ""
	pace := d.random.IntN(4)
	for _, e := range sequence {
		s, what := d.seats[e/len(events)], events[e%len(events)]
		d.told += fmt.Sprintf(" %d %s", e/len(events), what.name)
		what.do(s)
		switch {
		case pace == 1:
			runtime.Gosched()
		case pace > 1:
			time.Sleep(time.Duration(d.random.IntN(100*pace*pace)) * time.Microsecond)
		}
	}
}

// TestModelsEvents has all that can happen to either end happen in every order,
// and then in random ones, with frames under way. After each of them both must
// come to carrier, and frames must arrive.
func TestModelsEvents(t *testing.T) {
	for _, m := range models {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			d := boardDuel(t, m.load, 0x4000, m.vectors, apart, 1000, 900)
			d.settle()
			n := 2 * len(events)
			for length := 1; length <= modelsForm.events; length++ {
				all := 1
				for range length {
					all *= n
				}
				for i := range all {
					var sequence []int
					for range length {
						sequence = append(sequence, i%n)
						i /= n
					}
					d.forgive()
					d.happen(sequence)
					d.settle()
					d.both(20)
				}
			}
			d.judge("all sequences", m.name, 0x4000, true)
			for range modelsForm.random {
				d.storm()
			}
			d.judge("events in traffic", m.name, 0x4000, true)
		})
	}
}

// storm is a random sequence while frames are under way.
func (d *duel) storm() {
	d.Helper()
	stop := d.pump()
	var sequence []int
	for range 1 + d.random.IntN(20) {
		sequence = append(sequence, d.random.IntN(2*len(events)))
	}
	d.happen(sequence)
	d.settle()
	stop()
	d.both(20)
}

// serviceDuel is a duel over the service.
func serviceDuel(t *testing.T, model loader, output uint64, vectors, own, its int, opts ...ivshmem.Option) *duel {
	t.Helper()
	c := config(output)
	c.Vectors = uint16(vectors)
	path := ivshmemtest.Serve(t, c)
	open := func(opts ...ivshmem.Option) func() *ivshmem.Device {
		return func() (dev *ivshmem.Device) {
			until(t, "a free peer ID", func() bool {
				var err error
				if dev, err = ivshmem.Open(path, opts...); err != nil && !errors.Is(err, ivshmem.ErrBusy) {
					t.Fatal(err)
				}
				return err == nil
			})
			return dev
		}
	}
	return newDuel(t, [2]loader{loadOurs, model}, [2]func() *ivshmem.Device{open(opts...), open()}, [2]int{own, its})
}

// TestModelsService is the same over the service.
func TestModelsService(t *testing.T) {
	for i, m := range models {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			var opts []ivshmem.Option
			if i%2 == 0 {
				opts = append(opts, ivshmem.WithSleep(ivshmem.SleepPoller))
			}
			d := serviceDuel(t, m.load, 0x10000, m.vectors, 3672, 3672, opts...)
			d.settle()
			d.both(modelsForm.frames)
			d.judge("service", m.name, 0x10000, false)
			for range modelsForm.random / 3 {
				d.storm()
			}
			d.judge("service, events", m.name, 0x10000, true)
		})
	}
}

// TestModelsSoak has each side stop now and then, so that the other waits: for
// frames, or for room. Where frames go one way only, none comes by chance that
// makes up for a doorbell that is missing.
func TestModelsSoak(t *testing.T) {
	for i, m := range models {
		for j, c := range []struct {
			name     string
			output   uint64
			to, from bool
		}{
			{"soak", 0x4000, true, true},
			{"soak", 0x7F000, true, true},
			{"soak, to the model", 0x1000, true, false},
			{"soak, from the model", 0x1000, false, true},
		} {
			t.Run(fmt.Sprintf("%s/%s/%#x", m.name, c.name, c.output), func(t *testing.T) {
				t.Parallel()
				w := []wiring{apart, merged, oneShots}[(i+j)%3]
				_, H := queueGeometry(c.output)
				mtu := min(1500, int(c.output-H)/8)
				d := boardDuel(t, m.load, c.output, m.vectors, w, mtu, mtu)
				d.settle()
				var all sync.WaitGroup
				end := time.Now().Add(modelsForm.duration)
				for k, f := range d.flows {
					if !c.to && k == 0 || !c.from && k == 1 {
						continue
					}
					random := rand.New(rand.NewPCG(modelsForm.seed, uint64(10+k)))
					f.pause = func() {
						if random.IntN(1000) == 0 {
							time.Sleep(time.Duration(random.IntN(500)) * time.Microsecond)
						}
					}
					all.Go(func() {
						for time.Now().Before(end) && !d.failed.Load() {
							for range f.random.IntN(60) {
								if err := f.some(1 + f.random.IntN(40)); err != nil {
									d.fail("%s: %v", f.name, err)
									return
								}
							}
							switch f.random.IntN(30) {
							case 0:
								time.Sleep(time.Duration(f.random.IntN(20000)) * time.Microsecond)
							case 1, 2, 3, 4, 5, 6, 7, 8, 9, 10:
								time.Sleep(time.Duration(f.random.IntN(300)) * time.Microsecond)
							}
						}
					})
				}
				d.arrive(&all, func() bool { return false })
				d.judge(c.name, m.name, c.output, false)
			})
		}
	}
}

// TestModelsAmongThemselves has the models exchange frames: what they agree on is
// not ours.
func TestModelsAmongThemselves(t *testing.T) {
	for _, pair := range [][2]int{{0, 0}, {0, 2}, {2, 0}, {2, 2}, {1, 3}} {
		a, b := models[pair[0]], models[pair[1]]
		t.Run(a.name+"/"+b.name, func(t *testing.T) {
			t.Parallel()
			board := newBoard(t, 0x4000, a.vectors)
			d := newDuel(t, [2]loader{a.load, b.load}, [2]func() *ivshmem.Device{
				func() *ivshmem.Device { return board.Device(t, 0, apart) },
				func() *ivshmem.Device { return board.Device(t, 1, apart) },
			}, [2]int{1500, 1500})
			d.settle()
			d.both(modelsForm.frames)
			d.judge("among themselves", a.name+" and "+b.name, 0x4000, false)
		})
	}
}

// TestModelStalls brings the model of Linux to where the page says that Linux
// stalls: with an MTU near its limit, and a queue that is empty in its middle. Ours
// does not (TestModelsMTU).
func TestModelStalls(t *testing.T) {
	d := boardDuel(t, loadLinux, 0x1000, 2, apart, 576, 576)
	d.settle()
	m := d.seats[1].d.(*linuxDriver)
	// 14 + 18 bytes are in a slot of 64. Behind 17 of them there are 1088 of 2304
	// bytes before the head, and 1216 after it: less than two slots of 640.
	const slots = 17
	number := uint64(0)
	for range slots {
		f := d.flows[1]
		for len(f.content(number)) != 14-8 && len(f.content(number))+8 > 64-18 {
			number++
		}
		f.sent.Store(number)
		f.mark.Store(number)
		if err := f.some(1); err != nil {
			t.Fatal(err)
		}
		d.await("it comes back", m.drained)
		number++
	}
	m.poll()
	m.tx.Lock()
	stalled := m.stopped && !m.room() && m.head == m.tail
	m.tx.Unlock()
	if !stalled {
		t.Errorf("%d frames, and the queue goes on: head %d, tail %d", slots, m.head, m.tail)
	}
	d.forgive()
	d.seats[0].d.down()
	d.settle()
	if !m.carrier() || m.stopped {
		t.Error("stalled after a reset")
	}
}
