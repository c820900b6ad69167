package console_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// A test for each row of the table in docs/console.md, on each of the wires.

func TestNames(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.pair(b.some())
		if device.Name() != b.some() || b.device.Lookup(b.some()) != device {
			t.Error("the device does not find its port")
		}
		switch b.driver.Wire() {
		case console.Single: // local only
			if driver.Name() != "" || b.driver.Lookup(b.some()) != nil {
				t.Errorf("name %q came from nowhere", driver.Name())
			}
		default:
			if driver.Name() != b.some() || b.driver.Lookup(b.some()) != driver || driver.ID() != device.ID() {
				t.Errorf("port %d is called %q, on the device %d", driver.ID(), driver.Name(), device.ID())
			}
		}
		if b.driver.Lookup("other") != nil || b.driver.Lookup("") != nil {
			t.Error("a port was found that is not there")
		}
		for _, bad := range []string{"con", "a\x00b", "\xff", string(make([]byte, 256))} {
			if _, err := b.device.AddPort(console.PortConfig{Name: bad}); err == nil {
				t.Errorf("name %.10q was taken", bad)
			}
		}
	})
}

func TestAddPort(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		if b.driver.Wire() == console.Single {
			_, err := b.device.AddPort(console.PortConfig{Name: "late"})
			b.is(err, console.ErrTooMany)
			return
		}
		b.pair("plain")
		b.add(console.PortConfig{Name: "late"})
		device, driver := b.open("late")
		b.write(driver, "hello")
		b.read(device, "hello")
		// Up to the most there may be.
		b.add(console.PortConfig{Name: "last"})
		b.open("last")
		_, err := b.device.AddPort(console.PortConfig{})
		b.is(err, console.ErrTooMany)
	})
}

func TestRemovePort(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		if b.driver.Wire() != console.Multiport {
			b.is(b.device.RemovePort(device), console.ErrNotCarried)
			return
		}
		ended := make(chan error, 2)
		for _, p := range []*console.Port{device, driver} {
			go func() {
				_, err := p.Read(make([]byte, 1))
				ended <- err
			}()
		}
		b.ok(b.device.RemovePort(device))
		b.is(<-ended, console.ErrRemoved)
		b.is(<-ended, syscall.ENODEV)
		if r, err := driver.Wait(b.ctx, console.HangUp); r != console.HangUp || err != nil {
			t.Errorf("ready for %b (%v), want HangUp only", r, err)
		}
		b.is(driver.Open(), console.ErrRemoved)
		b.is(b.device.RemovePort(device), console.ErrRemoved)
		if b.driver.Port(driver.ID()) != nil {
			t.Error("the port is still there")
		}
		// The number comes back with another port, many times.
		for range 8 {
			p := b.add(console.PortConfig{Name: "again"})
			if p.ID() != driver.ID() {
				t.Fatalf("port %d, want %d", p.ID(), driver.ID())
			}
			device, other := b.open("again")
			b.write(device, "x")
			b.read(other, "x")
			b.write(other, "y")
			b.read(device, "y")
			b.write(other, "z")
			b.ok(b.device.RemovePort(device))
			_, err := other.Wait(b.ctx, console.HangUp)
			b.ok(err)
		}
	})
}

func TestConsoleBesidePlain(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		_, con := b.pair("con")
		b.until("a console", con, con.Console)
		if b.driver.Wire() == console.Single { // nothing beside it
			if n := len(b.driver.Ports()); n != 1 {
				t.Errorf("%d ports", n)
			}
			return
		}
		_, plain := b.open("plain")
		if plain.Console() {
			t.Error("the plain port is a console")
		}
		b.add(console.PortConfig{Name: "second", Console: true})
		_, second := b.pair("second")
		b.until("a second console", second, second.Console)
	})
}

func TestOpenClose(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.pair(b.some())
		if b.driver.Wire() == console.Single { // both count as open
			b.ok(device.WaitOpen(b.ctx))
			b.ok(driver.WaitOpen(b.ctx))
			b.ok(device.Open())
			b.ok(device.Close())
			if !driver.PeerOpen() {
				t.Error("the driver was told")
			}
			return
		}
		for _, ends := range [][2]*console.Port{{device, driver}, {driver, device}} {
			p, other := ends[0], ends[1]
			b.is(p.Close(), os.ErrClosed)
			for range 3 {
				if other.PeerOpen() {
					t.Error("open before it was opened")
				}
				b.ok(p.Open())
				b.is(p.Open(), syscall.EBUSY)
				b.ok(other.WaitOpen(b.ctx))
				b.ok(p.Close())
				_, err := other.Wait(b.ctx, console.HangUp)
				b.ok(err)
			}
		}
	})
}

// All that was written before the other side closed is read before the end of
// file.
func TestEndOfFile(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		data := bytes.Repeat([]byte("0123456789"), 10_000)
		for i, ends := range [][2]*console.Port{{device, driver}, {driver, device}} {
			p, other := ends[0], ends[1]
			if b.driver.Wire() == console.Single {
				if i == 0 {
					continue // the device's closing is not told
				}
				b.write(p, string(data[:40_000]))
				b.until("all was sent", other, func() bool { return other.Unread() == 40_000 })
				b.ok(b.driver.Close())
			} else {
				go func() {
					p.Write(data)
					p.Close()
				}()
			}
			got, err := io.ReadAll(other)
			b.ok(err)
			want := data
			if b.driver.Wire() == console.Single {
				want = data[:40_000]
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes before the end of file, want %d", len(got), len(want))
			}
			n, err := other.TryRead(make([]byte, 1))
			if n != 0 || err != io.EOF {
				t.Errorf("%d, %v; want EOF", n, err)
			}
			if b.driver.Wire() != console.Single {
				b.ok(p.Open())
				b.ok(other.WaitOpen(b.ctx))
			}
		}
	})
}

func TestReadBlocks(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		for _, ends := range [][2]*console.Port{{device, driver}, {driver, device}} {
			p, other := ends[0], ends[1]
			_, err := other.TryRead(make([]byte, 1))
			b.is(err, console.ErrWouldBlock)
			b.is(err, syscall.EAGAIN)
			read := make(chan byte)
			go func() {
				var c [1]byte
				other.Read(c[:])
				read <- c[0]
			}()
			b.write(p, "x")
			if c := <-read; c != 'x' {
				t.Errorf("read %q", c)
			}
			// Closing the own end ends it.
			ended := make(chan error, 1)
			waits := other.Changes()
			go func() {
				_, err := other.Read(make([]byte, 1))
				ended <- err
			}()
			b.ok(other.Close())
			<-waits
			b.is(<-ended, os.ErrClosed)
			b.reopen(other, p)
		}
	})
}

// fill writes without waiting until the other side, which reads nothing, has as
// much as its limit, and no more goes. It returns how much was taken.
func (b *both) fill(p, other *console.Port, limit int) int {
	b.Helper()
	n := 0
	throttled := func() bool {
		for {
			m, err := p.TryWrite(bytes.Repeat([]byte("x"), 10_000))
			if n += m; errors.Is(err, console.ErrThrottled) {
				return true
			}
			if errors.Is(err, console.ErrWouldBlock) {
				return false
			}
			b.ok(err)
		}
	}
	b.until("throttled", p, throttled)
	b.until("the limit", other, func() bool { return other.Unread() >= limit })
	b.until("throttled for good", p, throttled)
	return n
}

// The other side has its limit of unread data: writing fails with no space
// until it reads.
func TestThrottledWrite(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		for _, ends := range [][2]*console.Port{{device, driver}, {driver, device}} {
			p, other := ends[0], ends[1]
			b.ok(other.SetLimit(5000))
			n := b.fill(p, other, 5000)
			b.is(console.ErrThrottled, syscall.ENOSPC)
			if !p.Throttled() {
				t.Error("not throttled")
			}
			if b.driver.Wire() == console.Original { // it was told
				_, err := p.Write([]byte("x"))
				b.is(err, console.ErrThrottled)
				if r := p.Ready(); r&console.Out != 0 {
					t.Errorf("ready for %b", r)
				}
			}
			ctx, cancel := context.WithCancel(b.ctx)
			cancel()
			for { // what was taken last may still make room
				m, err := p.WriteAll(ctx, []byte("x"))
				if n += m; err != nil {
					b.is(err, context.Canceled)
					break
				}
			}
			wrote := make(chan error, 1)
			go func() {
				_, err := p.WriteAll(b.ctx, make([]byte, 100_000))
				wrote <- err
			}()
			got, err := io.ReadFull(other, make([]byte, n+100_000))
			if err != nil {
				t.Fatalf("%d of %d bytes: %v", got, n+100_000, err)
			}
			b.ok(<-wrote)
			b.until("released", p, func() bool { return !p.Throttled() })
		}
	})
}

// There is never more unread data than the limit, and on the original wire a
// fixed amount, as the other side has to be told.
func TestLimit(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		for _, ends := range [][2]*console.Port{{device, driver}, {driver, device}} {
			p, other := ends[0], ends[1]
			for _, bad := range []int{-1, 0, 64<<20 + 1} {
				if other.SetLimit(bad) == nil {
					t.Errorf("limit %d was taken", bad)
				}
			}
			b.ok(other.SetLimit(5000))
			n := b.fill(p, other, 5000)
			most := 5000
			if b.driver.Wire() == console.Original {
				most += 256 << 10
			}
			if u := other.Unread(); u > most {
				t.Errorf("%d bytes are unread, want at most %d", u, most)
			}
			b.ok(other.SetLimit(1 << 20)) // releases it
			b.until("all arrived", other, func() bool { return other.Unread() == n })
			b.until("released", p, func() bool { return p.Ready()&console.Out != 0 && !p.Throttled() })
		}
	})
}

func TestPeerLimit(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		b.is(driver.SetPeerLimit(1), console.ErrNotCarried)
		if b.driver.Wire() != console.Original {
			b.is(device.SetPeerLimit(1), console.ErrNotCarried)
			return
		}
		b.ok(device.SetPeerLimit(1))
		b.fill(device, driver, 1<<20)
		if u := driver.Unread(); u < 1<<20 {
			t.Errorf("throttled at %d bytes", u)
		}
		b.ok(device.SetPeerLimit(0))
		b.until("released", device, func() bool { return !device.Throttled() })
	})
}

func TestCache(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		for _, ends := range [][2]*console.Port{{device, driver}, {driver, device}} {
			p, other := ends[0], ends[1]
			for _, keep := range []bool{true, false} {
				other.SetCache(keep)
				dropped := other.Dropped()
				b.write(p, "unread")
				b.until("it is there", other, func() bool { return other.Unread() == 6 })
				b.ok(other.Close())
				want := 0
				if keep {
					want = 6
				}
				if n := other.Unread(); n != want {
					t.Fatalf("%d bytes are there, want %d", n, want)
				}
				if n := other.Dropped() - dropped; n != uint64(6-want) {
					t.Errorf("%d bytes were dropped", n)
				}
				b.reopen(other, p)
				b.read(other, "unread"[:want])
			}
		}
	})
}

func TestPeerCache(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		b.is(driver.SetPeerCache(true), console.ErrNotCarried)
		if b.driver.Wire() != console.Original {
			b.is(device.SetPeerCache(true), console.ErrNotCarried)
			return
		}
		for _, keep := range []bool{true, false} {
			b.ok(device.SetPeerCache(keep))
			b.write(device, "unread") // behind it
			b.until("it is there", driver, func() bool { return driver.Unread() == 6 })
			b.ok(driver.Close())
			if n := driver.Unread(); (n == 6) != keep {
				t.Errorf("%d bytes are there", n)
			}
			b.reopen(driver, device)
			if keep {
				b.read(driver, "unread")
			}
		}
	})
}

func TestReadiness(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.pair(b.some())
		if b.driver.Wire() != console.Single {
			want := console.In | console.HangUp
			if b.driver.Wire() == console.Original {
				want |= console.Out // it goes out all the same
			}
			if r := device.Ready(); r != want {
				t.Errorf("while the other side is closed: %b, want %b", r, want)
			}
		}
		device, driver = b.open(b.some())
		for _, ends := range [][2]*console.Port{{device, driver}, {driver, device}} {
			p, other := ends[0], ends[1]
			if r := p.Ready(); r != console.Out {
				t.Errorf("with nothing to read: %b", r)
			}
			b.write(other, "x")
			b.until("data", p, func() bool { return p.Ready() == console.In|console.Out })
			b.read(p, "x")
			b.ok(other.SetLimit(100))
			n := b.fill(p, other, 100)
			for tries := 0; p.Ready() != 0; tries++ { // likewise
				if n += b.fill(p, other, 100); tries == 1000 {
					t.Fatalf("throttled: %b", p.Ready())
				}
			}
			_, err := io.ReadFull(other, make([]byte, n))
			b.ok(err)
			b.until("room", p, func() bool { return p.Ready() == console.Out })
		}
		ctx, cancel := context.WithCancel(b.ctx)
		cancel()
		_, err := device.Wait(ctx, console.In)
		b.is(err, context.Canceled)
		if b.driver.Wire() == console.Single {
			b.ok(b.driver.Close())
		} else {
			b.ok(driver.Close())
		}
		b.until("hang-up", device, func() bool { return device.Ready()&(console.In|console.HangUp) == console.In|console.HangUp })
	})
}

func TestResize(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open("con")
		for _, s := range []console.Size{{80, 25}, {132, 43}} {
			b.ok(b.device.Resize(device, s))
			b.until("the size", driver, func() bool { return driver.Size() == s })
		}
		if b.driver.Wire() == console.Single {
			return
		}
		plain, _ := b.pair("plain")
		b.is(b.device.Resize(plain, console.Size{}), console.ErrNotCarried)
		second := b.add(console.PortConfig{Name: "second", Console: true})
		err := b.device.Resize(second, console.Size{Cols: 1, Rows: 2})
		if b.driver.Wire() == console.Original {
			b.is(err, console.ErrNotCarried)
			return
		}
		b.ok(err)
		_, driver = b.pair("second")
		b.until("its size", driver, func() bool { return driver.Size() == console.Size{Cols: 1, Rows: 2} })
	})
}

func TestEmergencyWrite(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, _ := b.open("con")
		if b.driver.Wire() == console.Original {
			b.is(b.driver.EmergencyWrite(b.ctx, 'x'), console.ErrNotCarried)
			return
		}
		for _, c := range []byte("a\x00b") { // 0 is nothing
			b.ok(b.driver.EmergencyWrite(b.ctx, c))
		}
		b.read(device, "ab")
		// Nobody hears it, and it is not kept.
		b.ok(device.Close())
		b.ok(b.driver.EmergencyWrite(b.ctx, 'c'))
		b.ok(b.driver.EmergencyWrite(b.ctx, 0)) // the one before has been done then
		b.ok(device.Open())
		b.ok(b.driver.EmergencyWrite(b.ctx, 'd'))
		b.read(device, "d")
	})
}

// The driver goes and another one comes: the device's ports stay.
func TestPeerLeaves(t *testing.T) {
	for _, w := range wires {
		t.Run(w.String(), func(t *testing.T) {
			c := console.Config{Wire: w}
			p := peers(t)
			b := &both{TB: t, ctx: t.Context()}
			b.device = device(t, p[0], c)
			name := "con"
			b.add(console.PortConfig{Name: name, Console: true})
			for i := range 3 {
				var err error
				b.driver, err = console.Open(b.ctx, p[1], c)
				b.ok(err)
				device, driver := b.open(name)
				b.write(driver, "hello")
				b.read(device, "hello")
				b.write(device, "hello")
				b.read(driver, "hello")
				b.ok(b.driver.Close())
				<-b.driver.Done()
				_, err = driver.Read(make([]byte, 1))
				b.is(err, os.ErrClosed)
				_, err = device.Read(make([]byte, 1))
				b.is(err, io.EOF)
				if i == 1 {
					device.Close()
					b.ok(device.Open()) // in between
				}
				b.ok(device.Close())
			}
		})
	}
}

// The device goes.
func TestDeviceLeaves(t *testing.T) {
	for _, w := range wires {
		t.Run(w.String(), func(t *testing.T) {
			c := console.Config{Wire: w}
			p := peers(t)
			d, err := console.NewDevice(p[0], c)
			if err != nil {
				t.Fatal(err)
			}
			b := &both{TB: t, ctx: t.Context(), device: d}
			b.add(console.PortConfig{Name: "con", Console: true})
			stop := serve(t, d)
			b.driver, err = console.Open(b.ctx, p[1], c)
			b.ok(err)
			_, driver := b.open("con")
			stop()
			<-b.driver.Done()
			_, err = driver.Read(make([]byte, 1))
			b.is(err, virtio.ErrBackEndGone)
			b.ok(b.driver.Close())
		})
	}
}

// The original wire has many ports where there is little memory and one vector.
// The multiport wire refuses those for which there is no memory, and goes on.
func TestSmallSection(t *testing.T) {
	for _, w := range []console.Wire{console.Multiport, console.Original} {
		t.Run(w.String(), func(t *testing.T) {
			c := console.Config{Wire: w, MaxPorts: 8}
			p := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 1, Protocol: 0x8003, ReadWrite: 64 << 10})
			b := &both{TB: t, ctx: t.Context(), device: device(t, p[0], c)}
			names := []string{"a", "b", "c", "d", "e", "f", "g"}
			for _, n := range names {
				b.add(console.PortConfig{Name: n})
			}
			var err error
			b.driver, err = console.Open(b.ctx, p[1], c)
			b.ok(err)
			defer b.driver.Close()
			if w == console.Multiport {
				names = names[:1]
			}
			for _, n := range names {
				device, driver := b.open(n)
				b.write(device, "to the driver")
				b.read(driver, "to the driver")
				b.write(driver, "to the device")
				b.read(device, "to the device")
			}
			if w == console.Multiport {
				for s, _ := b.driver.Stats(); s.Dropped < 6; s, _ = b.driver.Stats() {
					time.Sleep(50 * time.Microsecond)
				}
				var space *virtio.SpaceError
				if _, err := b.driver.Stats(); !errors.As(err, &space) {
					t.Errorf("got %v, want a SpaceError", err)
				}
				if n := len(b.driver.Ports()); n != 1 {
					t.Errorf("%d ports", n)
				}
			}
		})
	}
}
