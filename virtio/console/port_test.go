package console

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"
)

// A port without a wire.

func newPort() *Port { return &Port{limit: 10} }

func openPort(t *testing.T) *Port {
	p := newPort()
	if err := p.Open(); err != nil {
		t.Fatal(err)
	}
	p.attach(hooks{}, false)
	p.peerOpened()
	return p
}

// A reader that waits sees the end of file even if the other side opens the port
// again before the reader runs.
func TestReaderSeesEveryHangUp(t *testing.T) {
	p := openPort(t)
	p.mu.Lock()
	hangups := p.hangups
	p.mu.Unlock()
	p.peerLeaving()
	p.arrived(p.isLeaving())
	p.peerOpened()
	p.mu.Lock()
	_, err := p.read(make([]byte, 1), hangups)
	p.mu.Unlock()
	if err != io.EOF {
		t.Error(err)
	}
	if _, err := p.TryRead(make([]byte, 1)); err != ErrWouldBlock {
		t.Error(err)
	}
}

// A closing that was told of comes when what was on the way is here, and a look
// at the queue before it was told of does not count.
func TestLeaving(t *testing.T) {
	p := openPort(t)
	p.arrived(p.isLeaving()) // none
	before := p.isLeaving()
	p.peerLeaving()
	p.arrived(before)
	if !p.PeerOpen() {
		t.Fatal("closed before all was here")
	}
	p.receive([]byte("x"))
	p.arrived(p.isLeaving())
	if p.PeerOpen() || p.Ready() != In|HangUp {
		t.Errorf("ready for %b", p.Ready())
	}
	b := make([]byte, 2)
	if n, err := p.Read(b); n != 1 || err != nil {
		t.Error(n, err)
	}
	if n, err := p.Read(b); n != 0 || err != io.EOF {
		t.Error(n, err)
	}
}

// Data overtakes the message that the port is open, and no end of file follows
// it.
func TestDataBeforeOpening(t *testing.T) {
	p := newPort()
	if err := p.Open(); err != nil {
		t.Fatal(err)
	}
	p.receive([]byte("x"))
	b := make([]byte, 2)
	if n, err := p.Read(b); n != 1 || err != nil {
		t.Error(n, err)
	}
	if _, err := p.TryRead(b); err != ErrWouldBlock {
		t.Error(err)
	}
	p.peerOpened()
	p.peerLeaving()
	p.receive([]byte("x")) // still on the way
	p.arrived(p.isLeaving())
	if p.PeerOpen() || p.Unread() != 1 {
		t.Error("not closed behind the data")
	}
}

// All openings and closings since the last message are one message or two.
func TestTurns(t *testing.T) {
	for _, c := range []struct {
		open bool // at first, and told
		n    int  // turns since then
		want []bool
	}{
		{false, 0, nil}, {false, 1, []bool{true}}, {false, 2, []bool{true, false}},
		{false, 3, []bool{true}}, {false, 4, []bool{true, false}},
		{true, 0, nil}, {true, 1, []bool{false}}, {true, 2, []bool{false, true}}, {true, 3, []bool{false}},
	} {
		p := newPort()
		if c.open {
			p.Open()
		}
		told := told{turns: p.turns}
		for range c.n {
			if p.isOpen() {
				p.Close()
			} else {
				p.Open()
			}
		}
		var got []bool
		for {
			open, due := p.turn(&told)
			if !due {
				break
			}
			got = append(got, open)
		}
		if len(got) != len(c.want) || len(got) > 0 && (got[0] != c.want[0] || got[len(got)-1] != c.want[len(got)-1]) {
			t.Errorf("open %t, %d turns: told %t, want %t", c.open, c.n, got, c.want)
		}
	}
}

// What was written is told before the closing.
func TestCloseBehindData(t *testing.T) {
	p := openPort(t)
	told := told{turns: p.turns}
	if _, err := p.Write([]byte("abc")); err != nil {
		t.Fatal(err)
	}
	p.Close()
	if _, due := p.turn(&told); due {
		t.Error("closed before the data")
	}
	if n := p.pull(make([]byte, 10)); n != 3 {
		t.Fatal(n)
	}
	if _, due := p.turn(&told); due {
		t.Error("closed while the data is on its way")
	}
	p.sent()
	if open, due := p.turn(&told); open || !due {
		t.Error("not closed")
	}
}

// Where the other side is closed nothing waits for it.
func TestCloseDropsOutput(t *testing.T) {
	p := openPort(t)
	p.Write([]byte("abc"))
	p.peerLeaving()
	p.arrived(p.isLeaving())
	p.peerOpened()
	if p.hasOut() {
		t.Error("what was for the last one goes to the next")
	}
}

func TestWriteStates(t *testing.T) {
	p := openPort(t)
	big := make([]byte, outMost+1)
	if n, err := p.TryWrite(big); n != outMost || err != nil {
		t.Fatal(n, err)
	}
	for _, c := range []struct {
		what string
		do   func()
		want error
	}{
		{"full", func() {}, ErrWouldBlock},
		{"starved", p.starve, ErrStalled},
		{"pulled", func() { p.pull(make([]byte, 1)); p.sent() }, nil},
		{"throttled", func() { p.setThrottled(true) }, ErrThrottled},
		{"released", func() { p.setThrottled(false); p.pull(make([]byte, 1)); p.sent() }, nil},
		{"peer closed", func() { p.peerLeaving(); p.arrived(p.isLeaving()) }, ErrWouldBlock},
		{"own end closed", func() { p.Close() }, os.ErrClosed},
		{"removed", func() { p.remove(ErrRemoved) }, ErrRemoved},
	} {
		c.do()
		if _, err := p.TryWrite([]byte("x")); err != c.want {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
	}
}

// A write that waits ends when the port is closed, removed, or throttled by a
// message.
func TestWaitingWrite(t *testing.T) {
	for _, c := range []struct {
		do   func(p *Port)
		want error
	}{
		{func(p *Port) { p.Close() }, os.ErrClosed},
		{func(p *Port) { p.Close(); p.Open() }, os.ErrClosed},
		{func(p *Port) { p.remove(ErrRemoved) }, ErrRemoved},
		{func(p *Port) { p.setThrottled(true) }, ErrThrottled},
	} {
		p := openPort(t)
		p.Write(make([]byte, outMost))
		ended := make(chan error, 1)
		go func() {
			_, err := p.Write([]byte("x"))
			ended <- err
		}()
		for waiting := false; !waiting; {
			p.mu.Lock()
			waiting = p.changed != nil
			p.mu.Unlock()
		}
		c.do(p)
		if err := <-ended; !errors.Is(err, c.want) {
			t.Errorf("got %v, want %v", err, c.want)
		}
	}
}

// Unread data and its limit.
func TestUnread(t *testing.T) {
	p := openPort(t)
	if p.room(0) != 10 || p.room(5) != 15 || p.full() {
		t.Error("not empty")
	}
	p.receive([]byte("0123456789"))
	if p.room(0) != 0 || p.room(5) != 5 || !p.full() {
		t.Error("not full")
	}
	p.Close()
	if p.full() || p.room(0) != maxLimit || p.Dropped() != 10 {
		t.Error("full after a close")
	}
	p.receive([]byte("x")) // to nobody
	if p.Unread() != 0 {
		t.Error("kept")
	}
	p.SetCache(true)
	p.receive([]byte("0123456789"))
	if p.Unread() != 10 || !p.full() {
		t.Error("not kept")
	}
	p.Open()
	b := make([]byte, 20)
	if n, err := p.Read(b); n != 10 || err != nil || !bytes.Equal(b[:n], []byte("0123456789")) {
		t.Error(n, err)
	}
	p.Close()
	p.receive([]byte("x"))
	p.SetCache(false)
	if p.Unread() != 0 {
		t.Error("kept although it is not wanted")
	}
}

// A waker wakes whoever asked before, and only once.
func TestWaker(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	w := newWaker(ctx)
	a := w.next()
	if w.next() != a {
		t.Error("another one without a wake")
	}
	w.wake()
	w.wake()
	<-a.Done()
	b := w.next()
	if b.Err() != nil || !woken(ctx, a.Err()) {
		t.Error("woken too early, or not seen")
	}
	cancel()
	<-b.Done()
	if woken(ctx, b.Err()) {
		t.Error("the end is no waking")
	}
	(*waker)(nil).wake()
}

// A number is free again when its queue was empty.
func TestLaneDrains(t *testing.T) {
	w := newWaker(context.Background())
	l := newLane(context.Background(), w)
	if _, takes, _ := l.get(); takes || !l.clean() {
		t.Error("takes what is for a port to come")
	}
	l.set(newPort())
	l.set(nil)
	l.set(nil)
	if _, takes, draining := l.get(); !takes || !draining || l.clean() {
		t.Error("does not drain")
	}
	next := w.next()
	l.drained()
	<-next.Done()
	if !l.clean() {
		t.Error("not clean")
	}
}

// What has arrived can be read when the other side is gone, but not when the port
// was removed.
func TestRemovedUnread(t *testing.T) {
	for _, c := range []struct{ why, want error }{{io.ErrUnexpectedEOF, nil}, {ErrRemoved, ErrRemoved}} {
		p := openPort(t)
		p.receive([]byte("abc"))
		p.remove(c.why)
		b := make([]byte, 10)
		if n, err := p.Read(b); err != c.want || err == nil && string(b[:n]) != "abc" {
			t.Errorf("%v: %q, %v", c.why, b[:n], err)
		}
		if _, err := p.Read(b); err != c.why {
			t.Errorf("%v, want %v", err, c.why)
		}
	}
}
