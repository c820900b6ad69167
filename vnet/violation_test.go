package vnet_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// violated checks an error, that the link was reset for it, and that it works
// again as soon as the peer has walked through its states.
func violated(t testing.TB, l *vnet.Link, r *raw, err error, field string, value uint64) {
	t.Helper()
	var v *vnet.ViolationError
	if !errors.As(err, &v) || v.Peer != 1 || !strings.Contains(v.Field, field) || v.Value != value || v.Bound == "" {
		t.Fatalf("%v, want a violation of %q by %#x", err, field, value)
	}
	if r.state() != 0 || l.Carrier() {
		t.Errorf("state %d, carrier %v after a violation", r.state(), l.Carrier())
	}
	if err := l.Send(t.Context(), make([]byte, 60)); !errors.Is(err, vnet.ErrNoCarrier) {
		t.Errorf("sent while it is reset: %v", err)
	}
	s := l.Stats()
	if n := s.Violations.AvailIndex + s.Violations.UsedIndex + s.Violations.UsedID + s.Violations.UsedLength; n != s.Resets.Violation || n == 0 || s.LastViolation != v.Error() {
		t.Errorf("%+v", s)
	}
	r.start()
	carrier(t, true, l)
	works(t, l, r)
}

// works exchanges more frames than the smallest queue has entries.
func works(t testing.TB, l *vnet.Link, r *raw) {
	t.Helper()
	for i := range 40 {
		if err := l.Send(t.Context(), frame(60, i)); err != nil {
			t.Fatal(err)
		}
		id, f := r.receive()
		if string(f) != string(frame(60, i)) {
			t.Fatal(f)
		}
		r.complete(uint32(id), 1)
		r.send(f)
		p := make([]byte, vnet.MaxFrame)
		if n, err := l.Receive(t.Context(), p); n != 60 || err != nil {
			t.Fatal(n, err)
		}
	}
}

// TestAvailIndex says that there are more frames than the queue has entries, or
// fewer than there were, with indexes before and behind their wrap. (All values
// are in TestIndexes.)
func TestAvailIndex(t *testing.T) {
	for _, sent := range []uint16{0, 40, 65536 - 7} {
		for _, ahead := range []uint16{0, 32, 33, 32768, 65535} {
			l, r := against(t, 0x1000, vnet.Config{})
			p := make([]byte, vnet.MaxFrame)
			for from := sent; r.sent < uint64(from); {
				r.publish(0) // nothing: it is dropped
				if r.sent%32 == 0 || r.sent == uint64(from) {
					l.Receive(canceled(), p)
				}
			}
			index := sent + ahead
			put16(r.own, r.avail+2, index)
			_, err := l.Receive(canceled(), p)
			if ahead <= 32 {
				if !errors.Is(err, context.Canceled) || l.Stats().Received.Dropped() != uint64(sent)+uint64(ahead) {
					t.Errorf("%d behind %d: %v", index, sent, err)
				}
				continue
			}
			violated(t, l, r, err, "available", uint64(index))
		}
	}
}

// TestCompletions returns what was not sent, or not now, or not so.
func TestCompletions(t *testing.T) {
	for _, c := range []struct {
		name         string
		id, n, ahead uint32 // the second entry; how far the index goes
		field        string
		value        uint64
	}{
		{"again", 0, 1, 2, "descriptor", 0},
		{"the third one", 2, 1, 2, "descriptor", 2},
		{"n", 32, 1, 2, "descriptor", 32},
		{"65537", 65537, 1, 2, "descriptor", 65537},
		{"2^32-1", 1<<32 - 1, 1, 2, "descriptor", 1<<32 - 1},
		{"no length", 1, 0, 2, "length", 0},
		{"its length", 1, 60, 2, "length", 60},
		{"65537 bytes", 1, 65537, 2, "length", 65537},
		{"2^31+1 bytes", 1, 1<<31 + 1, 2, "length", 1<<31 + 1},
		{"more than were sent", 1, 1, 40, "index", 40},
		{"one less", 1, 1, 65535, "index", 65535},
		{"half of all", 1, 1, 32768, "index", 32768},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, r := against(t, 0x1000, vnet.Config{MTU: 68})
			for i := range 5 {
				if err := l.Send(canceled(), frame(60, i)); err != nil {
					t.Fatal(err)
				}
			}
			for i := range uint64(5) {
				put32(r.own, r.used+4+8*i, uint32(i))
				put32(r.own, r.used+8+8*i, 1)
			}
			put32(r.own, r.used+4+8, c.id)
			put32(r.own, r.used+8+8, c.n)
			put16(r.own, r.used+2, uint16(c.ahead))
			var err error
			for i := 0; err == nil; i++ {
				err = l.Send(canceled(), frame(60, i))
			}
			violated(t, l, r, err, c.field, c.value)
		})
	}
}

// TestViolationWhileWaiting violates while somebody sleeps: in each direction
// the sleeper hears of it.
func TestViolationWhileWaiting(t *testing.T) {
	l, r := against(t, 0x1000, vnet.Config{MTU: 68})
	result := make(chan error, 1)
	go func() {
		_, err := l.Receive(t.Context(), make([]byte, vnet.MaxFrame))
		result <- err
	}()
	put16(r.own, r.avail+2, 40000)
	r.ring()
	violated(t, l, r, <-result, "available", 40000)
	go func() {
		var err error
		for err == nil {
			err = l.Send(t.Context(), frame(60, 0))
		}
		result <- err
	}()
	until(t, "somebody waits for room", func() bool { return l.Stats().Sent.Waits > 0 })
	put16(r.own, r.used+2, 40000)
	r.ring()
	violated(t, l, r, <-result, "used", 40000)
}

// TestOneResetIsEnough has both directions find a violation: the one that comes
// second, when all is well again, resets nothing.
func TestOneResetIsEnough(t *testing.T) {
	l, r := against(t, 0x1000, vnet.Config{})
	l.ViolatedBefore()
	if s := l.Stats(); !s.Carrier || s.Resets != (vnet.ResetStats{}) || s.Violations.UsedID != 1 {
		t.Errorf("%+v", s)
	}
	works(t, l, r)
}
