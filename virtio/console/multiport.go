package console

import (
	"context"
	"io"
	"sync"
)

// multiport is a session of the multiport interface, on either side. What is to
// be told is the difference between the ports as they are and what the other
// side knows, so it needs no queue, however often something changes.
type multiport struct {
	*table
	config Config
	device bool
	sizes  bool // RESIZE means something
	most   uint32
	teller *waker
	// join gives a port of the driver its queues.
	join func(id uint32) (*lane, error)

	mu    sync.Mutex
	ready bool // device: the driver said DEVICE_READY; driver: it was sent
	// restored says that the driver knows the ports from before: after hibernation
	// Linux says PORT_READY for each, and no DEVICE_READY.
	restored bool
	slots    []slot
	turn     int // slot that is looked at first
}

// slot is what there is about a port number.
type slot struct {
	lane  *lane // nil: it has none yet
	port  *Port // that was told of by PORT_ADD
	added bool  // one was, ever
	ready bool  // the driver said so
	early bool  // it said PORT_OPEN before that
	owed  owed
	told
}

// owed is the driver's answer to PORT_ADD.
type owed uint8

const (
	nothing owed = iota
	readyOwed
	refusalOwed
)

// tell sends messages.
func (m *multiport) tell(ctx context.Context, s sender) error {
	return tell(ctx, s, m.teller, m.message, message.bytes)
}

// tell sends messages as long as there are any, and waits for more.
func tell(ctx context.Context, s sender, teller *waker, next func() (message, bool), bytes func(message) []byte) error {
	for {
		woken := teller.next()
		if _, err := s.space(ctx); err != nil {
			return err
		}
		m, ok := next()
		if !ok {
			<-woken.Done()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			continue
		}
		if err := s.send(bytes(m)); err != nil {
			return err
		}
	}
}

// hear takes messages. What a message says is done before its buffer goes back:
// the driver sends data behind PORT_READY when it has it. Linux's CPU spins
// until then, so nothing here waits.
func (m *multiport) hear(ctx context.Context, r receiver) error {
	buf := make([]byte, bufferSize)
	for {
		c, err := r.take(ctx)
		if err != nil {
			return err
		}
		n, err := io.ReadFull(c, buf)
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return err
		}
		m.count(m.handle(buf[:n]))
		if err := c.done(); err != nil {
			return err
		}
	}
}

// end lets go of the ports.
func (m *multiport) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.slots {
		if p := m.slots[i].port; p != nil {
			p.detach()
		}
	}
}

// handle does what a message says.
func (m *multiport) handle(b []byte) error {
	msg, err := parseMessage(b)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.device && msg.event == eventDeviceReady {
		m.ready = msg.value != 0
		m.teller.wake()
		return nil
	}
	if msg.id >= m.most {
		return &MessageError{"port", uint64(msg.id), "a number below the most ports of the device"}
	}
	if msg.id >= uint32(len(m.slots)) { // the device has more than we want
		return &MessageError{"port", uint64(msg.id), "a number below MaxPorts of the driver"}
	}
	s := &m.slots[msg.id]
	if m.device {
		return m.fromDriver(s, msg)
	}
	return m.fromDevice(s, msg)
}

func unknownPort(id uint32) error {
	return &MessageError{"port", uint64(id), "a port that was added"}
}

// fromDriver does what the driver says. The caller holds mu.
func (m *multiport) fromDriver(s *slot, msg message) error {
	if msg.event == eventPortReady && msg.value != 0 && !m.ready {
		m.ready, m.restored = true, true
		m.teller.wake()
	}
	if p := m.Port(msg.id); m.restored && msg.event == eventPortReady && !s.added && p != nil {
		s.port, s.added = p, true
	}
	if s.port == nil {
		return unknownPort(msg.id)
	}
	switch msg.event {
	case eventPortReady:
		if s.ready = msg.value != 0; !s.ready {
			s.lane.set(nil)
			s.port.detach()
			return nil
		}
		// It says so again after hibernation, and has forgotten everything.
		s.told = s.port.afresh()
		s.lane.set(s.port)
		s.port.attach(s.lane.hooks(), false)
		if s.early {
			s.early = false
			s.port.peerTurned(true)
		}
	case eventPortOpen:
		if !s.ready { // a program was faster than Linux's probe
			s.early = msg.value != 0
			return nil
		}
		s.port.peerTurned(msg.value != 0)
	default:
		return &MessageError{"event", uint64(msg.event), "DEVICE_READY (0), PORT_READY (3) or PORT_OPEN (6)"}
	}
	return nil
}

// fromDevice does what the device says. The caller holds mu.
func (m *multiport) fromDevice(s *slot, msg message) error {
	if msg.event == eventPortAdd {
		defer m.teller.wake()
		if s.owed = readyOwed; s.port != nil {
			return nil
		}
		if s.lane == nil {
			var err error
			if s.lane, err = m.join(msg.id); err != nil {
				s.owed = refusalOwed
				return err
			}
		}
		p := m.config.port(msg.id, Multiport, false)
		s.port, s.told, s.ready = p, told{}, false
		p.attach(s.lane.hooks(), false)
		m.table.mu.Lock()
		m.put(p)
		m.table.mu.Unlock()
		return nil
	}
	p := s.port
	if p == nil {
		return unknownPort(msg.id)
	}
	switch msg.event {
	case eventPortRemove:
		s.port, s.owed = nil, nothing
		s.lane.set(nil)
		m.take(p, ErrRemoved)
	case eventConsolePort:
		if msg.value == 0 {
			return &MessageError{"CONSOLE_PORT", 0, "1"}
		}
		p.describe("", true)
		s.turns = p.afresh().turns // say it, even if it was said
		m.teller.wake()
		m.changedNow()
	case eventResize:
		switch {
		case len(msg.payload) < 4:
			return &MessageError{"length of RESIZE", uint64(len(msg.payload)), "4 bytes behind the header"}
		case m.sizes && p.Console():
			p.setSize(parseSize(msg.payload, m.config.ColsFirst))
		}
	case eventPortOpen:
		p.peerTurned(msg.value != 0)
	case eventPortName:
		p.describe(text(msg.payload), false)
		m.changedNow()
	default:
		return &MessageError{"event", uint64(msg.event), "1, 2, or 4 to 7"}
	}
	return nil
}

// message is the next message to send.
func (m *multiport) message() (message, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.ready {
		if m.device {
			return message{}, false
		}
		m.ready = true
		return message{id: 1<<32 - 1, event: eventDeviceReady, value: 1}, true
	}
	for i := range m.slots {
		id := (m.turn + i) % len(m.slots)
		f := m.toDevice
		if m.device {
			f = m.toDriver
		}
		if msg, ok := f(&m.slots[id], uint32(id)); ok {
			m.turn = (id + 1) % len(m.slots)
			return msg, true
		}
	}
	return message{}, false
}

// toDriver is what is to be told of a port by the device. The caller holds mu.
func (m *multiport) toDriver(s *slot, id uint32) (message, bool) {
	p := m.Port(id)
	switch {
	case s.port != nil && s.port != p:
		s.port, s.ready, s.early = nil, false, false
		s.lane.set(nil)
		return message{id, eventPortRemove, 1, nil}, true
	case p == nil, s.port == nil && !s.lane.clean():
		return message{}, false
	case s.port == nil:
		s.port, s.added = p, true
		return message{id, eventPortAdd, 1, nil}, true
	case !s.ready:
		return message{}, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.console && !s.console:
		s.console = true
		return message{id, eventConsolePort, 1, nil}, true
	case p.name != "" && !s.name:
		s.name = true
		return message{id, eventPortName, 1, []byte(p.name)}, true
	}
	if open, due := p.turn(&s.told); due {
		return message{id, eventPortOpen, bit(open), nil}, true
	}
	if m.sizes && p.console && p.resizes != s.resizes {
		s.resizes = p.resizes
		return message{id, eventResize, 0, p.size.bytes(m.config.ColsFirst)}, true
	}
	return message{}, false
}

// toDevice is what is to be told of a port by the driver. The caller holds mu.
func (m *multiport) toDevice(s *slot, id uint32) (message, bool) {
	switch o := s.owed; {
	case o != nothing && s.lane != nil && !s.lane.clean():
		return message{}, false
	case o != nothing:
		s.owed = nothing
		if s.port != nil && !s.ready {
			s.ready = true
			s.lane.set(s.port)
		}
		return message{id, eventPortReady, bit(o == readyOwed), nil}, true
	case s.port == nil || !s.ready:
		return message{}, false
	}
	s.port.mu.Lock()
	defer s.port.mu.Unlock()
	open, due := s.port.turn(&s.told)
	return message{id, eventPortOpen, bit(open), nil}, due
}

func bit(b bool) uint16 {
	if b {
		return 1
	}
	return 0
}

// single is a session without control messages: port 0 is open on both sides
// all the time.
func single(g *group, t *table, s sender, r receiver) error {
	teller := newWaker(g.ctx)
	l := newLane(g.ctx, teller)
	l.busy = busyOf(s)
	t.tellBy(teller)
	var p *Port
	follow := func() {
		p = t.Port(0)
		l.set(p)
		if p != nil {
			p.attach(hooks{send: l.tx, room: l.rx, busy: l.busy}, false)
			p.peerTurned(true)
		}
	}
	follow() // even without a port nobody is to wait
	g.run(func(ctx context.Context) error { return l.send(ctx, s) })
	g.run(func(ctx context.Context) error { return l.receive(ctx, r) })
	g.run(func(ctx context.Context) error {
		for ctx.Err() == nil {
			next := teller.next()
			if t.Port(0) != p {
				follow()
			}
			<-next.Done()
		}
		return ctx.Err()
	})
	err := g.wait()
	if p != nil {
		p.detach()
	}
	return err
}
