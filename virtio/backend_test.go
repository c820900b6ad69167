package virtio_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/entropy"
)

// protocol is the protocol type of a front-end of the entropy device, whose
// number serves for all tests.
const protocol = 0x8004

// served is a back-end that is being served.
type served struct {
	*virtio.BackEnd
	stop func() error // ends it, and returns what Serve did
}

// serve serves a device until the test ends, or before.
func serve(t testing.TB, dev *ivshmem.Device, d virtio.Device) served {
	t.Helper()
	b, err := virtio.NewBackEnd(dev, d)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Serve(ctx) }()
	stop := func() error {
		cancel()
		err := <-ended
		ended <- err
		return err
	}
	t.Cleanup(func() { stop() })
	return served{b, stop}
}

// echo is a device whose queues answer with what they are sent, backwards.
func echo(queues ...int) virtio.Device {
	return virtio.Device{ID: entropy.ID, Queues: queues, Run: func(ctx context.Context, s *virtio.Session) error {
		ended := make(chan error)
		for i := range s.Queues() {
			go func() { ended <- echoQueue(ctx, s.Queue(i)) }()
		}
		var err error
		for range s.Queues() {
			err = <-ended
		}
		return err
	}}
}

func echoQueue(ctx context.Context, q *virtio.Queue) error {
	p := make([]byte, 1<<16)
	for {
		c, err := q.Next(ctx)
		if err != nil {
			return err
		}
		n, err := c.Read(p[:min(len(p), c.Readable())])
		if err != nil {
			return err
		}
		slices.Reverse(p[:n])
		if n, err = c.Write(p[:min(n, c.Writable())]); err != nil {
			return err
		}
		if err := q.Push(c, n); err != nil {
			return err
		}
	}
}

// exchange sends a request in pieces, and checks the answer.
func exchange(t testing.TB, q *linuxQueue, number int) error {
	t.Helper()
	out := fmt.Appendf(nil, "request %d of queue %d", number, q.index)
	r, err := q.request([][]byte{out[:5], out[5:]}, len(out)-3, 1, 2)
	if err != nil {
		return err
	}
	want := bytes.Clone(out)
	slices.Reverse(want)
	if r.length != uint32(len(out)) || !bytes.Equal(r.in, want) {
		return fmt.Errorf("answer %q of %d bytes, want %q", r.in, r.length, want)
	}
	return nil
}

// again probes until it succeeds, as a user would bind again: the back-end may
// not be ready yet, or about to notice that the last driver has left. A
// back-end that is dead does not come back.
func (l *linux) again(queues int) error {
	var err error
	until(l, "the back-end is ready", func() bool {
		if err = l.probe(queues); err == nil || !l.alive() {
			return true
		}
		if !errors.Is(err, errNoDevice) && !errors.Is(err, errBackEnd) {
			return true
		}
		l.remove()
		return false
	})
	return err
}

// Linux's driver works with all vectors that a link may have, all features that
// it may take and all ways that interrupts reach the back-end; it comes and
// goes, and is not rung too early, nor on a vector that there is not.
func TestLinux(t *testing.T) {
	t.Parallel()
	const queues = 3
	takes := map[string]uint64{"plain": 0, "indirect": 1 << 28, "event index": 1 << 29, "both": 3 << 28}
	for _, vectors := range []int{1, 2, 3, 4, 16} {
		for name, features := range takes {
			for _, w := range []wiring{apart, merged, oneShots, silent, vector0} {
				t.Run(fmt.Sprintf("%d vectors, %s, wiring %d", vectors, name, w), func(t *testing.T) {
					t.Parallel()
					b := newBoard(t, protocol, 0xf000, vectors)
					s := serve(t, b.Device(t, 0, w), echo(8, 8, 8))
					l := newLinux(t, b)
					l.want = func() uint64 { return 1<<32 | 1<<33 | 1<<36 | features }
					for round := range 2 {
						if err := l.again(queues); err != nil {
							t.Fatal(err)
						}
						for i := range 20 {
							if err := exchange(t, l.queues[i%queues], i); err != nil {
								t.Fatal(err)
							}
						}
						for _, q := range l.queues {
							if int(q.deviceVector) >= vectors || w == vector0 && q.deviceVector != 0 {
								t.Errorf("queue %d is to be rung on vector %d", q.index, q.deviceVector)
							}
						}
						l.remove()
						if n := s.Stats(); n.Violations != 0 || n.Sessions != uint64(round)+1 {
							t.Fatalf("%+v", n)
						}
					}
				})
			}
		}
	}
}

// Either side dies at any step of the other's life, and both work again.
func TestDeaths(t *testing.T) {
	t.Parallel()
	rounds(t, 100)
}

func rounds(t *testing.T, n int) {
	b := newBoard(t, protocol, 0xf000, 2)
	random := rand.New(rand.NewPCG(1, 2))
	dev := b.Device(t, 0, apart)
	back := serve(t, dev, echo(8, 8))
	restart := func() {
		back.stop()
		dev.Close()
		dev = b.Device(t, 0, apart)
		back = serve(t, dev, echo(8, 8))
	}
	var worked, deaths, backDeaths int
	for range n {
		l := newLinux(t, b)
		death := random.IntN(250)
		guest := random.IntN(2) == 0
		l.step = func() {
			if death--; death != 0 {
				return
			}
			if guest {
				deaths++
				b.Kill(1)
				panic(killed{})
			}
			backDeaths++
			b.Kill(0)
		}
		err := l.life(&worked)
		switch {
		case !guest && death <= 0:
			restart()
		case err != nil:
			t.Fatal(err)
		}
	}
	l := newLinux(t, b)
	if err := l.life(&worked); err != nil {
		t.Fatal(err)
	}
	if s := back.Stats(); s.Violations != 0 {
		t.Errorf("%+v", s)
	}
	if worked < n || deaths < n/10 || backDeaths < n/10 {
		t.Errorf("%d requests, %d guests and %d back-ends died: too few to show anything", worked, deaths, backDeaths)
	}
}

// life probes, works and removes, unless somebody dies.
func (l *linux) life(worked *int) (err error) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(killed); !ok {
				panic(r)
			}
			l.halt()
			err = nil
		}
	}()
	if err := l.again(2); err != nil {
		l.remove()
		return err
	}
	for i := range 10 {
		if err = exchange(l, l.queues[i%2], i); err != nil {
			break
		}
		*worked++
	}
	l.remove()
	return err
}

// keepAll takes buffers and does not return them.
func keepAll(taken chan *virtio.Chain) func(context.Context, *virtio.Session) error {
	return func(ctx context.Context, s *virtio.Session) error {
		for {
			c, err := s.Queue(0).Next(ctx)
			if err != nil {
				return err
			}
			taken <- c
		}
	}
}

// walkIndexes takes and returns as many buffers as it is told at a time, without
// waiting for doorbells.
func walkIndexes(next chan uint16, result chan error) func(context.Context, *virtio.Session) error {
	return func(ctx context.Context, s *virtio.Session) error {
		for {
			select {
			case n := <-next:
				var err error
				for range n {
					var c *virtio.Chain
					if c, err = s.Queue(0).TryNext(); err != nil {
						break
					}
					if err = s.Queue(0).Push(c, 0); err != nil {
						break
					}
				}
				result <- err
				if err != nil {
					return err
				}
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// Register writes are answered while the device waits for buffers, by whoever
// does, and while it does not.
func TestGuard(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, hostileSection, 2)
	hold := make(chan struct{})
	d := echo(8)
	d.Run = func(ctx context.Context, s *virtio.Session) error {
		q := s.Queue(0)
		for {
			c, err := q.Next(ctx)
			if err != nil {
				return err
			}
			<-hold
			if err := q.Push(c, 0); err != nil {
				return err
			}
		}
	}
	s := serve(t, b.Device(t, 0, apart), d)
	until(t, "Serve waits", s.Guarding)
	l := hostile(t, b, modern)
	l.describe(hostileDesc, 0, 0x1800, 4, 0, 0)
	for i := range uint16(20) {
		until(t, "Serve steps back", func() bool { return !s.Guarding() })
		l.put(0x1c, 4, 0)
		put16(l.m, hostileAvail+2, i+1)
		l.ring(1)
		until(t, "Serve waits again", s.Guarding)
		l.put(0x1c, 4, 0)
		hold <- struct{}{}
		until(t, "it is used", func() bool { return get16(l.m, hostileUsed+2) == i+1 })
	}
	close(hold)
}

// A storm of register writes and doorbells keeps nobody from being served, nor
// Serve from ending.
func TestStorm(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, 0xf000, 2)
	s := serve(t, b.Device(t, 0, apart), echo(8))
	l := newLinux(t, b)
	if err := l.again(1); err != nil {
		t.Fatal(err)
	}
	if err := l.idle(); err != nil { // DRIVER_OK must not be written over
		t.Fatal(err)
	}
	var group sync.WaitGroup
	var calm atomic.Bool
	group.Go(func() {
		for !calm.Load() {
			put32(l.m, 8, 0x18)
			l.ring(0)
		}
	})
	for i := range 50 {
		if err := exchange(t, l.queues[0], i); err != nil {
			t.Error(err)
			break
		}
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	calm.Store(true)
	group.Wait()
	l.remove()
}

// A driver that changes everything under the device's eyes gets what it asks
// for, or a reset, and nothing else.
func TestDoubleFetch(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, hostileSection, 2)
	s := serve(t, b.Device(t, 0, apart), echo(8))
	l := hostile(t, b, modern|1<<28)
	var group sync.WaitGroup
	var calm atomic.Bool
	group.Go(func() { // descriptors that are good now and wrong next
		good, bad := make([]byte, 16), make([]byte, 16)
		putDescriptor(good, 0x1800, 8, 0, 0)
		putDescriptor(bad, 0, 1<<31, 3, 9)
		for i := uint64(0); !calm.Load(); i++ {
			for word := uint64(0); word < 16; word += 4 {
				v := binary.LittleEndian.Uint32(good[word:])
				if (i+word/4)%3 == 0 {
					v = binary.LittleEndian.Uint32(bad[word:])
				}
				put32(l.m, hostileDesc+word, v)
			}
		}
	})
	index := uint16(0)
	for range 60 {
		if get32(l.m, 0x44) != 0xf {
			l.play(modern | 1<<28)
			index = 0
			continue
		}
		index++
		put16(l.m, hostileAvail+2, index)
		l.ring(1)
		until(t, "it is used, or a violation", func() bool { return get16(l.m, hostileUsed+2) == index || get32(l.m, 0x44) != 0xf })
	}
	calm.Store(true)
	group.Wait()
	if !l.quiet() || s.Stats().Violations == 0 {
		t.Errorf("%+v", s.Stats())
	}
	l.works(modern)
}
