package link

import (
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// recorder is a peer's interrupt input.
type recorder struct {
	mu  sync.Mutex
	got []uint16
}

func (r *recorder) Raise(vector uint16) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, vector)
}

// take returns what was raised since the last call.
func (r *recorder) take() []uint16 {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.got
	r.got = nil
	return got
}

var testConfig = Config{Peers: 3, Vectors: 4, ReadWrite: 4096, Output: 8192}

func newLink(t *testing.T, c Config) *Link {
	t.Helper()
	l, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func attach(t *testing.T, l *Link) (*Peer, *recorder) {
	t.Helper()
	r := &recorder{}
	p, err := l.Attach(nil, r)
	if err != nil {
		t.Fatal(err)
	}
	return p, r
}

// table reads an entry of the State Table as a peer sees it: in the memory.
func table(t *testing.T, l *Link, id uint64) uint32 {
	t.Helper()
	v, err := l.Memory().ReadOnly("table", 0, l.Layout().Total())
	if err != nil {
		t.Fatal(err)
	}
	x, err := v.Load32(4 * id)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func TestRegistersAfterAttach(t *testing.T) {
	l := newLink(t, testConfig)
	attach(t, l)
	p, _ := attach(t, l)
	for r, want := range map[regs.Register]uint32{
		0x00: 1, 0x04: 3, 0x08: 0, 0x0c: 0, 0x10: 0, 0x14: 0, 0xffc: 0,
	} {
		if got := p.Load(r); got != want {
			t.Errorf("register %#x: got %d, want %d", uint16(r), got, want)
		}
	}
	// Read-only registers, and what is no register.
	for _, r := range []regs.Register{0x00, 0x04, 0x14, 0xffc} {
		before := p.Load(r)
		p.Store(r, 0xffffffff)
		if got := p.Load(r); got != before {
			t.Errorf("register %#x changed from %d to %d", uint16(r), before, got)
		}
	}
	// Bits 1 to 31 of Interrupt Control read 0.
	p.Store(0x08, 0xffffffff)
	if got := p.Load(0x08); got != 1 {
		t.Errorf("Interrupt Control: got %#x, want 1", got)
	}
	p.Store(0x08, 0xfffffffe)
	if got := p.Load(0x08); got != 0 {
		t.Errorf("Interrupt Control: got %#x, want 0", got)
	}
}

func TestStateChange(t *testing.T) {
	l := newLink(t, testConfig)
	a, ra := attach(t, l)
	b, rb := attach(t, l)
	_, rc := attach(t, l) // interrupts disabled
	a.Store(regs.InterruptControl, 1)
	b.Store(regs.InterruptControl, 1)

	a.Store(regs.State, 7)
	if got := table(t, l, 0); got != 7 {
		t.Errorf("table entry: got %d, want 7", got)
	}
	if got := a.Load(regs.State); got != 7 {
		t.Errorf("State: got %d, want 7", got)
	}
	if diff := cmp.Diff([][]uint16{nil, {0}, nil}, [][]uint16{ra.take(), rb.take(), rc.take()}); diff != "" {
		t.Errorf("interrupts of a change (-want +got):\n%s", diff)
	}

	// The same value: the entry is written again, nobody is interrupted.
	v, _ := l.Memory().ReadWrite("table", 0, 4096)
	v.Store32(0, 99) // a hostile peer
	a.Store(regs.State, 7)
	if got := table(t, l, 0); got != 7 {
		t.Errorf("table entry after the same value: got %d, want 7", got)
	}
	if got := rb.take(); got != nil {
		t.Errorf("the same value interrupted on %v", got)
	}
	// What is in the table is never taken for the state.
	v.Store32(0, 99)
	if got := b.StateOf(0); got != 7 {
		t.Errorf("StateOf: got %d, want 7", got)
	}
}

// TestStateOrder checks that the entry is in the table when the interrupt
// arrives.
func TestStateOrder(t *testing.T) {
	l := newLink(t, testConfig)
	a, _ := attach(t, l)
	var seen uint32
	b, err := l.Attach(nil, raiseFunc(func(uint16) { seen = table(t, l, 0) }))
	if err != nil {
		t.Fatal(err)
	}
	b.Store(regs.InterruptControl, 1)
	a.Store(regs.State, 5)
	if seen != 5 {
		t.Errorf("the entry was %d when the interrupt arrived, want 5", seen)
	}
}

type raiseFunc func(uint16)

func (f raiseFunc) Raise(v uint16) { f(v) }

func TestDoorbell(t *testing.T) {
	l := newLink(t, testConfig)
	a, ra := attach(t, l)
	b, rb := attach(t, l)
	ring := func(v uint32) [][]uint16 {
		a.Store(regs.DoorbellRegister, v)
		return [][]uint16{ra.take(), rb.take()}
	}
	if got := ring(1<<16 | 2); rb.got != nil || got[1] != nil {
		t.Errorf("interrupts disabled: got %v", got)
	}
	a.Store(regs.InterruptControl, 1)
	b.Store(regs.InterruptControl, 1)
	none := [][]uint16{nil, nil}
	for _, c := range []struct {
		name  string
		value uint32
		want  [][]uint16
	}{
		{"vector 2 of peer 1", 1<<16 | 2, [][]uint16{nil, {2}}},
		{"the last vector", 1<<16 | 3, [][]uint16{nil, {3}}},
		{"oneself", 0<<16 | 1, [][]uint16{{1}, nil}},
		{"a vector too high", 1<<16 | 4, none},
		{"a vector whose low byte is valid", 1<<16 | 0x101, none},
		{"an absent peer", 2 << 16, none},
		{"a peer too high", 3 << 16, none},
		{"the highest peer and vector", 0xffffffff, none},
	} {
		if diff := cmp.Diff(c.want, ring(c.value)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

func TestOneShot(t *testing.T) {
	l := newLink(t, testConfig)
	a, ra := attach(t, l)
	b, _ := attach(t, l)
	a.SetOneShot(true)
	a.Store(regs.InterruptControl, 1)
	for v := range uint32(4) {
		b.Store(regs.DoorbellRegister, v)
	}
	b.Store(regs.State, 1)
	if diff := cmp.Diff([]uint16{0}, ra.take()); diff != "" {
		t.Errorf("interrupts of one arm (-want +got):\n%s", diff)
	}
	if got := a.Load(regs.InterruptControl); got != 0 {
		t.Errorf("Interrupt Control after delivery: got %d, want 0", got)
	}
	// Arming does not deliver what was discarded.
	a.Store(regs.InterruptControl, 1)
	if got := ra.take(); got != nil {
		t.Errorf("arming delivered %v", got)
	}
	b.Store(regs.DoorbellRegister, 3)
	if diff := cmp.Diff([]uint16{3}, ra.take()); diff != "" {
		t.Errorf("after arming again (-want +got):\n%s", diff)
	}
	// Off again: the enable lasts.
	a.SetOneShot(false)
	a.Store(regs.InterruptControl, 1)
	b.Store(regs.DoorbellRegister, 1)
	b.Store(regs.DoorbellRegister, 1)
	if diff := cmp.Diff([]uint16{1, 1}, ra.take()); diff != "" {
		t.Errorf("without one-shot (-want +got):\n%s", diff)
	}
}

func TestResetAndDetach(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(*Peer)
	}{{"reset", (*Peer).Reset}, {"detach", (*Peer).Detach}} {
		t.Run(c.name, func(t *testing.T) {
			l := newLink(t, testConfig)
			a, ra := attach(t, l)
			b, rb := attach(t, l)
			b.Store(regs.InterruptControl, 1)
			a.SetOneShot(true)
			a.Store(regs.InterruptControl, 1)
			a.Store(regs.State, 3)
			rb.take()
			c.end(a)
			if got := table(t, l, 0); got != 0 {
				t.Errorf("table entry: got %d, want 0", got)
			}
			if diff := cmp.Diff([]uint16{0}, rb.take()); diff != "" {
				t.Errorf("the other peer (-want +got):\n%s", diff)
			}
			if s := l.Snapshot().Peers[0]; s.Enabled || s.OneShot || s.State != 0 {
				t.Errorf("state afterwards: %+v", s)
			}
			b.Store(regs.DoorbellRegister, 0<<16|1)
			if got := ra.take(); got != nil {
				t.Errorf("interrupted afterwards on %v", got)
			}
		})
	}
	t.Run("state was 0", func(t *testing.T) {
		l := newLink(t, testConfig)
		a, _ := attach(t, l)
		b, rb := attach(t, l)
		b.Store(regs.InterruptControl, 1)
		a.Detach()
		if got := rb.take(); got != nil {
			t.Errorf("departure of a peer with state 0 interrupted on %v", got)
		}
	})
}

func TestAttach(t *testing.T) {
	l := newLink(t, testConfig)
	var peers []*Peer
	for want := range uint32(3) {
		p, _ := attach(t, l)
		if p.ID() != want {
			t.Errorf("got ID %d, want %d", p.ID(), want)
		}
		peers = append(peers, p)
	}
	if _, err := l.Attach(nil, &recorder{}); !errors.Is(err, ErrFull) {
		t.Errorf("one peer too many: got %v, want ErrFull", err)
	}
	peers[1].Detach()
	if p, _ := attach(t, l); p.ID() != 1 {
		t.Errorf("got ID %d, want the free one, 1", p.ID())
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		name   string
		config Config
		field  string
	}{
		{"one peer", Config{Peers: 1, Vectors: 1}, "Maximum Peers"},
		{"too many peers", Config{Peers: 65537, Vectors: 1}, "Maximum Peers"},
		{"State Table too small", Config{Peers: 1025, Vectors: 1, StateTable: 4096}, "State Table size"},
		{"State Table of 4 GiB", Config{Peers: 2, Vectors: 1, StateTable: 1 << 32}, "State Table size"},
		{"R/W not of pages", Config{Peers: 2, Vectors: 1, ReadWrite: 100}, "R/W section size"},
		{"output not of pages", Config{Peers: 2, Vectors: 1, Output: 100}, "output section size"},
		{"overflow", Config{Peers: 2, Vectors: 1, Output: 1 << 63}, "output section size"},
	} {
		var e *shmem.LayoutError
		if _, err := New(c.config); !errors.As(err, &e) || e.Field != c.field {
			t.Errorf("%s: got %v, want an error about %s", c.name, err, c.field)
		}
	}
	for _, v := range []uint16{0, 2049} {
		if _, err := New(Config{Peers: 2, Vectors: v}); err == nil {
			t.Errorf("%d vectors accepted", v)
		}
	}
	l := newLink(t, Config{Peers: 1025, Vectors: 1})
	if got := l.Config().StateTable; got != 8192 {
		t.Errorf("State Table of 1025 peers: got %d, want 8192", got)
	}
}

func TestMemoryIsSealedAndZero(t *testing.T) {
	l := newLink(t, testConfig)
	const size = 4096 + 4096 + 3*8192
	if err := unix.Ftruncate(l.FD(), size-4096); err != unix.EPERM {
		t.Errorf("shrink: got %v, want EPERM", err)
	}
	if err := unix.Ftruncate(l.FD(), size+4096); err != unix.EPERM {
		t.Errorf("grow: got %v, want EPERM", err)
	}
	if _, err := unix.FcntlInt(uintptr(l.FD()), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != unix.EPERM {
		t.Errorf("another seal: got %v, want EPERM", err)
	}
	b := make([]byte, size+1)
	n, err := unix.Pread(l.FD(), b, 0)
	if err != nil || n != size {
		t.Fatalf("read: %d bytes, %v; want %d", n, err, size)
	}
	if slices.Max(b) != 0 {
		t.Error("fresh memory is not zeroed")
	}
}

func TestSnapshotIsSerialisable(t *testing.T) {
	l := newLink(t, testConfig)
	a, _ := attach(t, l)
	a.SetOneShot(true)
	a.Store(regs.InterruptControl, 1)
	a.Store(regs.State, 4)
	want := l.Snapshot()
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got State
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("state changed on the way (-want +got):\n%s", diff)
	}
	a.Store(regs.State, 5)
	if want.Peers[0].State != 4 {
		t.Error("a snapshot changed after it was taken")
	}
}

// waitFor waits until a recorder has seen something.
func (r *recorder) waitFor(t *testing.T, l *Link, ok func([]uint16) bool) {
	t.Helper()
	for range 1 << 20 {
		r.mu.Lock()
		done := ok(r.got)
		r.mu.Unlock()
		if done {
			return
		}
		unix.Nanosleep(&unix.Timespec{Nsec: 1e5}, nil)
	}
	t.Fatal("nothing arrived")
}

func TestDoorbellFD(t *testing.T) {
	l := newLink(t, testConfig)
	a, ra := attach(t, l)
	fd, err := l.DoorbellFD(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	again, err := l.DoorbellFD(0, 2)
	if err != nil || again != fd {
		t.Errorf("asked again: got %d, %v; want %d", again, err, fd)
	}
	a.Store(regs.InterruptControl, 1)
	evfd.Signal(fd)
	ra.waitFor(t, l, func(got []uint16) bool { return slices.Equal(got, []uint16{2}) })

	// A direct target reads its eventfd itself, and knows it when it sees it.
	dup, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)
	if !a.IsDoorbell(2, dup) {
		t.Error("a duplicate of the doorbell eventfd is not recognised")
	}
	other, _ := evfd.New()
	defer unix.Close(other)
	if a.IsDoorbell(2, other) || a.IsDoorbell(1, dup) {
		t.Error("another eventfd is taken for the doorbell eventfd")
	}
	a.SetDirect(2, true)
	ra.take()
	evfd.Signal(dup)
	if !evfd.Drain(dup) {
		t.Error("a direct target's event was taken by the link")
	}

	// When it leaves, what it left in the eventfd is dropped, and the next
	// peer under its ID is rung through the link.
	evfd.Signal(dup)
	a.Detach()
	b, rb := attach(t, l)
	if b.ID() != 0 {
		t.Fatalf("got ID %d, want 0", b.ID())
	}
	b.Store(regs.InterruptControl, 1)
	evfd.Signal(dup)
	rb.waitFor(t, l, func(got []uint16) bool { return len(got) > 0 })
	if got := rb.take(); !slices.Equal(got, []uint16{2}) {
		t.Errorf("got %v, want one interrupt on vector 2", got)
	}
}

// TestModel compares the link with a model made from the specification's
// sentences, over random sequences of calls.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const n = 3
		l, err := New(Config{Peers: n, Vectors: 2})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		type model struct {
			present, enabled, oneShot bool
			state                     uint32
			got                       []uint16
		}
		var m [n]model
		var peers [n]*Peer
		var rec [n]*recorder
		deliver := func(id int, v uint16) {
			if p := &m[id]; p.present && p.enabled {
				p.enabled = !p.oneShot
				p.got = append(p.got, v)
			}
		}
		setState := func(id int, v uint32) {
			old := m[id].state
			m[id].state = v
			for o := range m {
				if v != old && o != id {
					deliver(o, 0)
				}
			}
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			id := rapid.IntRange(0, n-1).Draw(t, "peer")
			p := peers[id]
			if p == nil {
				for free := range m {
					if !m[free].present {
						id = free
						break
					}
				}
				rec[id] = &recorder{}
				if peers[id], err = l.Attach(nil, rec[id]); err != nil || peers[id].ID() != uint32(id) {
					t.Fatalf("attach: %v", err)
				}
				m[id] = model{present: true}
				continue
			}
			switch rapid.IntRange(0, 5).Draw(t, "call") {
			case 0:
				v := rapid.Uint32Range(0, 3).Draw(t, "state")
				p.Store(regs.State, v)
				setState(id, v)
			case 1:
				v := rapid.Uint32Range(0, 3).Draw(t, "control")
				p.Store(regs.InterruptControl, v)
				m[id].enabled = v&1 != 0
			case 2:
				on := rapid.Bool().Draw(t, "one-shot")
				p.SetOneShot(on)
				m[id].oneShot = on
			case 3:
				target := rapid.IntRange(0, n+1).Draw(t, "target")
				v := rapid.Uint16Range(0, 3).Draw(t, "vector")
				p.Store(regs.DoorbellRegister, uint32(target)<<16|uint32(v))
				if target < n && v < 2 {
					deliver(target, v)
				}
			case 4:
				p.Reset()
				m[id].enabled, m[id].oneShot = false, false
				setState(id, 0)
			case 5:
				p.Detach()
				m[id].enabled, m[id].oneShot = false, false
				setState(id, 0)
				m[id].present, peers[id] = false, nil
			}
			for o := range m {
				if rec[o] != nil && !slices.Equal(rec[o].got, m[o].got) {
					t.Fatalf("peer %d: interrupts %v, want %v", o, rec[o].got, m[o].got)
				}
				s := l.Snapshot().Peers[o]
				want := PeerState{Present: m[o].present, State: m[o].state, Enabled: m[o].enabled, OneShot: m[o].oneShot}
				if s != want {
					t.Fatalf("peer %d: %+v, want %+v", o, s, want)
				}
			}
		}
	})
}
