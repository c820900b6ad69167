package console

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// ID is the virtio device ID.
const ID = 3

const (
	// mostPorts is how many ports a device may have.
	mostPorts = 128
	// maxLimit is the most unread data of a port in bytes.
	maxLimit = 64 << 20
	// defaultLimit is that of a port that has no other.
	defaultLimit = 256 << 10
)

// Config is how a side talks. Wire and ColsFirst have to be alike on both
// sides.
type Config struct {
	Wire Wire
	// MaxPorts is how many ports there may be, up to 128. 0 is 4 on the device
	// side, and as many as the device has on the driver side.
	MaxPorts int
	// Entries is how many entries a queue has, a power of two; 0 is 4. Linux
	// puts 4096 bytes into the R/W section for each entry of each receive
	// queue, and a multiport device has one more of those than ports.
	Entries int
	// Limit is how many bytes of unread data a port has at most, until
	// [Port.SetLimit]; 0 is 256 KiB. With many ports see to it that there is
	// memory for all of them.
	Limit int
	// ColsFirst is the order of RESIZE that the specification has. All but two
	// releases of Linux have rows first.
	ColsFirst bool
	// Spin is for how long each port looks for more after it has received
	// something, or has run out of room, before it sleeps: less latency, for a CPU.
	Spin time.Duration
}

func (c *Config) check(ports int) error {
	if c.MaxPorts == 0 {
		c.MaxPorts = ports
	}
	if c.Entries == 0 {
		c.Entries = 4
	}
	if c.Limit == 0 {
		c.Limit = defaultLimit
	}
	switch {
	case c.Wire < Multiport || c.Wire > Original:
		return fmt.Errorf("console: expected Multiport, Single or Original, found wire %d", c.Wire)
	case c.MaxPorts < 1 || c.MaxPorts > mostPorts:
		return fmt.Errorf("console: expected 1 to %d ports, found %d", mostPorts, c.MaxPorts)
	case c.Limit < 1 || c.Limit > maxLimit:
		return fmt.Errorf("console: limit of unread data: expected 1 to %d bytes, found %d", maxLimit, c.Limit)
	}
	if c.Wire == Single {
		c.MaxPorts = 1
	}
	return nil
}

// port is a new port.
func (c *Config) port(id uint32, w Wire, owner bool) *Port {
	return &Port{id: id, wire: w, owner: owner, limit: c.Limit, eager: w == Original}
}

// PortConfig is what a port is at first.
type PortConfig struct {
	// Name is for the driver's side to find the port by: UTF-8 without 0, up to
	// 255 bytes. No two ports of a device have the same; empty is no name.
	Name string
	// Console makes the port a console. On the multiport wire port 0 is always
	// one, on the single wire the only port is.
	Console bool
}

// Device is the device side.
type Device struct {
	table
	config Config
	back   *virtio.BackEnd
	layout sync.Mutex // one at a time changes ports and configuration space
}

// NewDevice makes a device without ports.
func NewDevice(dev *ivshmem.Device, c Config) (*Device, error) {
	if err := c.check(4); err != nil {
		return nil, err
	}
	d := &Device{config: c, table: table{ports: map[uint32]*Port{}}}
	v := virtio.Device{ID: ID, Run: d.run, Spin: c.Spin, Features: featureSize, Config: make([]byte, configSize), ConfigWritten: d.written}
	queues := 2
	switch c.Wire {
	case Multiport:
		v.Features |= featureMultiport | featureEmergency
		binary.LittleEndian.PutUint32(v.Config[configPorts:], uint32(c.MaxPorts))
		queues = 2 * (c.MaxPorts + 1)
	case Single:
		v.Features |= featureEmergency
	case Original:
		v.Features |= featureMultiport
		v.Config = v.Config[:configOriginal]
	}
	for range queues {
		v.Queues = append(v.Queues, c.Entries)
	}
	var err error
	d.back, err = virtio.NewBackEnd(dev, v)
	return d, err
}

// Serve serves drivers, one after the other, as [virtio.BackEnd.Serve] does. The
// ports stay as they are between drivers: the other side is closed then.
func (d *Device) Serve(ctx context.Context) error { return d.back.Serve(ctx) }

// AddPort adds a port, at any time. It fails with [ErrTooMany]. Its end is
// closed at first.
func (d *Device) AddPort(c PortConfig) (*Port, error) {
	if !usable(c.Name) {
		return nil, fmt.Errorf("name of a port: expected UTF-8 without 0, up to 255 bytes, found %q", c.Name)
	}
	d.layout.Lock()
	defer d.layout.Unlock()
	if d.Lookup(c.Name) != nil {
		return nil, fmt.Errorf("name of a port: expected a new one, found %q on port %d", c.Name, d.Lookup(c.Name).id)
	}
	d.mu.Lock()
	id := uint32(0)
	if d.config.Wire == Multiport && !c.Console {
		id = 1
	}
	for d.ports[id] != nil {
		id++
	}
	if id >= uint32(d.config.MaxPorts) {
		d.mu.Unlock()
		return nil, ErrTooMany
	}
	p := d.config.port(id, d.config.Wire, true)
	p.name, p.console = c.Name, c.Console || d.config.Wire == Single
	d.put(p)
	active := len(d.ports)
	d.mu.Unlock()
	if d.config.Wire == Original {
		if err := d.back.SetConfig(configPorts, binary.LittleEndian.AppendUint32(nil, uint32(active))); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// RemovePort removes a port, and what was not read or sent. Wires other than
// Multiport fail with [ErrNotCarried].
func (d *Device) RemovePort(p *Port) error {
	if d.config.Wire != Multiport {
		return ErrNotCarried
	}
	if !d.take(p, ErrRemoved) {
		return ErrRemoved
	}
	return nil
}

// Resize tells the driver's side the size of a console's window. The original
// wire has one for port 0 only, and others fail there with [ErrNotCarried].
func (d *Device) Resize(p *Port, s Size) error {
	d.layout.Lock()
	defer d.layout.Unlock()
	switch {
	case d.Port(p.id) != p:
		return ErrRemoved
	case d.config.Wire == Original && p.id != 0, !p.Console():
		return ErrNotCarried
	}
	p.setSize(s)
	if p.id != 0 {
		return nil
	}
	// For drivers that take only one port.
	return d.back.SetConfig(configCols, s.bytes(true))
}

// written takes an emergency write: a byte for the first console that is open,
// lost if there is none. 0 is none.
func (d *Device) written(offset int, value []byte) {
	if offset != configEmergency || d.config.Wire == Original || len(value) == 0 || value[0] == 0 {
		return
	}
	for _, p := range d.Ports() {
		if p.emergency(value[0]) {
			return
		}
	}
}

// emergency takes a byte if the port is an open console.
func (p *Port) emergency(b byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.console || !p.isOpen() || p.removed != nil {
		return false
	}
	if p.unread.Len() < p.limit {
		p.unread.Write([]byte{b})
		p.change()
	} else {
		p.dropped++
	}
	return true
}

// run is a session.
func (d *Device) run(ctx context.Context, s *virtio.Session) error {
	g := newGroup(ctx)
	defer d.tellBy(nil)
	switch {
	case !s.Features().Has(featureMultiport):
		s.Queue(0).Delay()
		if err := d.tellSize(); err != nil {
			return err
		}
		return single(g, &d.table, &deviceSender{q: s.Queue(0), least: 1}, deviceReceiver{s.Queue(1)})
	case d.config.Wire == Original:
		return newOriginal(g, &d.table, true, d.config.MaxPorts).run(g, &deviceSender{q: s.Queue(0), least: originalHeader + originalEvent}, deviceReceiver{s.Queue(1)})
	}
	m := &multiport{table: &d.table, config: d.config, device: true, sizes: s.Features().Has(featureSize),
		most: uint32(d.config.MaxPorts), teller: newWaker(g.ctx), slots: make([]slot, d.config.MaxPorts)}
	d.tellBy(m.teller)
	for id := range m.slots {
		l := newLane(g.ctx, m.teller)
		m.slots[id].lane = l
		rx, tx := portQueues(id)
		s.Queue(rx).Delay()
		g.run(func(ctx context.Context) error { return l.send(ctx, &deviceSender{q: s.Queue(rx), least: 1}) })
		g.run(func(ctx context.Context) error { return l.receive(ctx, deviceReceiver{s.Queue(tx)}) })
	}
	g.run(func(ctx context.Context) error {
		return m.tell(ctx, &deviceSender{q: s.Queue(2), least: controlHeader})
	})
	g.run(func(ctx context.Context) error { return m.hear(ctx, deviceReceiver{s.Queue(3)}) })
	err := g.wait()
	m.end()
	return err
}

// tellSize has a driver without MULTIPORT read the size of the window: Linux does
// so when it is told of a change, and not before.
func (d *Device) tellSize() error {
	d.layout.Lock()
	defer d.layout.Unlock()
	p := d.Port(0)
	if p == nil || p.Size() == (Size{}) {
		return nil
	}
	return d.back.SetConfig(configCols, p.Size().bytes(true))
}

// portQueues are the queues of a port, as the driver calls them: its receive and
// transmit queue.
func portQueues(id int) (rx, tx int) {
	if id == 0 {
		return 0, 1
	}
	return 2*id + 2, 2*id + 3
}
