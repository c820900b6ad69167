package stream

import (
	"testing"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
)

// TestScanBudget has a peer of 65,536 slots overrun its ring of events: a look
// at all of them takes turns with everything else.
func TestScanBudget(t *testing.T) {
	devices := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Output: 64 << 20})
	var eps [2]*Endpoint
	for i := range eps {
		var err error
		if eps[i], err = New(devices[i], Config{Ring: minRing}); err != nil {
			t.Fatal(err)
		}
		defer eps[i].Close()
	}
	ep := eps[0]
	ep.mu.Lock()
	defer ep.mu.Unlock()
	r, err := ep.remote(1)
	if err != nil {
		t.Fatal(err)
	}
	for r.unseen > 0 {
		ep.pollLocked()
	}
	const polls = 10
	for range polls {
		eps[1].count.Store(0, eps[1].count.Load(0)+2*r.geo.events)
		before := r.next
		ep.pollLocked()
		if n := (r.next - before) % r.geo.slots; n > scanBudget {
			t.Fatalf("%d slots in one poll, of %d", n, r.geo.slots)
		}
	}
	// Each slot had its turn, however often the counter jumped.
	seen := uint32(polls * scanBudget)
	for ; r.unseen > 0; seen += scanBudget {
		ep.pollLocked()
	}
	if seen < r.geo.slots {
		t.Errorf("%d slots were looked at, of %d", seen, r.geo.slots)
	}
}
