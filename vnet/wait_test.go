package vnet_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/vnet"
)

var wirings = map[string]wiring{"apart": apart, "merged": merged, "silent": silent, "vector 0": vector0, "one-shot": oneShots}

// transfer sends frames each way at once, by all kinds of calls, with pauses of
// all kinds, and checks that all arrive, in order.
func transfer(t *testing.T, l [2]*vnet.Link, frames int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for i := range l {
		from, to := l[i], l[1-i]
		most := from.MTU() + 18
		size := func(n int) int { return 14 + n*7919%(most-13) }
		all.Go(func() {
			random := rand.New(rand.NewPCG(3, uint64(i)))
			for n := 0; n < frames; {
				var err error
				switch batch := random.IntN(40); {
				case batch < 10:
					var p []byte
					if p, err = from.UnsafeReserve(ctx); err == nil {
						copy(p, frame(size(n), n))
						err = from.UnsafeCommit(size(n))
						n++
					}
					from.Flush()
				case batch < 15:
					err = from.Send(ctx, frame(size(n), n))
					n++
				case batch < 20:
					var slots [7][]byte
					var k int
					if k, err = from.UnsafeReserveAll(ctx, slots[:1+batch%7]); err == nil {
						lengths := make([]int, min(k, frames-n))
						for i := range lengths {
							lengths[i] = copy(slots[i], frame(size(n+i), n+i))
						}
						err = from.UnsafeCommitAll(lengths)
						n += len(lengths)
						from.Flush()
					}
				default:
					var list [][]byte
					for range min(batch, frames-n) {
						list = append(list, frame(size(n), n))
						n++
					}
					_, err = from.SendAll(ctx, list)
				}
				if err != nil {
					t.Errorf("send %d: %v: %+v", n, err, from.Stats())
					return
				}
				if random.IntN(200) == 0 {
					time.Sleep(time.Duration(random.IntN(300)) * time.Microsecond)
				}
			}
		})
		all.Go(func() {
			random := rand.New(rand.NewPCG(4, uint64(i)))
			p := make([]byte, vnet.MaxFrame)
			for n := 0; n < frames; {
				var got [][]byte
				var err error
				switch random.IntN(3) {
				case 0:
					var k int
					k, err = to.Receive(ctx, p)
					got = [][]byte{p[:k]}
				case 1:
					var f []byte
					if f, err = to.UnsafePeek(ctx); err == nil {
						got = [][]byte{bytes.Clone(f)}
						err = to.UnsafeRelease()
					}
				case 2:
					var k int
					var list [9][]byte
					if k, err = to.UnsafePeekAll(ctx, list[:]); err == nil {
						for _, f := range list[:k] {
							got = append(got, bytes.Clone(f))
						}
						k = 1 + random.IntN(k) // the rest once more
						got = got[:k]
						err = to.UnsafeReleaseAll(k)
					}
				}
				if err != nil {
					t.Errorf("receive %d: %v: %+v", n, err, to.Stats())
					return
				}
				for _, f := range got {
					if !bytes.Equal(f, frame(size(n), n)) {
						t.Errorf("frame %d: not what was sent", n)
						return
					}
					n++
				}
				if random.IntN(300) == 0 {
					time.Sleep(time.Duration(random.IntN(300)) * time.Microsecond)
				}
			}
		})
	}
	all.Wait()
}

// TestTransfer transfers with interrupts of all kinds at both ends.
func TestTransfer(t *testing.T) {
	for name, w := range wirings {
		for _, vectors := range []int{1, 2, 5} {
			t.Run(fmt.Sprint(name, "/", vectors), func(t *testing.T) {
				t.Parallel()
				frames := 3000
				if w == silent || w == vector0 && vectors > 1 {
					frames = 300
				}
				b := newBoard(t, 0x4000, vectors)
				l := [2]*vnet.Link{open(t, b.Device(t, 0, w), vnet.Config{MTU: 1000}), open(t, b.Device(t, 1, apart), vnet.Config{MTU: 3648})}
				carrier(t, true, l[:]...)
				transfer(t, l, frames)
				for i := range l {
					l[i].Down()
					carrier(t, false, l[:]...)
					l[i].Up()
					carrier(t, true, l[:]...)
				}
				transfer(t, l, 100)
			})
		}
	}
}

// TestTransferLink is TestTransfer over the service.
func TestTransferLink(t *testing.T) {
	for name, opts := range map[string][]ivshmem.Option{"thread": nil, "poller": {ivshmem.WithSleep(ivshmem.SleepPoller)}, "one-shot": {ivshmem.WithOneShot()}} {
		t.Run(name, func(t *testing.T) {
			l := pair(t, 0x8000, vnet.Config{}, opts...)
			transfer(t, l, 1500)
		})
	}
}

// TestNoWakeUpIsLost sends one frame at a time to who sleeps, and makes the
// sender sleep for each bit of room.
func TestNoWakeUpIsLost(t *testing.T) {
	peers := ivshmemtest.Peers(t, config(0x1000))
	// Room for three frames at most.
	l := [2]*vnet.Link{open(t, peers[0], vnet.Config{MTU: 576}), open(t, peers[1], vnet.Config{MTU: 576})}
	carrier(t, true, l[:]...)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for i := range l {
		all.Go(func() {
			p := make([]byte, vnet.MaxFrame)
			for n := range 2000 {
				if i == 0 {
					if err := l[0].Send(ctx, frame(590, n)); err != nil {
						t.Error(n, err)
						return
					}
				}
				if _, err := l[i].Receive(ctx, p); err != nil {
					t.Error(n, err)
					return
				}
				if i == 1 {
					if err := l[1].Send(ctx, frame(590, n)); err != nil {
						t.Error(n, err)
						return
					}
				}
			}
		})
	}
	all.Wait()
	transfer(t, l, 4000)
	if l[0].Stats().Sent.Waits+l[1].Stats().Sent.Waits == 0 {
		t.Error("nobody waited for room")
	}
}

// TestRudePeer is a peer that rings all the time, whatever it is asked for, and
// never asks for anything: what it sends arrives, and the sender that has to
// wait for it gets on.
func TestRudePeer(t *testing.T) {
	l, r := against(t, 0x4000, vnet.Config{MTU: 500})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	const frames = 2000
	var all sync.WaitGroup
	all.Go(func() {
		for i := range frames {
			if err := l.Send(ctx, frame(400, i)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	all.Go(func() {
		p := make([]byte, vnet.MaxFrame)
		for range frames {
			if _, err := l.Receive(ctx, p); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for sent, got := 0, 0; (sent < frames || got < frames) && ctx.Err() == nil; {
		if sent < frames && uint16(r.sent)-get16(r.other, r.used+2) < uint16(r.n) {
			r.describe(r.sent%r.n, r.header, 60, 0)
			r.publish(uint16(r.sent % r.n))
			r.ring()
			sent++
		}
		if get16(r.other, r.avail+2) != uint16(r.completed) {
			id, _ := r.receive()
			r.complete(uint32(id), 1)
			put16(r.own, r.availEvent_, uint16(r.completed))
			r.ring()
			got++
		}
	}
	all.Wait()
	if got := get16(r.other, r.used+2); got != frames {
		t.Errorf("%d frames came back", got)
	}
}

// TestStateTableIsLeftAlone receives and sleeps without a look at the State
// Table, which is a message in a guest.
func TestStateTableIsLeftAlone(t *testing.T) {
	b := newBoard(t, 0x4000, 2)
	r := newRaw(t, b, 1)
	d := b.Device(t, 0, apart)
	l := open(t, d, vnet.Config{})
	r.start()
	carrier(t, true, l)
	before := b.Looks(0)
	p := make([]byte, vnet.MaxFrame)
	for i := range 200 {
		got := make(chan error)
		go func() { _, err := l.Receive(t.Context(), p); got <- err }()
		if i%2 == 0 {
			until(t, "the receiver waits", func() bool { return get16(r.other, r.availEvent_) == uint16(r.sent) })
		}
		r.send(frame(60, i))
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	}
	if n := b.Looks(0) - before; n > 5 {
		t.Errorf("%d looks at the State Table for 200 frames", n)
	}
}

// TestDisarmed has the peer leave just when a doorbell has disarmed the device, in
// one-shot mode: that interrupt is lost, and the state is looked at all the
// same.
func TestDisarmed(t *testing.T) {
	b := newBoard(t, 0x4000, 2)
	r := newRaw(t, b, 1)
	l := open(t, b.Device(t, 0, oneShots), vnet.Config{})
	received := make(chan error)
	go func() {
		var err error
		for p := make([]byte, vnet.MaxFrame); err == nil; {
			_, err = l.Receive(context.Background(), p)
		}
		received <- err
	}()
	for range 20 {
		r.start()
		carrier(t, true, l)
		until(t, "the receiver waits", func() bool {
			return !l.Caretaking() && b.RingAndLeave(0, 1, 1)
		})
		carrier(t, false, l)
	}
	l.Close()
	if err := <-received; !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}

// TestCaretaker has the caretaker leave while somebody waits, so that the kernel
// wakes that one itself, and come back.
func TestCaretaker(t *testing.T) {
	l, r := against(t, 0x4000, vnet.Config{})
	p := make([]byte, vnet.MaxFrame)
	for i := range 3 {
		until(t, "the caretaker comes", l.Caretaking)
		got := make(chan error)
		go func() { _, err := l.Receive(t.Context(), p); got <- err }()
		until(t, "the caretaker leaves", func() bool { return !l.Caretaking() })
		r.send(frame(60, i))
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	}
}

// TestHostileStorm writes nonsense all over a section, as fast as it goes, with
// States and doorbells, while both directions are in use.
func TestHostileStorm(t *testing.T) {
	b := newBoard(t, 0x1000, 2)
	r := newRaw(t, b, 1)
	l := open(t, b.Device(t, 0, apart), vnet.Config{MTU: 200})
	r.start()
	var users sync.WaitGroup
	use := func(f func() error) {
		users.Go(func() {
			for {
				err := f()
				var v *vnet.ViolationError
				switch {
				case err == nil, errors.As(err, &v), errors.Is(err, vnet.ErrReset):
				case errors.Is(err, vnet.ErrNoCarrier):
					if err := l.WaitCarrier(context.Background(), true); err != nil {
						return
					}
				case errors.Is(err, os.ErrClosed):
					return
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	use(func() error { return l.Send(context.Background(), frame(150, 1)) })
	p := make([]byte, vnet.MaxFrame)
	use(func() error {
		f, err := l.UnsafePeek(context.Background())
		if err != nil {
			return err
		}
		copy(p, f)
		return l.UnsafeRelease()
	})
	random := rand.New(rand.NewPCG(5, 6))
	for range 60000 {
		switch random.IntN(8) {
		case 0:
			put16(r.own, 2*random.Uint64N(0x700/2), uint16(random.Uint32()>>random.IntN(32)))
		case 1:
			put16(r.own, r.avail+2, get16(r.other, r.used+2)+uint16(random.IntN(34)))
		case 2:
			put16(r.own, r.used+2, get16(r.other, r.avail+2)-uint16(random.IntN(3)))
		case 3:
			r.describe(random.Uint64N(32), 0x700+random.Uint64N(2400), random.Uint32N(300), uint16(random.IntN(20)/19))
		case 4:
			i := random.Uint64N(32)
			put32(r.own, r.used+4+8*i, uint32(i))
			put32(r.own, r.used+8+8*i, 1)
		case 5:
			put16(r.own, r.avail+4+2*random.Uint64N(32), uint16(random.IntN(33)))
		case 6:
			r.setState(random.Uint32N(5))
		case 7:
			r.dev.Ring(0, random.IntN(2))
		}
	}
	r.start()
	carrier(t, true, l)
	l.Close()
	users.Wait()
	if s := l.Stats(); s.Resets.Peer == 0 {
		t.Errorf("nothing happened: %+v", s)
	}
}
