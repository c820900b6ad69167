package console

import (
	"context"
	"encoding/binary"
	"io"
	"sync"
)

// slack is how much a port on the original wire takes above its limit, since
// what was sent before the other side was throttled still arrives. A side that
// goes on sends into a queue that nobody empties until the port is read.
const slack = 256 << 10

// original is a session of the original wire, on either side: control messages
// and the data of all ports in one pair of queues.
type original struct {
	*table
	device bool
	waker  *waker // something to tell or to send
	room   *waker // a port has more room
	busy   func() bool

	mu    sync.Mutex
	slots []originalSlot
	turn  int // slot that is looked at first
}

type originalSlot struct {
	port *Port
	// heard, on the device: the driver said anything of the port, as it does when
	// it has made it. asked: the driver waits for the name, or asked for it.
	heard, asked bool
	told
}

func newOriginal(g *group, t *table, device bool, ports int) *original {
	o := &original{table: t, device: device, waker: newWaker(g.ctx), room: newWaker(g.ctx)}
	o.slots = make([]originalSlot, ports)
	return o
}

// run is the session.
func (o *original) run(g *group, s sender, r receiver) error {
	o.busy = busyOf(s)
	o.tellBy(o.waker)
	g.run(func(ctx context.Context) error { return o.send(ctx, s) })
	g.run(func(ctx context.Context) error { return o.receive(ctx, r) })
	err := g.wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.slots {
		if p := o.slots[i].port; p != nil {
			p.detach()
		}
	}
	return err
}

// adopt takes ports of the table that are new. The caller holds mu.
func (o *original) adopt() {
	for id := range o.slots {
		s := &o.slots[id]
		if s.port != nil {
			continue
		}
		if s.port = o.Port(uint32(id)); s.port != nil {
			s.told = s.port.afresh()
			s.port.attach(hooks{o.waker, o.room, o.waker, o.busy}, true)
		}
	}
}

// send sends messages, and data when there are none.
func (o *original) send(ctx context.Context, s sender) error {
	buf := make([]byte, bufferSize)
	for {
		woken := o.waker.next()
		room, err := s.space(ctx)
		if err != nil {
			return err
		}
		o.mu.Lock()
		o.adopt()
		m, ok := o.message()
		o.mu.Unlock()
		if ok {
			if err := s.send(m.original()); err != nil {
				return err
			}
			continue
		}
		p, n := o.pull(buf[:min(len(buf), room)-originalHeader])
		if p == nil {
			<-woken.Done()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			continue
		}
		err = s.send(appendOriginal(nil, p.id, 0, n), buf[:n])
		p.sent()
		if err != nil {
			return err
		}
	}
}

// pull takes data of the next port that has some.
func (o *original) pull(b []byte) (*Port, int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.slots {
		id := (o.turn + i) % len(o.slots)
		s := &o.slots[id]
		if s.port == nil || o.device && !s.heard {
			continue
		}
		if n := s.port.pull(b); n > 0 {
			o.turn = (id + 1) % len(o.slots)
			return s.port, n
		}
	}
	return nil, 0
}

// message is the next message. The caller holds mu.
func (o *original) message() (message, bool) {
	for i := range o.slots {
		id := (o.turn + i) % len(o.slots)
		if s := &o.slots[id]; s.port != nil {
			if m, ok := o.ofSlot(s); ok {
				m.id = uint32(id)
				o.turn = (id + 1) % len(o.slots)
				return m, true
			}
		}
	}
	return message{}, false
}

func (o *original) ofSlot(s *originalSlot) (message, bool) {
	p := s.port
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case o.device && !s.heard:
		return message{}, false
	case !o.device && !s.asked:
		s.asked = true
		return message{event: originalName}, true
	case o.device && s.asked:
		s.asked = false
		return message{event: originalName, payload: []byte(p.name)}, true
	case o.device && p.console && !s.console:
		s.console = true
		return message{event: originalConsole, value: 1}, true
	}
	if a, b := p.asks, &s.asks; o.device && a != *b {
		if a.cacheSet && (!b.cacheSet || a.cache != b.cache) {
			b.cacheSet, b.cache = true, a.cache
			return message{event: originalCache, value: bit(a.cache)}, true
		}
		*b = a
		return message{event: originalLimit, value: a.limit}, true
	}
	if full := p.full(); full != s.full {
		s.full = full
		return message{event: originalThrottle, value: bit(full)}, true
	}
	open, due := p.turn(&s.told)
	return message{event: originalOpen, value: bit(open)}, due
}

// receive takes what arrives.
func (o *original) receive(ctx context.Context, r receiver) error {
	buf := make([]byte, bufferSize)
	for {
		c, err := r.take(ctx)
		if err != nil {
			return err
		}
		err = o.arrive(ctx, c, buf)
		switch err.(type) {
		case nil:
		case *MessageError:
			o.count(err)
		default:
			return err
		}
		if err := c.done(); err != nil {
			return err
		}
	}
}

// arrive takes a buffer.
func (o *original) arrive(ctx context.Context, c io.Reader, buf []byte) error {
	n, err := io.ReadFull(c, buf[:originalHeader])
	switch {
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return &MessageError{"length", uint64(n), "at least 12 bytes"}
	case err != nil:
		return err
	}
	id, flags := binary.LittleEndian.Uint32(buf), binary.LittleEndian.Uint32(buf[4:])
	o.mu.Lock()
	o.adopt()
	var p *Port
	if uint64(id) < uint64(len(o.slots)) {
		p = o.slots[id].port
	}
	o.mu.Unlock()
	switch {
	case p == nil:
		return unknownPort(id)
	case flags&flagControl == 0:
		return o.data(ctx, p, c, buf)
	}
	n, err = io.ReadFull(c, buf)
	switch {
	case err != nil && err != io.EOF && err != io.ErrUnexpectedEOF:
		return err
	case n < originalEvent:
		return &MessageError{"length of a control message", uint64(n), "at least 4 bytes behind the header"}
	}
	le := binary.LittleEndian
	if err := o.handle(message{id, le.Uint16(buf), le.Uint16(buf[2:]), buf[originalEvent:n]}, p); err != nil {
		return err
	}
	o.count(nil)
	return nil
}

// data takes data for a port, and waits for room.
func (o *original) data(ctx context.Context, p *Port, c io.Reader, buf []byte) error {
	if !o.device {
		p.peerTurned(true) // the proposal's driver takes data for a sign of that
	}
	for {
		next := o.room.next()
		room := p.room(slack)
		if room == 0 {
			<-next.Done()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			continue
		}
		n, err := c.Read(buf[:min(len(buf), room)])
		if n > 0 {
			p.receive(buf[:n])
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// handle does what a message says.
func (o *original) handle(m message, p *Port) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := &o.slots[m.id]
	if o.device && !s.heard {
		s.heard = true
		o.waker.wake()
	}
	switch {
	case m.event == originalOpen:
		p.peerTurned(m.value != 0)
		if m.value == 0 {
			p.arrived(p.isLeaving()) // there is one queue, so all is here
		}
	case m.event == originalThrottle:
		p.setThrottled(m.value != 0)
	case m.event == originalName && o.device:
		s.asked = true
		o.waker.wake()
	case m.event == originalName:
		p.describe(text(m.payload), false)
		o.changedNow()
	case o.device:
		return &MessageError{"event", uint64(m.event), "PORT_OPEN (0), PORT_NAME (1) or THROTTLE_PORT (4)"}
	case m.event == originalConsole:
		if m.value == 0 {
			return &MessageError{"CONSOLE_PORT", 0, "1"}
		}
		p.describe("", true)
		o.changedNow()
	case m.event == originalCache:
		p.SetCache(m.value != 0)
	case m.event == originalLimit:
		// The ports share the memory; the least that can be asked for is 1 MiB.
		limit := max(maxLimit/len(o.Ports()), 1<<20)
		if m.value != 0 {
			limit = min(int(m.value)<<20, limit)
		}
		return p.SetLimit(limit)
	default:
		return &MessageError{"event", uint64(m.event), "0 to 5"}
	}
	return nil
}
