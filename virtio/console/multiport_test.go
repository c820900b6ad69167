package console

import "testing"

// A port number is used again only when the queue holds nothing any more that
// was meant for the port before.
func TestNumberIsUsedAgainWhenDrained(t *testing.T) {
	expect := func(m *multiport, want ...uint16) {
		t.Helper()
		for _, w := range want {
			if msg, ok := m.message(); !ok || msg.event != w {
				t.Fatalf("event %d (%t), want %d", msg.event, ok, w)
			}
		}
		if msg, ok := m.message(); ok {
			t.Fatalf("event %d, want none", msg.event)
		}
	}
	handle := func(m *multiport, event uint16) {
		t.Helper()
		if err := m.handle(message{1, event, 1, nil}.bytes()); err != nil {
			t.Fatal(err)
		}
	}
	add := func(c *Control) *Port {
		p := c.multiport.config.port(1, Multiport, true)
		c.mu.Lock()
		c.put(p)
		c.mu.Unlock()
		return p
	}

	c := NewControl(Multiport, true, 2)
	m := c.multiport
	handle(m, eventDeviceReady)
	c.take(c.Port(0), ErrRemoved)
	p := add(c)
	expect(m, eventPortAdd)
	handle(m, eventPortReady)
	c.take(p, ErrRemoved)
	add(c)
	expect(m, eventPortRemove)
	m.slots[1].lane.drained()
	expect(m, eventPortAdd)

	m = NewControl(Multiport, false, 2).multiport
	expect(m, eventDeviceReady)
	handle(m, eventPortAdd)
	expect(m, eventPortReady)
	handle(m, eventPortRemove)
	handle(m, eventPortAdd)
	expect(m)
	m.slots[1].lane.drained()
	expect(m, eventPortReady)
}
