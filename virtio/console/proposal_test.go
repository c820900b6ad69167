package console_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// The wire of the original proposal: a 12-byte header id, flags, size before
// all; control messages in between.

// The device, to a driver of the proposal.
func TestProposalDevice(t *testing.T) {
	p := peers(t)
	d := device(t, p[0], console.Config{Wire: console.Original})
	b := &both{TB: t, ctx: t.Context(), device: d}
	b.add(console.PortConfig{Name: "con", Console: true})
	plain := b.add(console.PortConfig{})
	b.ok(plain.Open())
	l := newRawDriver(t, p[1], size|multi, 2)
	config := make([]byte, 8)
	b.ok(l.d.ReadConfig(l.ctx, config, 0))
	if !bytes.Equal(config, raw(t, "0000 0000 02000000")) {
		t.Errorf("configuration space %x", config)
	}
	l.fill(0)
	// It asks for the names; value is not initialised.
	l.send(1, "00000000 01000000 04000000 0100 abcd")
	l.expect(0, "00000000 01000000 07000000 0100 0000 636f6e", "00000000 01000000 04000000 0200 0100")
	l.send(1, "01000000 01000000 04000000 0100 0000")
	l.expect(0, "01000000 01000000 04000000 0100 0000", "01000000 01000000 04000000 0000 0100")
	b.write(plain, "hello") // although it is not open there
	l.expect(0, "01000000 00000000 05000000 68656c6c6f")
	l.send(1, "01000000 01000000 04000000 0000 0100")
	b.ok(plain.WaitOpen(l.ctx))
	// A request in two buffers, of which the first one says how long it is.
	l.send(1, "01000000 00000000 05000000 776f72")
	l.send(1, "01000000 00000000 00000000 6c64")
	b.read(plain, "world")
	// Throttle.
	l.send(1, "01000000 01000000 04000000 0400 0100")
	b.until("throttled", plain, plain.Throttled)
	_, err := plain.Write([]byte("x"))
	b.is(err, console.ErrThrottled)
	l.send(1, "01000000 01000000 04000000 0400 0000")
	b.until("released", plain, func() bool { return !plain.Throttled() })
	b.ok(plain.SetLimit(3))
	l.send(1, "01000000 00000000 03000000 616263")
	l.expect(0, "01000000 01000000 04000000 0400 0100")
	b.read(plain, "a")
	l.expect(0, "01000000 01000000 04000000 0400 0000")
	b.read(plain, "bc")
	b.ok(plain.SetPeerCache(true))
	l.expect(0, "01000000 01000000 04000000 0300 0100")
	b.ok(plain.SetPeerLimit(0x1234))
	l.expect(0, "01000000 01000000 04000000 0500 3412")
	l.send(1, "01000000 01000000 04000000 0000 0000")
	b.until("closed", plain, func() bool { return !plain.PeerOpen() })
	b.ok(plain.Close())
	l.expect(0, "01000000 01000000 04000000 0000 0000")
	// Another port.
	b.add(console.PortConfig{Name: "new"})
	b.ok(l.d.ConfigChanged(l.ctx))
	b.ok(l.d.ReadConfig(l.ctx, config, 0))
	if config[4] != 3 {
		t.Errorf("configuration space %x", config)
	}
	l.send(1, "02000000 01000000 04000000 0100 0000")
	l.expect(0, "02000000 01000000 07000000 0100 0000 6e6577")

	n := uint64(0)
	for _, c := range []struct{ message, field string }{
		{"00", "length"},
		{"00000000 01000000 040000", "length"},
		{"00000000 01000000 04000000 0100 00", "length of a control message"},
		{"03000000 01000000 04000000 0100 0000", "port"}, // not added
		{"08000000 00000000 01000000 00", "port"},
		{"ffffffff 01000000 04000000 0100 0000", "port"},
		{"00000000 01000000 04000000 0200 0100", "event"},
		{"00000000 01000000 04000000 0300 0100", "event"},
		{"00000000 01000000 04000000 ffff 0100", "event"},
	} {
		l.send(1, c.message)
		n++
		dropped(t, d.Stats, n, c.field)
	}
}

// The driver, to a device of the proposal.
func TestProposalDriver(t *testing.T) {
	p := peers(t)
	d := newRawDevice(t, p[0], size|multi, 2, "5000 1900 01000000")
	b := &both{TB: t, ctx: d.ctx}
	b.driver = d.open(p[1], console.Config{Wire: console.Original, Limit: 10})
	d.expect(1, "00000000 01000000 04000000 0100 0000")
	d.send(0, "00000000 01000000 09000000 0100 0000 636f6e00")
	con, err := b.driver.WaitPort(d.ctx, "con")
	b.ok(err)
	if con.Size() != (console.Size{Cols: 80, Rows: 25}) {
		t.Errorf("size %v", con.Size())
	}
	b.ok(d.b.SetConfig(4, raw(t, "02000000")))
	d.expect(1, "01000000 01000000 04000000 0100 0000")
	plain := b.driver.Port(1)
	d.send(0, "00000000 01000000 04000000 0200 0100")
	d.expect(1, "00000000 01000000 04000000 0000 0100")
	b.ok(plain.Open())
	d.expect(1, "01000000 01000000 04000000 0000 0100")
	b.write(plain, "hello") // although it is not open there
	d.expect(1, "01000000 00000000 05000000 68656c6c6f")
	// Data is a sign that it is open.
	d.send(0, "01000000 00000000 05000000 776f726c64")
	b.ok(plain.WaitOpen(d.ctx))
	b.read(plain, "world")
	d.send(0, "01000000 00000000 0b000000 30313233343536373839 61")
	d.expect(1, "01000000 01000000 04000000 0400 0100")
	d.send(0, "01000000 01000000 04000000 0500 0100") // 1 MiB
	d.expect(1, "01000000 01000000 04000000 0400 0000")
	d.send(0, "01000000 01000000 04000000 0300 0100") // cache
	d.send(0, "01000000 01000000 04000000 0000 0000")
	_, err = plain.Wait(d.ctx, console.HangUp)
	b.ok(err)
	b.ok(plain.Close())
	d.expect(1, "01000000 01000000 04000000 0000 0000")
	b.ok(plain.Open())
	b.read(plain, "0123456789a")
	d.expect(1, "01000000 01000000 04000000 0000 0100")

	n := uint64(0)
	for _, c := range []struct{ message, field string }{
		{"", "length"},
		{"02000000 00000000 01000000 00", "port"},
		{"ffffffff 01000000 04000000 0000 0100", "port"},
		{"01000000 01000000 04000000 0200 0000", "CONSOLE_PORT"},
		{"01000000 01000000 04000000 0600 0000", "event"},
		{"01000000 01000000 04000000 01", "length of a control message"},
	} {
		d.send(0, c.message)
		n++
		dropped(t, b.driver.Stats, n, c.field)
	}
	// As many ports as one likes to announce.
	b.ok(d.b.SetConfig(4, raw(t, "ffffffff")))
	for id := range 126 {
		if got := d.receive(1); got[0] != byte(id+2) {
			t.Fatalf("got %x, want a question for port %d", got, id+2)
		}
	}
	if n := len(b.driver.Ports()); n != 128 {
		t.Errorf("%d ports", n)
	}
}

// A driver that does not heed THROTTLE_PORT fills its own queue, and no more
// memory than is allowed.
func TestProposalDeaf(t *testing.T) {
	p := peers(t)
	d := device(t, p[0], console.Config{Wire: console.Original})
	b := &both{TB: t, ctx: t.Context(), device: d}
	port := b.add(console.PortConfig{Name: "x"})
	b.ok(port.Open())
	b.ok(port.SetLimit(1))
	l := newRawDriver(t, p[1], size|multi, 2)
	l.send(1, "00000000 01000000 04000000 0000 0100")
	const buffers = 100
	sent := make(chan bool)
	go func() {
		for range buffers {
			l.sendBytes(1, append(raw(t, "00000000 00000000 00000000"), make([]byte, 5000)...))
		}
		close(sent)
	}()
	b.until("full", port, func() bool { return port.Unread() == 1+256<<10 })
	for range buffers {
		_, err := io.ReadFull(port, make([]byte, 5000))
		b.ok(err)
		if u := port.Unread(); u > 1+256<<10 {
			t.Fatalf("%d bytes are unread", u)
		}
	}
	<-sent
}
