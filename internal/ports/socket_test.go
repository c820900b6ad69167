package ports

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// A program opens the port, both talk, and its leaving closes the port.
func TestSocket(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	far := b.far("log")
	for range 3 {
		c := b.s.dial("log")
		write(t, c, "to the driver")
		b.hear(far, "to the driver")
		b.say(far, "to the device")
		b.hear(c, "to the device")
		c.Close()
		b.closed(far)
	}
}

// What was written comes before the end of file, in both directions.
func TestSocketEnds(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	big := string(bytes.Repeat([]byte("0123456789abcdef"), 64<<10))
	far := b.far("log")
	c := b.s.dial("log")
	go func(c *net.UnixConn) {
		io.WriteString(c, big)
		c.Close()
	}(c)
	b.hear(far, big)
	if n, err := far.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Error(n, err)
	}
	c = b.s.dial("log")
	b.stuffConn(c, stream(4<<20)) // which nobody reads
	go func() {
		far.WaitOpen(b.ctx)
		far.WriteAll(b.ctx, []byte(big))
		far.Close()
	}()
	b.hear(c, big)
	atEnd(t, c)
}

// What a program said is not lost when it leaves without having read.
func TestSocketLastWords(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{Limit: 1 << 10}, Config{}, log)
	far := b.far("log")
	c := b.s.dial("log")
	data := stream(4 << 20)
	b.stuff(far, data) // the program's own socket is full, too
	n := b.stuffConn(c, data)
	c.Close()
	b.hear(far, string(data[:n]))
}

// A program that has nothing more to say can listen.
func TestSocketHalfClosed(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	far := b.far("log")
	c := b.s.dial("log")
	write(t, c, "question")
	c.CloseWrite()
	b.hear(far, "question")
	b.say(far, "answer")
	b.hear(c, "answer")
	if !far.PeerOpen() {
		t.Error("closed")
	}
	c.Close()
	b.closed(far)
}

// One program at a time, but a second one right behind the first is no second.
func TestSocketOneAtATime(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	far := b.far("log")
	c := b.s.dial("log")
	b.s.wait("log", hereOpen)
	second := b.s.dial("log")
	atEnd(t, second)
	if err := <-b.s.failures; err == nil {
		t.Error("nobody was told")
	}
	b.say(far, "still there")
	b.hear(c, "still there")
	for range 100 {
		c.Close()
		c = b.s.dial("log")
		write(t, c, "x")
	}
	b.hear(far, "x")
	select {
	case err := <-b.s.failures:
		t.Error(err)
	default:
	}
}

// A program that leaves before the other side came leaves nothing.
func TestSocketLeavesEarly(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	c := b.s.dial("log")
	b.s.wait("log", hereOpen)
	write(t, c, "for nobody")
	c.Close()
	b.s.wait("log", func(s Status) bool { return !s.OpenHere })
	far := b.far("log")
	c = b.s.dial("log")
	write(t, c, "for somebody")
	b.hear(far, "for somebody")
}

// stream is bytes of which no two pieces are alike.
func stream(n int) []byte {
	b := make([]byte, 0, n)
	for i := uint64(0); len(b) < n; i++ {
		b = binary.BigEndian.AppendUint64(b, i)
	}
	return b
}

// stuff writes until nothing more is taken for a while.
func (b *both) stuff(p *console.Port, s []byte) (n int) {
	b.t.Helper()
	if err := p.WaitOpen(b.ctx); err != nil {
		b.t.Fatal(err)
	}
	for n < len(s) {
		ctx, cancel := context.WithTimeout(b.ctx, 300*time.Millisecond)
		m, err := p.WriteAll(ctx, s[n:])
		cancel()
		n += m
		if m == 0 {
			return n
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			b.t.Fatal(err)
		}
	}
	b.t.Fatalf("%d bytes, and nothing throttles the writer", n)
	return 0
}

// stuffConn is stuff of a program.
func (b *both) stuffConn(c *net.UnixConn, s []byte) (n int) {
	b.t.Helper()
	for n < len(s) {
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		m, err := c.Write(s[n:])
		n += m
		if m == 0 {
			return n
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			b.t.Fatal(n, err)
		}
	}
	b.t.Fatalf("%d bytes, and nothing throttles the program", n)
	return 0
}

// The slower side sets the pace, and nothing is in between without a bound.
func TestFlowControl(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{Limit: 1 << 10}, Config{}, log)
	far := b.far("log")
	c := b.s.dial("log")
	b.s.wait("log", hereOpen)
	data := stream(4 << 20)
	n := b.stuff(far, data)
	got := make([]byte, n)
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data[:n]) {
		t.Fatal("not what was sent", err)
	}
	// And back.
	n = b.stuffConn(c, data)
	got = make([]byte, n)
	if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, data[:n]) {
		t.Fatal("not what was sent", err)
	}
}

// With cache, what a program did not take is for the next one, except what its
// socket held; without, it is dropped.
func TestSocketCache(t *testing.T) {
	t.Parallel()
	for _, cache := range []bool{false, true} {
		b := newBoth(t, console.Config{}, Config{Others: Settings{Cache: cache}}, log)
		far := b.far("log")
		c := b.s.dial("log")
		data := stream(4 << 20)
		b.stuff(far, data)
		held := queued(t, c)
		c.Close()
		b.closed(far)
		far.Close()
		if !cache {
			b.s.wait("log", func(s Status) bool { return s.Unread == 0 && !s.OpenHere && !s.OpenThere })
			far.Open()
			c = b.s.dial("log")
			b.say(far, "new")
			b.hear(c, "new")
			continue
		}
		c = b.s.dial("log")
		got, err := io.ReadAll(c)
		if err != nil || len(got) < 64<<10 || !bytes.Equal(got, data[held:held+len(got)]) {
			t.Errorf("%d bytes behind %d, %v: not the next ones", len(got), held, err)
		}
	}
}

// What the device asks for on the original wire holds, unless the driver's side
// wants something else.
func TestSocketCacheAskedFor(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{Wire: console.Original}, Config{}, log)
	if err := b.device.Lookup("log").SetPeerCache(true); err != nil {
		t.Fatal(err)
	}
	far := b.far("log")
	write(t, b.s.dial("log"), "kept")
	for changed := far.Changes(); far.Unread() < 4; changed = far.Changes() {
		<-changed
	}
	far.Close()
	b.hear(serve(t, b.driver, Config{}).dial("log"), "kept")
}

// queued is how many bytes a connection has not read.
func queued(t *testing.T, c *net.UnixConn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}
