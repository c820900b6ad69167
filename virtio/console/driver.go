package console

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// controlSize is the buffer size of the driver's control messages, which have
// no payload.
const controlSize = 64

// controlMost is the most entries of the queue for messages of the device, as
// many as QEMU has.
const controlMost = 32

// Driver is the driver side.
type Driver struct {
	table
	config Config
	wire   Wire
	d      *virtio.Driver
	group  *group
	done   chan struct{}
}

// Open takes the console at the other end of the link into use. It waits until
// there is one. A device that offers one port only is used as [Single] is.
func Open(ctx context.Context, dev *ivshmem.Device, c Config) (*Driver, error) {
	if err := c.check(mostPorts); err != nil {
		return nil, err
	}
	features := virtio.Features(featureSize | featureMultiport | featureEmergency)
	switch c.Wire {
	case Single:
		features &^= featureMultiport
	case Original:
		features &^= featureEmergency
	}
	v, err := virtio.Open(ctx, dev, virtio.DriverConfig{ID: ID, Features: features, Spin: c.Spin})
	if err != nil {
		return nil, err
	}
	d := &Driver{config: c, wire: c.Wire, d: v, done: make(chan struct{}), table: table{ports: map[uint32]*Port{}}}
	if !v.Features().Has(featureMultiport) {
		d.wire = Single
	}
	d.group = newGroup(context.Background())
	var run func() error
	switch d.wire {
	case Multiport:
		run, err = d.multiport(ctx)
	case Single:
		run, err = d.single(ctx)
	case Original:
		run, err = d.original(ctx)
	}
	if err != nil {
		d.group.cancel()
		return nil, errors.Join(err, v.Close())
	}
	go d.run(run)
	return d, nil
}

// run is the time until the driver ends.
func (d *Driver) run(session func() error) {
	defer close(d.done)
	err := session()
	if errors.Is(err, context.Canceled) {
		err = os.ErrClosed
	}
	d.tellBy(nil)
	for _, p := range d.Ports() {
		d.take(p, err)
	}
}

// Wire is how the two sides talk: what was configured, or Single if the device
// has nothing else.
func (d *Driver) Wire() Wire { return d.wire }

// Done is closed when the driver has ended: by Close, or since the device went.
// No port is left then.
func (d *Driver) Done() <-chan struct{} { return d.done }

// Close gives the device up; its ports are there no more. The ivshmem device
// stays open.
func (d *Driver) Close() error {
	err := d.d.Close()
	d.group.cancel()
	<-d.done
	return err
}

// EmergencyWrite sends a byte to the device's first open console without any
// queue. It fails with [ErrNotCarried] where the device cannot take it.
func (d *Driver) EmergencyWrite(ctx context.Context, b byte) error {
	if !d.d.Features().Has(featureEmergency) || d.d.ConfigSize() < configSize {
		return ErrNotCarried
	}
	return d.d.WriteConfig(ctx, []byte{b, 0, 0, 0}, configEmergency)
}

// readConfig reads a field of the configuration space.
func (d *Driver) readConfig(ctx context.Context, offset, n int) (uint32, error) {
	var b [4]byte
	err := d.d.ReadConfig(ctx, b[:n], offset)
	return binary.LittleEndian.Uint32(b[:]), err
}

// configured is the size in the configuration space.
func (d *Driver) configured(ctx context.Context) (Size, error) {
	if !d.d.Features().Has(featureSize) {
		return Size{}, nil
	}
	var b [4]byte
	err := d.d.ReadConfig(ctx, b[:], configCols)
	return parseSize(b[:], true), err
}

// pair sets two queues up, from and to the device.
func (d *Driver) pair(ctx context.Context, rx, tx int) (r, t *virtio.DriverQueue, err error) {
	if r, err = d.d.SetUpQueue(ctx, rx, d.config.Entries); err == nil {
		t, err = d.d.SetUpQueue(ctx, tx, d.config.Entries)
	}
	return r, t, err
}

// dataSize is the size of buffers for data: those of all ports take no more than
// half of the section.
func (d *Driver) dataSize(ports int) int {
	share := d.d.Device().Sections().ReadWrite.Size() / 2 / uint64(2*d.config.Entries*ports)
	size := bufferSize
	for size < mostSize && uint64(2*size) <= share {
		size *= 2
	}
	return size
}

// ends makes both ends of a pair of queues.
func (d *Driver) ends(r, t *virtio.DriverQueue, in, out int) (*driverSender, *driverReceiver, error) {
	s, err := newDriverSender(d.d, t, out)
	if err != nil {
		return nil, nil, err
	}
	f, err := newDriverReceiver(d.d, r, in)
	if err != nil {
		for _, b := range s.free {
			b.Free()
		}
		return nil, nil, err
	}
	return s, f, nil
}

// one is a wire with one pair of queues.
func (d *Driver) one(ctx context.Context, size int) (*driverSender, *driverReceiver, error) {
	r, t, err := d.pair(ctx, 0, 1)
	if err != nil {
		return nil, nil, err
	}
	if err := d.d.Start(ctx); err != nil {
		return nil, nil, err
	}
	return d.ends(r, t, size, size)
}

func (d *Driver) single(ctx context.Context) (func() error, error) {
	size, err := d.configured(ctx)
	if err != nil {
		return nil, err
	}
	p := d.config.port(0, Single, false)
	p.describe("", true)
	p.setSize(size)
	d.ports[0] = p
	s, r, err := d.one(ctx, d.dataSize(1))
	if err != nil {
		return nil, err
	}
	d.group.run(func(ctx context.Context) error {
		for {
			if err := d.d.ConfigChanged(ctx); err != nil {
				return err
			}
			size, err := d.configured(ctx)
			if err != nil {
				return err
			}
			p.setSize(size)
		}
	})
	return func() error { return single(d.group, &d.table, s, r) }, nil
}

func (d *Driver) original(ctx context.Context) (func() error, error) {
	if err := d.follow(ctx); err != nil {
		return nil, err
	}
	s, r, err := d.one(ctx, bufferSize)
	if err != nil {
		return nil, err
	}
	o := newOriginal(d.group, &d.table, false, d.config.MaxPorts)
	d.tellBy(o.waker)
	d.group.run(func(ctx context.Context) error {
		for {
			if err := d.d.ConfigChanged(ctx); err != nil {
				return err
			}
			if err := d.follow(ctx); err != nil {
				return err
			}
		}
	})
	return func() error { return o.run(d.group, s, r) }, nil
}

// follow makes the ports that the original wire's configuration space says.
// There are never fewer than before.
func (d *Driver) follow(ctx context.Context) error {
	n, err := d.readConfig(ctx, configPorts, 4)
	if err != nil {
		return err
	}
	size, err := d.configured(ctx)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for id := range min(n, uint32(d.config.MaxPorts)) {
		if d.ports[id] == nil {
			d.put(d.config.port(id, Original, false))
		}
	}
	if p := d.ports[0]; p != nil {
		p.setSize(size)
	}
	return nil
}

func (d *Driver) multiport(ctx context.Context) (func() error, error) {
	most, err := d.readConfig(ctx, configPorts, 4)
	if err != nil {
		return nil, err
	}
	if most == 0 {
		return nil, &MessageError{"max_nr_ports", 0, "at least 1"}
	}
	n := int(min(most, uint32(d.config.MaxPorts)))
	type pair struct{ r, t *virtio.DriverQueue }
	pairs := make([]pair, n)
	for id := range pairs {
		rx, tx := portQueues(id)
		if pairs[id].r, pairs[id].t, err = d.pair(ctx, rx, tx); err != nil {
			return nil, fmt.Errorf("queues of port %d: %w", id, err)
		}
	}
	// A device may drop messages that it has no buffer for.
	control := max(d.config.Entries, int(min(controlMost, d.d.Device().Sections().ReadWrite.Size()/16/bufferSize)))
	r, err := d.d.SetUpQueue(ctx, 2, control)
	if err != nil {
		return nil, fmt.Errorf("control queues: %w", err)
	}
	t, err := d.d.SetUpQueue(ctx, 3, d.config.Entries)
	if err != nil {
		return nil, fmt.Errorf("control queues: %w", err)
	}
	if err := d.d.Start(ctx); err != nil {
		return nil, err
	}
	size := d.dataSize(n)
	s, f, err := d.ends(r, t, bufferSize, controlSize)
	if err != nil {
		return nil, fmt.Errorf("control queues: %w", err)
	}
	g := d.group
	m := &multiport{table: &d.table, config: d.config, sizes: d.d.Features().Has(featureSize),
		most: most, teller: newWaker(g.ctx), slots: make([]slot, n)}
	m.join = func(id uint32) (*lane, error) {
		s, r, err := d.ends(pairs[id].r, pairs[id].t, size, size)
		if err != nil {
			return nil, err
		}
		l := newLane(g.ctx, m.teller)
		l.busy = s.busy
		g.run(func(ctx context.Context) error { return l.send(ctx, s) })
		g.run(func(ctx context.Context) error { return l.receive(ctx, r) })
		return l, nil
	}
	d.tellBy(m.teller)
	g.run(func(ctx context.Context) error { return m.tell(ctx, s) })
	g.run(func(ctx context.Context) error { return m.hear(ctx, f) })
	return g.wait, nil
}
