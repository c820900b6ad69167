package console_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

var wires = []console.Wire{console.Multiport, console.Single, console.Original}

// peers are the two ends of a link.
func peers(t testing.TB) []*ivshmem.Device {
	t.Helper()
	return ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8003, ReadWrite: 1 << 20})
}

// device serves a device until the test ends.
func device(t testing.TB, dev *ivshmem.Device, c console.Config) *console.Device {
	t.Helper()
	d, err := console.NewDevice(dev, c)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, d)
	return d
}

// serve serves a device until the test ends, or what it returns is called.
func serve(t testing.TB, d *console.Device) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// both is a device and a driver with a console called "con" and, where the wire
// has more than one, a plain port called "plain".
type both struct {
	testing.TB
	ctx    context.Context
	device *console.Device
	driver *console.Driver
}

func newBoth(t testing.TB, c console.Config) *both {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	p := peers(t)
	b := &both{TB: t, ctx: ctx, device: device(t, p[0], c)}
	b.add(console.PortConfig{Name: "con", Console: true})
	if c.Wire != console.Single {
		b.add(console.PortConfig{Name: "plain"})
	}
	d, err := console.Open(ctx, p[1], c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	b.driver = d
	return b
}

func (b *both) add(c console.PortConfig) *console.Port {
	b.Helper()
	p, err := b.device.AddPort(c)
	if err != nil {
		b.Fatal(err)
	}
	return p
}

// pair is both ends of a port, closed; the console's of the driver is open.
func (b *both) pair(name string) (device, driver *console.Port) {
	b.Helper()
	device = b.device.Lookup(name)
	if b.driver.Wire() == console.Single {
		return device, b.driver.Port(0)
	}
	driver, err := b.driver.WaitPort(b.ctx, name)
	if err != nil {
		b.Fatal(err)
	}
	return device, driver
}

// open is both ends of a port, open on both sides, and both know it.
func (b *both) open(name string) (device, driver *console.Port) {
	b.Helper()
	device, driver = b.pair(name)
	for _, p := range []*console.Port{device, driver} {
		b.ok(p.Open())
	}
	b.ok(device.WaitOpen(b.ctx))
	b.ok(driver.WaitOpen(b.ctx))
	return device, driver
}

// reopen opens a port that was closed when the other side has seen it.
func (b *both) reopen(p, other *console.Port) {
	b.Helper()
	if b.driver.Wire() != console.Single {
		_, err := other.Wait(b.ctx, console.HangUp)
		b.ok(err)
	}
	b.ok(p.Open())
	b.ok(other.WaitOpen(b.ctx))
}

// some is the name of the plain port, or of the only one.
func (b *both) some() string {
	if b.driver.Wire() == console.Single {
		return "con"
	}
	return "plain"
}

func (b *both) ok(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *both) is(err, want error) {
	b.Helper()
	if !errors.Is(err, want) {
		b.Fatalf("got %v, want %v", err, want)
	}
}

// until waits for a condition of a port.
func (b *both) until(what string, p *console.Port, f func() bool) {
	b.Helper()
	for {
		c := p.Changes()
		if f() {
			return
		}
		select {
		case <-c:
		case <-b.ctx.Done():
			b.Fatal("never: ", what)
		}
	}
}

// write writes all; read reads as much.
func (b *both) write(p *console.Port, s string) {
	b.Helper()
	_, err := p.Write([]byte(s))
	b.ok(err)
}

func (b *both) read(p *console.Port, want string) {
	b.Helper()
	got := make([]byte, 0, len(want))
	for len(got) < len(want) {
		_, err := p.Wait(b.ctx, console.In)
		b.ok(err)
		n, err := p.TryRead(got[len(got):len(want)])
		if err != nil {
			b.Fatalf("after %q: %v", got, err)
		}
		got = got[:len(got)+n]
	}
	if string(got) != want {
		b.Fatalf("got %.40q, want %.40q", got, want)
	}
}

// each runs a test on each wire.
func each(t *testing.T, f func(t *testing.T, b *both)) {
	for _, w := range wires {
		t.Run(w.String(), func(t *testing.T) {
			t.Parallel()
			f(t, newBoth(t, console.Config{Wire: w}))
		})
	}
}

// Bytes go both ways.
func TestData(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		b.write(device, "to the driver")
		b.read(driver, "to the driver")
		b.write(driver, "to the device")
		b.read(device, "to the device")
	})
}
