package console_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// A driver and a device that know nothing of the package under test: bytes from
// the protocol page over virtqueues.

// raw is bytes in hexadecimal, spaced as one likes.
func raw(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// rawDriver is a driver as Linux's: page-size buffers fill each receive queue,
// and after each control message it waits until the device has returned it.
type rawDriver struct {
	testing.TB
	ctx    context.Context
	d      *virtio.Driver
	queues []*virtio.DriverQueue
	free   map[*virtio.DriverQueue]*virtio.Buffer
}

func newRawDriver(t testing.TB, dev *ivshmem.Device, features virtio.Features, queues int) *rawDriver {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	d, err := virtio.Open(ctx, dev, virtio.DriverConfig{ID: 3, Features: features})
	if err != nil {
		t.Fatal(err)
	}
	r := &rawDriver{TB: t, ctx: ctx, d: d, free: map[*virtio.DriverQueue]*virtio.Buffer{}}
	t.Cleanup(func() { d.Close() })
	for i := range queues {
		q, err := d.SetUpQueue(ctx, i, 1<<15)
		r.ok(err)
		r.queues = append(r.queues, q)
	}
	r.ok(d.Start(ctx))
	return r
}

func (r *rawDriver) ok(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// fill fills a receive queue.
func (r *rawDriver) fill(queue int) {
	r.Helper()
	for {
		b, err := r.d.Alloc(4096)
		r.ok(err)
		if err := r.queues[queue].Add(b, virtio.In(0, 4096)); err != nil {
			if !errors.Is(err, virtio.ErrQueueFull) {
				r.Fatal(err)
			}
			b.Free()
			r.ok(r.queues[queue].Kick())
			return
		}
	}
}

// send sends a buffer, and waits until it comes back.
func (r *rawDriver) send(queue int, s string) { r.sendBytes(queue, raw(r, s)) }

func (r *rawDriver) sendBytes(queue int, p []byte) {
	r.Helper()
	b, err := r.d.Alloc(len(p))
	r.ok(err)
	_, err = b.WriteAt(p, 0)
	r.ok(err)
	r.ok(r.queues[queue].Add(b, virtio.Out(0, len(p))))
	r.ok(r.queues[queue].Kick())
	_, n, err := r.queues[queue].Next(r.ctx)
	r.ok(err)
	if n != 0 {
		r.Errorf("used length %d of a transmit queue", n)
	}
	b.Free()
}

// receive is the next buffer of a receive queue, which gets it back.
func (r *rawDriver) receive(queue int) []byte {
	r.Helper()
	b, n, err := r.queues[queue].Next(r.ctx)
	r.ok(err)
	p := make([]byte, n)
	_, err = b.ReadAt(p, 0)
	r.ok(err)
	r.ok(r.queues[queue].Add(b, virtio.In(0, 4096)))
	r.ok(r.queues[queue].Kick())
	return p
}

func (r *rawDriver) expect(queue int, want ...string) {
	r.Helper()
	for _, w := range want {
		if got := r.receive(queue); !bytes.Equal(got, raw(r, w)) {
			r.Fatalf("queue %d: got %x, want %s", queue, got, w)
		}
	}
}

// nothing checks that nothing has come.
func (r *rawDriver) nothing(queue int) {
	r.Helper()
	b, n, err := r.queues[queue].TryNext()
	r.ok(err)
	if b != nil {
		p := make([]byte, n)
		b.ReadAt(p, 0)
		r.Fatalf("queue %d: got %x, want nothing", queue, p)
	}
}

// rawDevice is a device with queues of 8 entries.
type rawDevice struct {
	testing.TB
	ctx     context.Context
	b       *virtio.BackEnd
	session *virtio.Session
	started chan *virtio.Session
}

func newRawDevice(t testing.TB, dev *ivshmem.Device, features virtio.Features, queues int, config string) *rawDevice {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	r := &rawDevice{TB: t, ctx: ctx, started: make(chan *virtio.Session, 1)}
	v := virtio.Device{ID: 3, Features: features, Config: raw(t, config), Run: func(ctx context.Context, s *virtio.Session) error {
		r.started <- s
		<-ctx.Done()
		return nil
	}}
	for range queues {
		v.Queues = append(v.Queues, 8)
	}
	var err error
	if r.b, err = virtio.NewBackEnd(dev, v); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- r.b.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return r
}

// open opens our driver.
func (r *rawDevice) open(dev *ivshmem.Device, c console.Config) *console.Driver {
	r.Helper()
	d, err := console.Open(r.ctx, dev, c)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { d.Close() })
	r.session = <-r.started
	return d
}

func (r *rawDevice) next(queue int) *virtio.Chain {
	r.Helper()
	c, err := r.session.Queue(queue).Next(r.ctx)
	if err != nil {
		r.Fatal(err)
	}
	return c
}

func (r *rawDevice) send(queue int, messages ...string) {
	r.Helper()
	for _, s := range messages {
		r.sendBytes(queue, raw(r, s))
	}
}

func (r *rawDevice) sendBytes(queue int, p []byte) {
	r.Helper()
	c := r.next(queue)
	n, err := c.Write(p)
	if err == nil {
		err = r.session.Queue(queue).Push(c, n)
	}
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rawDevice) receive(queue int) []byte {
	r.Helper()
	c := r.next(queue)
	p := make([]byte, c.Readable())
	_, err := c.ReadAt(p, 0)
	if err == nil || len(p) > 0 {
		err = r.session.Queue(queue).Push(c, 0)
	}
	if err != nil {
		r.Fatal(err)
	}
	return p
}

func (r *rawDevice) expect(queue int, want ...string) {
	r.Helper()
	for _, w := range want {
		if got := r.receive(queue); !bytes.Equal(got, raw(r, w)) {
			r.Fatalf("queue %d: got %x, want %s", queue, got, w)
		}
	}
}

// dropped waits until so many messages were dropped, the last of them for a
// field of this name.
func dropped(t testing.TB, stats func() (console.Stats, error), n uint64, field string) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Microsecond) {
		var s console.Stats
		if s, err = stats(); s.Dropped >= n {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d messages were dropped, want %d", s.Dropped, n)
		}
	}
	var m *console.MessageError
	if !errors.As(err, &m) || m.Field != field {
		t.Errorf("got %v, want one for %q", err, field)
	}
}
