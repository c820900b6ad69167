package link

import (
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/regs"
)

// TestReadsDoNotWait looks at states, and asks for doorbells, while the link is
// in the middle of interrupting its peers, which takes its lock.
func TestReadsDoNotWait(t *testing.T) {
	l := newLink(t, testConfig)
	if n := len(l.DoorbellFDs(100)); n != 12 {
		t.Fatalf("%d doorbells, want 12", n)
	}
	a, _ := attach(t, l)
	raised := false
	b, err := l.Attach(nil, raiseFunc(func(uint16) {
		raised = true
		if got := a.StateOf(0); got != 7 {
			t.Errorf("StateOf: got %d, want 7", got)
		}
		if got := a.Load(regs.State); got != 7 {
			t.Errorf("State: got %d, want 7", got)
		}
		if n := len(l.DoorbellFDs(100)); n != 12 {
			t.Errorf("%d doorbells, want 12", n)
		}
		a.SetDirect(0, true)
	}))
	if err != nil {
		t.Fatal(err)
	}
	b.Store(regs.InterruptControl, 1)
	a.Store(regs.State, 7)
	if !raised {
		t.Error("no interrupt")
	}
}

// TestDoorbellFDs: vector 0 of everybody comes first, up to the limit.
func TestDoorbellFDs(t *testing.T) {
	l := newLink(t, testConfig)
	all := l.DoorbellFDs(5)
	if len(all) != 5 {
		t.Fatalf("%d doorbells, want 5", len(all))
	}
	// The Doorbell register: the target in the upper half, the vector in the lower.
	for i, want := range []uint32{0, 1 << 16, 2 << 16, 1, 1<<16 | 1} {
		fd, err := l.DoorbellFD(uint16(want>>16), uint16(want))
		if err != nil || all[i].Value != want || all[i].FD != fd {
			t.Errorf("doorbell %d: got %+v, want value %#x and descriptor %d, %v", i, all[i], want, fd, err)
		}
	}
}

// TestTellTogether changes the states of many peers while the others are being
// told of the first change: they are told of all the rest at once.
func TestTellTogether(t *testing.T) {
	const n = 50
	l := newLink(t, Config{Peers: n + 2, Vectors: 1})
	first, _ := attach(t, l)
	begun, goOn := make(chan bool), make(chan bool)
	interrupts := 0
	watcher, err := l.Attach(nil, raiseFunc(func(uint16) {
		if interrupts++; interrupts == 1 {
			begun <- true
			<-goOn
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	watcher.Store(regs.InterruptControl, 1)
	var peers []*Peer
	for range n {
		p, _ := attach(t, l)
		peers = append(peers, p)
	}
	told := make(chan bool)
	change := func(p *Peer, v uint32) {
		p.Store(regs.State, v)
		told <- true
	}
	go change(first, 1)
	<-begun
	// All stand in line to tell of theirs.
	for _, p := range peers {
		go change(p, 1)
	}
	for inLine() < n {
		time.Sleep(time.Millisecond)
	}
	close(goOn)
	for range n + 1 {
		<-told
	}
	for _, p := range peers {
		if got := watcher.StateOf(p.ID()); got != 1 {
			t.Errorf("state of peer %d: got %d, want 1", p.ID(), got)
		}
	}
	if interrupts != 2 {
		t.Errorf("%d interrupts, want 1 for the first change and 1 for the %d others", interrupts, n)
	}
}

// TestTellGivesWay lets a peer join while a thousand others are being told of a
// state: it need not wait for the last of them.
func TestTellGivesWay(t *testing.T) {
	const n = 1000
	l := newLink(t, Config{Peers: n + 2, Vectors: 1})
	var joined atomic.Bool
	start := make(chan bool, 1)
	late := 0
	for range n {
		p, err := l.Attach(nil, raiseFunc(func(uint16) {
			if joined.Load() {
				return
			}
			late++
			select {
			case start <- true:
			default:
			}
			time.Sleep(time.Millisecond) // what it costs on a busy machine
		}))
		if err != nil {
			t.Fatal(err)
		}
		p.Store(regs.InterruptControl, 1)
	}
	changer, _ := attach(t, l)
	done := make(chan error)
	go func() {
		<-start
		_, err := l.Attach(nil, &recorder{})
		joined.Store(true)
		done <- err
	}()
	changer.Store(regs.State, 1)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if late == n {
		t.Errorf("it joined when all %d others had been interrupted", n)
	}
}

// inLine counts the goroutines that wait for a mutex in Peer.Store.
func inLine() (n int) {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for goroutine := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(goroutine, "sync.Mutex.Lock") && strings.Contains(goroutine, "link.(*Peer).Store") {
			n++
		}
	}
	return n
}
