package console_test

import (
	"bytes"
	"context"
	"io"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

const (
	size, multi, emergency = 1 << 0, 1 << 1, 1 << 2
)

// The handshake of Linux's driver with a device of two ports, byte for byte.
func TestLinuxHandshake(t *testing.T) {
	p := peers(t)
	d := device(t, p[0], console.Config{MaxPorts: 3})
	b := &both{TB: t, ctx: t.Context(), device: d}
	con := b.add(console.PortConfig{Name: "con", Console: true})
	plain := b.add(console.PortConfig{Name: "log"})
	b.ok(d.Resize(con, console.Size{Cols: 0x50, Rows: 0x19}))
	b.ok(plain.Open())
	l := newRawDriver(t, p[1], size|multi|emergency, 8)
	config := make([]byte, 12)
	b.ok(l.d.ReadConfig(l.ctx, config, 0))
	if !bytes.Equal(config, raw(t, "5000 1900 03000000 00000000")) {
		t.Errorf("configuration space %x", config)
	}
	l.fill(2)
	l.nothing(2)
	l.send(3, "ffffffff 0000 0100")                         // DEVICE_READY
	l.expect(2, "00000000 0100 0100", "01000000 0100 0100") // PORT_ADD
	l.fill(0)
	l.send(3, "00000000 0300 0100") // PORT_READY
	l.expect(2, "00000000 0400 0100", "00000000 0700 0100 636f6e", "00000000 0500 0000 1900 5000")
	l.send(3, "00000000 0600 0100") // PORT_OPEN: mandatory for a console
	b.ok(con.WaitOpen(l.ctx))
	l.fill(4)
	l.send(3, "01000000 0300 0100")
	l.expect(2, "01000000 0700 0100 6c6f67", "01000000 0600 0100")

	// Nothing is sent before the port is open here.
	if plain.PeerOpen() || plain.Ready()&console.Out != 0 {
		t.Error("the port is open")
	}
	l.send(3, "01000000 0600 0100")
	b.ok(plain.WaitOpen(l.ctx))
	b.write(plain, "hello")
	l.expect(4, "68656c6c6f")
	l.send(5, "776f726c64")
	b.read(plain, "world")
	b.ok(con.Open())
	l.expect(2, "00000000 0600 0100")
	l.send(1, "0d0a")
	b.read(con, "\r\n")

	// Ports come and go.
	late := b.add(console.PortConfig{})
	l.expect(2, "02000000 0100 0100")
	l.send(3, "02000000 0300 0000") // no memory
	b.ok(d.RemovePort(late))
	l.expect(2, "02000000 0200 0100")
	b.ok(d.RemovePort(plain))
	l.expect(2, "01000000 0200 0100")
	again := b.add(console.PortConfig{Name: "again"})
	l.expect(2, "01000000 0100 0100")
	l.send(3, "01000000 0300 0100") // its buffers are there already
	l.expect(2, "01000000 0700 0100 616761696e")
	l.send(3, "01000000 0600 0100")
	b.ok(again.Open())
	l.expect(2, "01000000 0600 0100")
	b.write(again, "x")
	l.expect(4, "78")

	// After hibernation it says PORT_READY once more, and hears all again.
	l.send(3, "00000000 0300 0100")
	l.expect(2, "00000000 0400 0100", "00000000 0700 0100 636f6e", "00000000 0600 0100", "00000000 0500 0000 1900 5000")
	l.nothing(2)
}

// What the guest writes to a port that nobody has open here is thrown away, so
// that it does not wait for ever; what it writes to one whose reader is slow
// stays in the queue.
func TestLinuxWrites(t *testing.T) {
	p := peers(t)
	d := device(t, p[0], console.Config{})
	b := &both{TB: t, ctx: t.Context(), device: d}
	plain := b.add(console.PortConfig{Name: "log"})
	l := newRawDriver(t, p[1], size|multi, 10)
	l.fill(2)
	l.fill(4)
	l.send(3, "ffffffff 0000 0100")
	l.send(3, "01000000 0300 0100") // not added yet, or already
	l.expect(2, "01000000 0100 0100")
	l.send(3, "01000000 0300 0100")
	l.send(3, "01000000 0600 0100")
	for range 10 {
		l.sendBytes(5, make([]byte, 32<<10)) // returned, or it would not end
	}
	b.until("thrown away", plain, func() bool { return plain.Dropped() == 320<<10 })
	b.ok(plain.Open())
	b.ok(plain.SetLimit(1000))
	want := bytes.Repeat([]byte("0123456789"), 3000)
	sent := make(chan bool)
	go func() {
		l.sendBytes(5, want)
		l.send(3, "01000000 0600 0000") // closes behind it
		close(sent)
	}()
	got, err := io.ReadAll(plain)
	b.ok(err)
	<-sent
	if !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, want %d", len(got), len(want))
	}
}

// A burst longer than the control queue is not lost.
func TestLinuxBurst(t *testing.T) {
	p := peers(t)
	d := device(t, p[0], console.Config{MaxPorts: 6, Entries: 2})
	b := &both{TB: t, ctx: t.Context(), device: d}
	for range 5 {
		b.add(console.PortConfig{})
	}
	l := newRawDriver(t, p[1], size|multi, 14)
	l.fill(2)
	l.send(3, "ffffffff 0000 0100")
	for id := range 5 {
		if got := l.receive(2); got[0] != byte(id+1) || got[4] != 1 {
			t.Fatalf("got %x, want PORT_ADD of port %d", got, id+1)
		}
	}
}

// A driver without MULTIPORT has port 0 only, and its size from the
// configuration space.
func TestLinuxSingle(t *testing.T) {
	for _, w := range wires {
		t.Run(w.String(), func(t *testing.T) {
			p := peers(t)
			d := device(t, p[0], console.Config{Wire: w})
			b := &both{TB: t, ctx: t.Context(), device: d}
			con := b.add(console.PortConfig{Name: "con", Console: true})
			b.ok(con.Open())
			b.ok(d.Resize(con, console.Size{Cols: 80, Rows: 25}))
			l := newRawDriver(t, p[1], size, 2)
			b.ok(l.d.ConfigChanged(l.ctx)) // or it would not look at it
			l.fill(0)
			b.ok(con.WaitOpen(l.ctx))
			b.write(con, "login: ")
			l.expect(0, "6c6f67696e3a20")
			l.send(1, "726f6f740a")
			b.read(con, "root\n")
			b.ok(d.Resize(con, console.Size{Cols: 0x84, Rows: 0x2b}))
			b.ok(l.d.ConfigChanged(l.ctx))
			config := make([]byte, 4)
			b.ok(l.d.ReadConfig(l.ctx, config, 0))
			if !bytes.Equal(config, raw(t, "8400 2b00")) {
				t.Errorf("size %x", config)
			}
		})
	}
}

// RESIZE in the order of the specification.
func TestColsFirst(t *testing.T) {
	b := newBoth(t, console.Config{ColsFirst: true})
	device, driver := b.pair("con")
	s := console.Size{Cols: 100, Rows: 30}
	b.ok(b.device.Resize(device, s))
	b.until("the size", driver, func() bool { return driver.Size() == s })

	p := peers(t)
	d := newRawDevice(t, p[0], size|multi, 4, "00000000 01000000 00000000")
	con := d.open(p[1], console.Config{ColsFirst: true})
	d.expect(3, "ffffffff 0000 0100")
	d.send(2, "00000000 0100 0100", "00000000 0400 0100", "00000000 0500 0000 6400 1e00")
	d.expect(3, "00000000 0300 0100", "00000000 0600 0100")
	d.send(2, "00000000 0400 0100") // answered each time
	d.expect(3, "00000000 0600 0100")
	b.until("the size", con.Port(0), func() bool { return con.Port(0).Size() == s })
}

// Nonsense of the driver is returned, counted and dropped.
func TestHostileDriver(t *testing.T) {
	p := peers(t)
	d := device(t, p[0], console.Config{})
	b := &both{TB: t, ctx: t.Context(), device: d}
	b.add(console.PortConfig{Name: "log"})
	l := newRawDriver(t, p[1], size|multi, 10)
	n := uint64(0)
	for _, c := range []struct{ message, field string }{
		{"00", "length"},
		{"01000000 0300 01", "length"},
		{"04000000 0300 0100", "port"},
		{"ffffffff 0300 0100", "port"},
		{"00000000 0300 0100", "port"}, // never added
		{"00000000 0600 0100", "port"},
	} {
		l.send(3, c.message)
		n++
		dropped(t, d.Stats, n, c.field)
	}
	l.fill(2)
	l.send(3, "00000000 0000 0000") // DEVICE_READY(0)
	l.send(3, "ffffffff 0000 0100")
	l.expect(2, "01000000 0100 0100")
	for _, c := range []struct{ message, field string }{
		{"01000000 0100 0100", "event"},
		{"01000000 0500 0000 00000000", "event"},
		{"01000000 ffff 0000", "event"},
	} {
		l.send(3, c.message)
		n++
		dropped(t, d.Stats, n, c.field)
	}
	l.sendBytes(3, bytes.Repeat([]byte{0xff}, 100_000))
	dropped(t, d.Stats, n+1, "port")
	// It goes on.
	l.send(3, "01000000 0300 0100")
	l.expect(2, "01000000 0700 0100 6c6f67")
}

// What Linux says of a port depends on who is faster: its probe, or a program that
// opens the port.
func TestLinuxOpensEarly(t *testing.T) {
	p := peers(t)
	d := device(t, p[0], console.Config{})
	b := &both{TB: t, ctx: t.Context(), device: d}
	plain := b.add(console.PortConfig{Name: "log"})
	b.ok(plain.Open())
	l := newRawDriver(t, p[1], size|multi, 10)
	l.fill(2)
	l.fill(4)
	l.send(3, "ffffffff 0000 0100")
	l.expect(2, "01000000 0100 0100")
	l.send(3, "01000000 0600 0100")
	l.send(3, "01000000 0300 0100")
	b.ok(plain.WaitOpen(l.ctx))
	l.expect(2, "01000000 0700 0100 6c6f67", "01000000 0600 0100")
	b.write(plain, "hello")
	l.expect(4, "68656c6c6f")
	// It was open for that long only.
	b.ok(d.RemovePort(plain))
	l.expect(2, "01000000 0200 0100")
	again := b.add(console.PortConfig{})
	l.expect(2, "01000000 0100 0100")
	l.send(3, "01000000 0600 0100")
	l.send(3, "01000000 0600 0000")
	l.send(3, "01000000 0300 0100")
	b.ok(again.Open())
	l.expect(2, "01000000 0600 0100")
	if again.PeerOpen() {
		t.Error("open, although it was closed again")
	}
}

// After hibernation Linux says PORT_READY for the ports that it had, and no
// DEVICE_READY: it goes on with those, and hears of new ones.
func TestLinuxRestored(t *testing.T) {
	p := peers(t)
	d := device(t, p[0], console.Config{})
	b := &both{TB: t, ctx: t.Context(), device: d}
	plain := b.add(console.PortConfig{Name: "log"})
	b.ok(plain.Open())
	b.add(console.PortConfig{Name: "new"})
	l := newRawDriver(t, p[1], size|multi, 10)
	l.fill(2)
	l.fill(4)
	l.nothing(2)
	l.send(3, "01000000 0300 0100")
	l.send(3, "01000000 0600 0100")
	b.ok(plain.WaitOpen(l.ctx))
	got := map[string]bool{}
	for range 3 {
		got[string(l.receive(2))] = true
	}
	for _, want := range []string{"01000000 0700 0100 6c6f67", "01000000 0600 0100", "02000000 0100 0100"} {
		if !got[string(raw(t, want))] {
			t.Errorf("no message %s in %v", want, got)
		}
	}
	b.write(plain, "hello")
	l.expect(4, "68656c6c6f")
}

// A CPU of Linux stands still until it has back what it wrote to a console.
func TestLinuxConsoleStuck(t *testing.T) {
	for _, w := range []console.Wire{console.Multiport, console.Single} {
		t.Run(w.String(), func(t *testing.T) {
			t.Parallel()
			p := peers(t)
			d := device(t, p[0], console.Config{Wire: w})
			b := &both{TB: t, ctx: t.Context(), device: d}
			l := newRawDriver(t, p[1], size, 2) // without MULTIPORT
			l.sendBytes(1, []byte("nobody there"))
			con := b.add(console.PortConfig{Name: "con", Console: true})
			b.ok(con.Open())
			b.ok(con.WaitOpen(l.ctx))
			b.ok(con.SetLimit(1000))
			for range 50 {
				l.sendBytes(1, bytes.Repeat([]byte("x"), 100)) // each has to come back
			}
			if n, dropped := con.Unread(), con.Dropped(); n != 1000 || n+int(dropped) != 5000 && n+int(dropped) != 5012 {
				t.Errorf("%d bytes are unread, %d dropped, of 5000", n, dropped)
			}
			// Who reads again misses nothing more.
			b.read(con, string(bytes.Repeat([]byte("x"), 1000)))
			l.send(1, "6e6577")
			b.read(con, "new")
		})
	}
}

// What the driver says to a device that follows the specification, and to one
// that does not.
func TestRawDevice(t *testing.T) {
	p := peers(t)
	d := newRawDevice(t, p[0], size|multi|emergency, 8, "00000000 03000000 00000000")
	b := &both{TB: t, ctx: d.ctx}
	driver := d.open(p[1], console.Config{MaxPorts: 2})
	b.driver = driver
	d.expect(3, "ffffffff 0000 0100")
	d.send(2, "01000000 0100 0100", "01000000 0700 0100 6f72672e 78 00") // a name with 0, as QEMU's
	d.expect(3, "01000000 0300 0100")
	port, err := driver.WaitPort(d.ctx, "org.x")
	b.ok(err)
	d.send(2, "01000000 0700 0100 79") // the first one counts
	// What it dislikes.
	n := uint64(0)
	for _, c := range []struct{ message, field string }{
		{"", "length"},
		{"0100000001", "length"},
		{"03000000 0100 0100", "port"}, // as many as there can be
		{"02000000 0100 0100", "port"}, // and as the driver wants
		{"00000000 0200 0100", "port"},
		{"00000000 0600 0100", "port"},
		{"01000000 0400 0000", "CONSOLE_PORT"},
		{"01000000 0500 0000 0000", "length of RESIZE"},
		{"01000000 0300 0100", "event"},
		{"01000000 ffff 0000", "event"},
	} {
		d.send(2, c.message)
		n++
		dropped(t, driver.Stats, n, c.field)
	}
	if port.Name() != "org.x" || len(driver.Ports()) != 1 {
		t.Errorf("%d ports, %q", len(driver.Ports()), port.Name())
	}
	d.send(2, "01000000 0500 0000 19005000") // no console
	b.ok(port.Open())
	d.expect(3, "01000000 0600 0100")
	d.send(2, "01000000 0600 0100")
	b.ok(port.WaitOpen(d.ctx))
	if port.Size() != (console.Size{}) {
		t.Error("a plain port has a size")
	}
	b.write(port, "hello")
	d.expect(5, "68656c6c6f")
	d.send(4, "776f726c64")
	b.read(port, "world")
	d.send(2, "01000000 0100 0100") // again
	d.expect(3, "01000000 0300 0100")
	d.send(2, "01000000 0600 0000")
	_, err = port.Wait(d.ctx, console.HangUp)
	b.ok(err)
	_, err = port.Read(make([]byte, 1))
	b.is(err, io.EOF)
	b.ok(port.Close())
	d.expect(3, "01000000 0600 0000")

	// Removed and added again; its buffers stay.
	d.send(4, "7374616c65") // to nobody, since it is closed
	d.send(2, "01000000 0200 0100")
	b.until("removed", port, func() bool { _, err := port.TryRead(nil); return err == console.ErrRemoved })
	d.send(2, "01000000 0100 0100", "01000000 0700 0100 7a", "01000000 0600 0100")
	d.expect(3, "01000000 0300 0100")
	port, err = driver.WaitPort(d.ctx, "z")
	b.ok(err)
	b.ok(port.Open())
	d.expect(3, "01000000 0600 0100")
	b.ok(port.WaitOpen(d.ctx))
	d.send(4, "6e6577")
	b.read(port, "new")
}

// A device that announces no port at all, and one that announces too many.
func TestRawDeviceMostPorts(t *testing.T) {
	p := peers(t)
	newRawDevice(t, p[0], size|multi, 4, "00000000 00000000 00000000")
	if _, err := console.Open(t.Context(), p[1], console.Config{}); err == nil {
		t.Error("a device with no ports was taken")
	}
	p = peers(t)
	d := newRawDevice(t, p[0], size|multi, 4, "00000000 ffffffff 00000000")
	driver := d.open(p[1], console.Config{MaxPorts: 1})
	d.expect(3, "ffffffff 0000 0100")
	d.send(2, "feffffff 0100 0100", "ffffffff 0100 0100")
	dropped(t, driver.Stats, 2, "port")
	ctx, cancel := context.WithCancel(d.ctx)
	cancel()
	if _, err := driver.WaitPort(ctx, "x"); err != context.Canceled {
		t.Error(err)
	}
}
