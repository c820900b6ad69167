package console

import (
	"cmp"
	"context"
	"slices"
	"sync"
)

// table is the ports of one side.
type table struct {
	mu sync.Mutex
	// Below: with mu held. That of a port may be taken as well, but not the
	// other way round.
	ports   map[uint32]*Port
	changed chan struct{}
	teller  *waker // of the session
	stats   Stats
	last    error
}

// Stats is what was counted.
type Stats struct {
	Messages uint64 // control messages that arrived
	Dropped  uint64 // those of them, or pieces of data, that mean nothing
}

// Stats returns what was counted, and the last reason why something was
// dropped: a *[MessageError], or why the driver refused a port, such as a
// virtio.SpaceError.
func (t *table) Stats() (Stats, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stats, t.last
}

// count counts a message that arrived, and why it was dropped.
func (t *table) count(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stats.Messages++
	if err != nil {
		t.stats.Dropped++
		t.last = err
	}
}

// Ports are the ports there are, by number.
func (t *table) Ports() []*Port {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sorted()
}

func (t *table) sorted() []*Port {
	s := make([]*Port, 0, len(t.ports))
	for _, p := range t.ports {
		s = append(s, p)
	}
	slices.SortFunc(s, func(a, b *Port) int { return cmp.Compare(a.id, b.id) })
	return s
}

// Port is the port with a number, nil if there is none.
func (t *table) Port(id uint32) *Port {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ports[id]
}

// Lookup is the port with a name, the lowest one if there are several, and nil
// if there is none.
func (t *table) Lookup(name string) *Port {
	p, _ := t.lookup(name)
	return p
}

func (t *table) lookup(name string) (*Port, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.changed == nil {
		t.changed = make(chan struct{})
	}
	for _, p := range t.sorted() {
		if name != "" && p.Name() == name {
			return p, t.changed
		}
	}
	return nil, t.changed
}

// WaitPort waits for a port with a name.
func (t *table) WaitPort(ctx context.Context, name string) (*Port, error) {
	for {
		p, changed := t.lookup(name)
		if p != nil {
			return p, nil
		}
		if err := await(ctx, changed); err != nil {
			return nil, err
		}
	}
}

// Changes returns a channel that is closed when a port is added, removed, named,
// or said to be a console the next time.
func (t *table) Changes() <-chan struct{} {
	_, c := t.lookup("")
	return c
}

// change wakes who waits for the table. The caller holds mu.
func (t *table) change() {
	t.teller.wake()
	if t.changed != nil {
		close(t.changed)
		t.changed = nil
	}
}

func (t *table) changedNow() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.change()
}

// put adds a port. The caller holds mu.
func (t *table) put(p *Port) {
	t.ports[p.id] = p
	t.change()
}

// take removes a port.
func (t *table) take(p *Port, cause error) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ports[p.id] != p {
		return false
	}
	delete(t.ports, p.id)
	p.remove(cause)
	t.change()
	return true
}

// tellBy sets who is woken when there is something to tell.
func (t *table) tellBy(w *waker) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.teller = w
}
