package link

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/regs"
)

func pin(id uint32) *uint32 { return &id }

func TestAttachPinned(t *testing.T) {
	l := newLink(t, testConfig)
	p, err := l.Attach(pin(1), &recorder{})
	if err != nil || p.ID() != 1 {
		t.Fatalf("ID %d, %v", p.ID(), err)
	}
	if _, err := l.Attach(pin(1), &recorder{}); !errors.Is(err, ErrTaken) {
		t.Errorf("a second one: got %v, want ErrTaken", err)
	}
	if _, err := l.Attach(pin(3), &recorder{}); err == nil || errors.Is(err, ErrTaken) {
		t.Errorf("an ID that does not exist: got %v", err)
	}
	for _, want := range []uint32{0, 2} {
		if p, _ := attach(t, l); p.ID() != want {
			t.Errorf("the lowest free ID: got %d, want %d", p.ID(), want)
		}
	}
	p.Detach()
	if p, err = l.Attach(pin(1), &recorder{}); err != nil || p.ID() != 1 {
		t.Errorf("again: %v", err)
	}
}

// observed is an observer that writes down what it is told.
type observed struct{ told []string }

func (o *observed) Joined(id uint32, others []uint32) {
	o.told = append(o.told, fmt.Sprintf("%d joined %d", id, others))
}
func (o *observed) Left(id uint32) { o.told = append(o.told, fmt.Sprintf("%d left", id)) }
func (o *observed) take() []string {
	told := o.told
	o.told = nil
	return told
}

func TestObserve(t *testing.T) {
	l := newLink(t, testConfig)
	o := &observed{}
	first, _ := attach(t, l)
	stop, err := l.Observe(o)
	if err != nil {
		t.Fatal(err)
	}
	// The doorbells of those who are there, and of those who come, exist.
	last, err := l.Attach(pin(2), &recorder{})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(l.doorbell.Load().fds); n != 2*4 {
		t.Errorf("%d doorbell eventfds, want those of 2 peers", n)
	}
	middle, err := l.AttachExternal(nil, func(id uint32) error {
		if told := o.take(); !slices.Equal(told, []string{"2 joined [0]"}) || id != 1 {
			t.Errorf("ID %d is greeted after %q", id, told)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// Nobody hears of one that failed, and its ID is free.
	middle.Detach()
	oops := errors.New("oops")
	if _, err := l.AttachExternal(nil, func(uint32) error { return oops }); !errors.Is(err, oops) {
		t.Errorf("got %v, want the error of greet", err)
	}
	if middle, err = l.AttachExternal(nil, func(uint32) error { return nil }); err != nil || middle.ID() != 1 {
		t.Fatalf("%v", err)
	}
	first.Detach()
	if told, want := o.take(), []string{"1 joined [0 2]", "1 left", "1 joined [0 2]", "0 left"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	stop()
	last.Detach()
	if told := o.take(); told != nil {
		t.Errorf("told %q after the end", told)
	}
}

// TestObserverSeesStateZero: a peer's entry is cleared before anybody is told
// that it left.
func TestObserverSeesStateZero(t *testing.T) {
	l := newLink(t, testConfig)
	p, err := l.AttachExternal(nil, func(uint32) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	v, _ := l.Memory().ReadWrite("table", 0, 4096)
	v.Store32(0, 99)
	seen := uint32(1)
	l.Observe(leftFunc(func(id uint32) { seen, _ = v.ReadOnly().Load32(0) }))
	p.Detach()
	if seen != 0 {
		t.Errorf("the entry was %d when the departure was told", seen)
	}
}

type leftFunc func(uint32)

func (f leftFunc) Joined(uint32, []uint32) {}
func (f leftFunc) Left(id uint32)          { f(id) }

func TestExternal(t *testing.T) {
	l := newLink(t, testConfig)
	v, _ := l.Memory().ReadWrite("table", 0, 4096)
	v.Store32(0, 99) // left by a hostile peer
	e, err := l.AttachExternal(nil, func(uint32) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	p, rec := attach(t, l)
	state := func() [2]uint32 { return [2]uint32{p.StateOf(0), l.Snapshot().Peers[0].State} }
	if got := state(); got != [2]uint32{} {
		t.Errorf("state of a new peer: %d", got)
	}
	v.Store32(0, 7) // its own write
	if got := state(); got != [2]uint32{7, 7} {
		t.Errorf("state: %d, want 7", got)
	}

	// It is raised by its doorbell eventfds, which the link does not read.
	var fds [4]int
	for i := range fds {
		if fds[i], err = l.DoorbellFD(0, uint16(i)); err != nil {
			t.Fatal(err)
		}
	}
	rung := func() (n [4]uint64) {
		for i, fd := range fds {
			n[i] = evfd.Take(fd)
		}
		return n
	}
	p.Store(regs.DoorbellRegister, 0<<16|2)
	p.Store(regs.DoorbellRegister, 0<<16|4) // no such vector
	p.Store(regs.State, 1)
	if got := rung(); got != [4]uint64{1, 0, 1, 0} {
		t.Errorf("rung: %d", got)
	}
	// A full counter in blocking mode stops nobody.
	if _, err := unix.Write(fds[1], []byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], false); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		p.Store(regs.DoorbellRegister, 0<<16|1)
	}

	// Its departure interrupts, though the link never saw a change.
	v.Store32(0, 0)
	p.Store(regs.InterruptControl, 1)
	rec.take()
	e.Detach()
	if got := rec.take(); !slices.Equal(got, []uint16{0}) {
		t.Errorf("its departure interrupted on %v, want vector 0", got)
	}

	// Whoever did not notice its end still reads its doorbells; the next peer
	// of the ID finds them empty.
	evfd.Signal(fds[3])
	runtime.Gosched()
	if evfd.Take(fds[3]) != 1 {
		t.Error("the link reads the doorbells of a peer that is gone")
	}
	evfd.Signal(fds[3])
	next, err := l.AttachExternal(nil, func(uint32) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if got := rung(); got != [4]uint64{} {
		t.Errorf("a new peer finds its doorbells rung: %d", got)
	}
	next.Detach()
	q, rec := attach(t, l)
	q.Store(regs.InterruptControl, 1)
	evfd.Signal(fds[3])
	rec.waitFor(t, l, func(got []uint16) bool { return slices.Equal(got, []uint16{3}) })
}

// TestManyPeers: what one peer does costs in proportion to the peers that are
// there, not to those that might be.
func TestManyPeers(t *testing.T) {
	l := newLink(t, Config{Peers: regs.PeersMax, Vectors: 1})
	if got := l.Layout().StateTable; got != 256<<10 {
		t.Errorf("State Table of %d bytes", got)
	}
	var peers []*Peer
	for range 1000 {
		p, _ := attach(t, l)
		p.Store(regs.InterruptControl, 1)
		peers = append(peers, p)
	}
	last, err := l.Attach(pin(regs.PeersMax-1), &recorder{})
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for i := range uint32(1000) {
		last.Store(regs.State, i+1)
	}
	t.Logf("a state change with 1000 others: %v", time.Since(begin)/1000)
	if got := table(t, l, regs.PeersMax-1); got != 1000 {
		t.Errorf("entry of the last peer: %d", got)
	}
	for _, p := range peers {
		p.Detach()
	}
	if p, _ := attach(t, l); p.ID() != 0 {
		t.Errorf("ID %d, want 0", p.ID())
	}
}

func BenchmarkState(b *testing.B) {
	for _, n := range []int{2, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			l, err := New(Config{Peers: regs.PeersMax, Vectors: 1})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			var p *Peer
			for range n {
				if p, err = l.Attach(nil, raiseFunc(func(uint16) {})); err != nil {
					b.Fatal(err)
				}
			}
			for i := range b.N {
				p.Store(regs.State, uint32(i))
			}
		})
	}
}
