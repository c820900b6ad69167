package console

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem/virtio"
)

// sender is a queue towards the other side. It is for one goroutine.
type sender interface {
	// trySpace is the size of the next buffer, 0 if there is none.
	trySpace() (int, error)
	// space waits for a buffer.
	space(context.Context) (int, error)
	// send sends the buffer that was found, with these bytes.
	send(...[]byte) error
}

// receiver is a queue from the other side. It is for one goroutine.
type receiver interface {
	// take waits for a buffer; tryTake returns nil where there is none.
	take(context.Context) (piece, error)
	tryTake() (piece, error)
}

// piece is a buffer that has arrived.
type piece interface {
	// Read reads the next bytes, and fails with io.EOF behind the last one.
	io.Reader
	// done gives the buffer back.
	done() error
}

// deviceSender sends in buffers that the driver gave to a receive queue.
type deviceSender struct {
	q *virtio.Queue
	c *virtio.Chain
	// least is the smallest buffer that is used. Smaller ones go back empty.
	least int
}

func (s *deviceSender) trySpace() (int, error) {
	for s.c == nil {
		c, err := s.q.TryNext()
		if c == nil || err != nil {
			return 0, err
		}
		if err := s.keep(c); err != nil {
			return 0, err
		}
	}
	return s.c.Writable(), nil
}

func (s *deviceSender) space(ctx context.Context) (int, error) {
	for s.c == nil {
		c, err := s.q.Next(ctx)
		if err != nil {
			return 0, err
		}
		if err := s.keep(c); err != nil {
			return 0, err
		}
	}
	return s.c.Writable(), nil
}

func (s *deviceSender) keep(c *virtio.Chain) error {
	if c.Writable() < s.least {
		return s.q.Push(c, 0)
	}
	s.c = c
	return nil
}

func (s *deviceSender) send(parts ...[]byte) error {
	c, n := s.c, 0
	s.c = nil
	for _, b := range parts {
		m, err := c.Write(b[:min(len(b), c.Writable()-n)])
		n += m
		if err != nil {
			return err
		}
	}
	return s.q.Push(c, n)
}

// deviceReceiver receives the buffers of a transmit queue.
type deviceReceiver struct{ q *virtio.Queue }

type devicePiece struct {
	*virtio.Chain
	q *virtio.Queue
}

func (p devicePiece) done() error { return p.q.Push(p.Chain, 0) }

func (r deviceReceiver) take(ctx context.Context) (piece, error) {
	c, err := r.q.Next(ctx)
	if err != nil {
		return nil, err
	}
	return devicePiece{c, r.q}, nil
}

func (r deviceReceiver) tryTake() (piece, error) {
	c, err := r.q.TryNext()
	if c == nil || err != nil {
		return nil, err
	}
	return devicePiece{c, r.q}, nil
}

// driverSender sends in buffers of its own.
type driverSender struct {
	q    *virtio.DriverQueue
	free []*virtio.Buffer
	// polls says that the device need not interrupt for what it has sent.
	polls bool
}

// newDriverSender makes a buffer for each entry of the queue, but at least one.
func newDriverSender(d *virtio.Driver, q *virtio.DriverQueue, size int) (*driverSender, error) {
	q.Delay()
	s := &driverSender{q: q, polls: !d.Features().Has(virtio.EventIdx)}
	var err error
	if s.free, err = buffers(d, q.Size(), size); len(s.free) == 0 {
		return nil, err
	}
	return s, nil
}

// buffers makes so many buffers, or fewer, and says why.
func buffers(d *virtio.Driver, n, size int) (all []*virtio.Buffer, err error) {
	for range n {
		b, err := d.Alloc(size)
		if err != nil {
			return all, err
		}
		all = append(all, b)
	}
	return all, nil
}

func (s *driverSender) trySpace() (int, error) {
	if len(s.free) == 0 {
		b, _, err := s.q.TryNext()
		if b == nil || err != nil {
			return 0, err
		}
		s.free = append(s.free, b)
	}
	return s.free[0].Size(), nil
}

// Back-ends that know no event index may not interrupt for what a console said:
// Linux's driver polls for it.
const firstPoll, lastPoll = time.Millisecond, 16 * time.Millisecond

func (s *driverSender) space(ctx context.Context) (int, error) {
	for poll := firstPoll; len(s.free) == 0; poll = min(2*poll, lastPoll) {
		wait, cancel := ctx, context.CancelFunc(func() {})
		if s.polls {
			wait, cancel = context.WithTimeout(ctx, poll)
		}
		b, _, err := s.q.Next(wait)
		cancel()
		switch {
		case err == nil:
			s.free = append(s.free, b)
		case !s.polls || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded):
			return 0, err
		}
	}
	return s.free[0].Size(), nil
}

// busy may be called by anybody.
func (s *driverSender) busy() bool { return s.q.Outstanding() > 0 }

func (s *driverSender) send(parts ...[]byte) error {
	b, n := s.free[0], 0
	for _, p := range parts {
		p = p[:min(len(p), b.Size()-n)]
		if _, err := b.WriteAt(p, int64(n)); err != nil {
			return err
		}
		n += len(p)
	}
	s.free = s.free[1:]
	if err := s.q.Add(b, virtio.Out(0, n)); err != nil {
		return err
	}
	return s.q.Kick()
}

// driverReceiver receives in buffers that the device has.
type driverReceiver struct{ q *virtio.DriverQueue }

type driverPiece struct {
	q        *virtio.DriverQueue
	b        *virtio.Buffer
	n, taken int
}

// newDriverReceiver fills the queue.
func newDriverReceiver(d *virtio.Driver, q *virtio.DriverQueue, size int) (*driverReceiver, error) {
	all, err := buffers(d, q.Size(), size)
	for _, b := range all {
		if err != nil {
			b.Free()
		} else if err := q.Add(b, virtio.In(0, size)); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	return &driverReceiver{q}, q.Kick()
}

func (r *driverReceiver) take(ctx context.Context) (piece, error) {
	b, n, err := r.q.Next(ctx)
	if err != nil {
		return nil, err
	}
	return &driverPiece{q: r.q, b: b, n: n}, nil
}

func (r *driverReceiver) tryTake() (piece, error) {
	b, n, err := r.q.TryNext()
	if b == nil || err != nil {
		return nil, err
	}
	return &driverPiece{q: r.q, b: b, n: n}, nil
}

func (p *driverPiece) Read(b []byte) (int, error) {
	if p.taken == p.n {
		return 0, io.EOF
	}
	n, err := p.b.ReadAt(b[:min(len(b), p.n-p.taken)], int64(p.taken))
	p.taken += n
	return n, err
}

func (p *driverPiece) done() error {
	again := virtio.In(0, p.b.Size())
	again.Same = true // it never serves another port
	if err := p.q.Add(p.b, again); err != nil {
		return err
	}
	return p.q.Kick()
}

// group is goroutines of a session. The first error ends all.
type group struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
	err    error
}

func newGroup(ctx context.Context) *group {
	g := &group{}
	g.ctx, g.cancel = context.WithCancel(ctx)
	return g
}

func (g *group) run(f func(context.Context) error) {
	g.wg.Add(1)
	go func() {
		defer g.wg.Done()
		if err := f(g.ctx); err != nil {
			g.once.Do(func() { g.err = err })
			g.cancel()
		}
	}()
}

func (g *group) wait() error {
	g.wg.Wait()
	g.cancel()
	return g.err
}

// woken reports whether a wait was ended by a waker, and not by the session.
func woken(ctx context.Context, err error) bool {
	return ctx.Err() == nil && errors.Is(err, context.Canceled)
}

// lane is the queues of one port number.
type lane struct {
	tx, rx, teller *waker
	busy           func() bool // of hooks

	mu   sync.Mutex
	port *Port // for which data goes
	// used says that there was a port: what arrives without one now is for
	// nobody. Before that it stays in the queue.
	used bool
	// draining says that what was meant for the last port is still in the queue.
	draining bool
}

func newLane(ctx context.Context, teller *waker) *lane {
	return &lane{tx: newWaker(ctx), rx: newWaker(ctx), teller: teller}
}

// hooks are those of a port that has the lane.
func (l *lane) hooks() hooks { return hooks{l.tx, l.rx, l.teller, l.busy} }

// busyOf is how to ask a sender whether the other side has yet to take something;
// nil: there is no need.
func busyOf(s sender) func() bool {
	if d, ok := s.(*driverSender); ok {
		return d.busy
	}
	return nil
}

// get is the port, and whether what arrives may be taken.
func (l *lane) get() (p *Port, takes, draining bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.port, l.used, l.draining
}

// set lets data go for a port; none: what arrives is dropped.
func (l *lane) set(p *Port) {
	l.mu.Lock()
	l.draining = p == nil && (l.draining || l.port != nil)
	l.port, l.used = p, true
	l.mu.Unlock()
	l.tx.wake()
	l.rx.wake()
}

// drained says that the queue was empty since the last port went.
func (l *lane) drained() {
	l.mu.Lock()
	l.draining = false
	l.mu.Unlock()
	l.teller.wake()
}

// clean reports whether another port may take the number.
func (l *lane) clean() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.draining
}

// send moves what ports write to the queue.
func (l *lane) send(ctx context.Context, s sender) error {
	buf := make([]byte, mostSize)
	for {
		next := l.tx.next()
		p, _, _ := l.get()
		if p == nil || !p.hasOut() {
			<-next.Done()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			continue
		}
		n, err := s.trySpace()
		if n == 0 && err == nil {
			p.starve()
			n, err = s.space(ctx)
		}
		if err != nil {
			return err
		}
		if n = p.pull(buf[:min(n, len(buf))]); n == 0 {
			continue // it was closed meanwhile; the space is kept
		}
		err = s.send(buf[:n])
		p.sent()
		if err != nil {
			return err
		}
	}
}

// receive moves what arrives to ports, as long as they have room.
func (l *lane) receive(ctx context.Context, r receiver) error {
	buf := make([]byte, mostSize)
	var c piece
	for {
		next := l.rx.next()
		p, takes, draining := l.get()
		room, leaving := 0, uint64(0)
		switch {
		case p != nil:
			room = p.room(0)
			leaving = p.isLeaving()
		case takes:
			room = maxLimit // for nobody
		}
		if room == 0 {
			var err error
			switch {
			case p == nil || !p.impatient():
				<-next.Done()
			case c == nil:
				c, err = r.take(next)
			default:
				p.giveUp(next)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil && !woken(ctx, err) {
				return err
			}
			continue
		}
		var err error
		// Whether the queue is empty is to be known only where that means something.
		if c == nil && (leaving != 0 || draining) {
			if c, err = r.tryTake(); err != nil {
				return err
			}
		}
		if c == nil {
			if leaving != 0 {
				p.arrived(leaving)
			}
			if draining {
				l.drained()
			}
			if c, err = r.take(next); err != nil {
				if woken(ctx, err) {
					continue
				}
				return err
			}
			continue // the port may be another one by now
		}
		n, err := c.Read(buf[:min(room, len(buf))])
		if p != nil && n > 0 {
			p.receive(buf[:n])
		}
		switch {
		case err == io.EOF:
			err = c.done()
			c = nil
			if err != nil {
				return err
			}
		case err != nil:
			return err
		}
	}
}
