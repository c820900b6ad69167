package console

import (
	"context"
	"io"
)

// Control is the control messages of a side without queues, for FuzzControl.
type Control struct {
	*table
	multiport *multiport
	original  *original
	w         Wire
}

// NewControl makes a side with so many ports.
func NewControl(w Wire, device bool, ports int) *Control {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	t := &table{ports: map[uint32]*Port{}}
	c := &Control{table: t, w: w}
	config := Config{Wire: w, MaxPorts: ports, Limit: 4096}
	if device || w == Original {
		for id := range ports - 1 {
			p := config.port(uint32(id), w, device)
			p.name, p.console = "name", id%2 == 0
			t.ports[p.id] = p
		}
	}
	if w == Original {
		c.original = newOriginal(&group{ctx: ctx}, t, device, ports)
		return c
	}
	m := &multiport{table: t, config: config, device: device, sizes: true, most: uint32(ports), teller: newWaker(ctx), slots: make([]slot, ports)}
	m.join = func(uint32) (*lane, error) { return newLane(ctx, m.teller), nil }
	for id := range m.slots {
		if device {
			m.slots[id].lane = newLane(ctx, m.teller)
		}
	}
	c.multiport = m
	return c
}

// Arrive takes a buffer.
func (c *Control) Arrive(b io.Reader, whole []byte) error {
	if c.multiport != nil {
		return c.multiport.handle(whole)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // where it would wait for room
	return c.original.arrive(ctx, b, make([]byte, bufferSize))
}

// Answer is the next message to send, nil if there is none.
func (c *Control) Answer() []byte {
	if c.multiport != nil {
		for i := range c.multiport.slots {
			if l := c.multiport.slots[i].lane; l != nil {
				l.drained()
			}
		}
		if m, ok := c.multiport.message(); ok {
			return m.bytes()
		}
		return nil
	}
	c.original.mu.Lock()
	defer c.original.mu.Unlock()
	c.original.adopt()
	if m, ok := c.original.message(); ok {
		return m.original()
	}
	return nil
}
