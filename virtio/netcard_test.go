package virtio_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio/net"
)

// netPort is the other side of a network card.
type netPort struct {
	out, in  chan []byte
	offloads chan net.Offloads
	ended    atomic.Int32
	ctx      context.Context
}

func newNetPort() *netPort {
	return &netPort{out: make(chan []byte, 1000), in: make(chan []byte, 1000), offloads: make(chan net.Offloads, 100)}
}

func (p *netPort) Begin(ctx context.Context, o net.Offloads) error {
	p.ctx = ctx
	select {
	case p.offloads <- o:
	default: // nobody asks
	}
	return nil
}

func (p *netPort) End() { p.ended.Add(1) }

func (p *netPort) Read(b []byte) (int, error) {
	select {
	case f, ok := <-p.in:
		if !ok {
			return 0, errors.New("the port is no more")
		}
		return copy(b, f), nil
	case <-p.ctx.Done():
		return 0, p.ctx.Err()
	}
}

func (p *netPort) Write(b []byte) error {
	p.out <- bytes.Clone(b)
	return nil
}

// The features of the device type that Linux takes.
const netFeatures = 1<<0 | 1<<1 | 1<<3 | 1<<5 | 1<<7 | 1<<8 | 1<<9 | 1<<11 | 1<<12 | 1<<13 | 1<<15 | 1<<16

// netCard is a network card in a guest.
type netCard struct {
	*linux
	port  *netPort
	drops *net.Drops
	back  served
}

func newNetCard(t *testing.T, rw uint64, vectors int, accept uint64) *netCard {
	t.Helper()
	b := newBoard(t, 0x8001, rw, vectors)
	dev := b.Device(t, 0, apart)
	c := &netCard{port: newNetPort(), drops: new(net.Drops)}
	d, err := net.Device(dev, c.port, net.Config{MAC: []byte{2, 0, 0, 0, 0, 7}, MTU: 1500, Drops: c.drops})
	if err != nil {
		t.Fatal(err)
	}
	c.back = serve(t, dev, d)
	c.linux = newLinux(t, b)
	c.accept = accept
	if err := c.again(2); err != nil {
		t.Fatal(err)
	}
	return c
}

// buffers gives the card buffers to receive into.
func (c *netCard) buffers(sizes ...int) (all []*linuxRequest) {
	c.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	q := c.queues[0]
	for _, n := range sizes {
		r, err := q.add(nil, n)
		if err != nil {
			c.Fatal(err)
		}
		all = append(all, r)
	}
	q.kick()
	return all
}

// received waits for a buffer.
func (c *netCard) received(r *linuxRequest) []byte {
	c.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.queues[0].await(r); err != nil {
		c.Fatal(err)
	}
	return r.in[:r.length]
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// frame is one of n bytes.
func frame(n int) []byte {
	p := bytes.Repeat([]byte{0xf5}, n)
	copy(p, "\x02\x00\x00\x00\x00\x07\x02\x00\x00\x00\x00\x08\x88\xb5")
	return p
}

// What Linux does with a network card.
func TestNet(t *testing.T) {
	t.Parallel()
	for _, vectors := range []int{1, 2, 3, 16} {
		c := newNetCard(t, 1<<20, vectors, netFeatures)
		c.shows("configuration", 0x4c, "020000000007 0100 0000 dc05")
		if c.features&netFeatures != netFeatures {
			t.Errorf("features %#x", c.features)
		}
		if o := <-c.port.offloads; o != (net.Offloads{Checksum: true, TCP4: true, TCP6: true, ECN: true}) {
			t.Errorf("%+v", o)
		}
		for _, n := range []int{14, 60, 1514, 65549} {
			out := append(make([]byte, 12), frame(n)...)
			if r, err := c.queues[1].request([][]byte{out[:12], out[12:]}); err != nil || r.length != 0 {
				t.Fatalf("%v, length %d", err, r.length)
			}
			if got := <-c.port.out; !bytes.Equal(got, out) {
				t.Errorf("%d bytes left, want %d: % x", len(got), len(out), got[:26])
			}
			in := c.buffers(12 + n)
			c.port.in <- out
			want := append(append(make([]byte, 10), 1, 0), frame(n)...)
			if got := c.received(in[0]); !bytes.Equal(got, want) {
				t.Errorf("%d bytes arrived, want %d: % x", len(got), len(want), got[:26])
			}
		}
		if err := net.SetLink(c.back.BackEnd, false); err != nil {
			t.Error(err)
		}
		c.shows("link status", 0x52, "0000")
		if err := net.SetMTU(c.back.BackEnd, 9000); err != nil {
			t.Error(err)
		}
		c.shows("MTU", 0x56, "2823")
		until(t, "the driver is told", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.configChanges > 0 })
		c.remove()
		until(t, "the port is told", func() bool { return c.port.ended.Load() == 1 })
	}
}

// A frame takes as many buffers as it needs; the driver sees them all at once.
func TestNetMerges(t *testing.T) {
	t.Parallel()
	c := newNetCard(t, 1<<20, 2, netFeatures)
	in := c.buffers(100, 100, 100, 100)
	c.port.in <- append(make([]byte, 12), frame(250)...)
	var got []byte
	for _, r := range in[:3] {
		got = append(got, c.received(r)...)
	}
	if want := append(append(make([]byte, 10), 3, 0), frame(250)...); !bytes.Equal(got, want) {
		t.Errorf("% x, want % x", got, want)
	}
	// One that all buffers that there may be cannot hold is dropped, and the
	// buffers stay.
	n := int(c.queues[0].n)
	for len(in) < 3+n {
		in = append(in, c.buffers(100)...)
	}
	c.port.in <- append(make([]byte, 12), frame(100*n)...)
	c.port.in <- append(make([]byte, 12), frame(60)...)
	if got := c.received(in[3]); len(got) != 72 || got[10] != 1 || c.drops.Oversized.Load() != 1 {
		t.Errorf("% x, %d dropped", got, c.drops.Oversized.Load())
	}
	c.remove()
}

// Half a frame is never to be seen.
func TestNetAllAtOnce(t *testing.T) {
	t.Parallel()
	c := newNetCard(t, 1<<20, 2, netFeatures)
	used := c.queues[0].used + 2
	end := make(chan struct{})
	seen := make(chan int)
	go func() { // one who looks at the index all the time
		n := 0
		for {
			select {
			case <-end:
				seen <- n
				return
			default:
			}
			if get16(c.m, used)%3 != 0 {
				n++
			}
		}
	}()
	for range 300 {
		in := c.buffers(100, 100, 100)
		c.port.in <- append(make([]byte, 12), frame(250)...)
		c.received(in[2])
	}
	close(end)
	if n := <-seen; n > 0 {
		t.Errorf("parts of frames were to be seen, %d times", n)
	}
	c.remove()
}

// A driver that does not merge buffers gets what fits into one.
func TestNetWithoutMerging(t *testing.T) {
	t.Parallel()
	c := newNetCard(t, 64<<10, 2, 1<<0|1<<16)
	if o := <-c.port.offloads; o != (net.Offloads{}) {
		t.Errorf("%+v", o)
	}
	in := c.buffers(100, 200)
	c.port.in <- append(make([]byte, 12), frame(89)...) // a byte too long
	c.port.in <- append(make([]byte, 12), frame(88)...)
	if got := c.received(in[0]); len(got) != 100 || got[10] != 1 || c.drops.Oversized.Load() != 1 {
		t.Errorf("% x, %d dropped", got, c.drops.Oversized.Load())
	}
	// What it does not take: a checksum to be completed, a long piece.
	c.port.in <- append(unhex(t, "01 00 0000 0000 0e00 0200 0000"), frame(60)...)
	c.port.in <- append(unhex(t, "00 01 0000 6400 0000 0000 0000"), frame(60)...)
	c.port.in <- append(unhex(t, "02 00 0000 0000 0000 0000 0000"), frame(60)...)
	if got := c.received(in[1]); !bytes.Equal(got, append(unhex(t, "00 00 0000 0000 0000 0000 0100"), frame(60)...)) || c.drops.Oversized.Load() != 3 {
		t.Errorf("% x, %d dropped", got, c.drops.Oversized.Load())
	}
	c.remove()
}

// Frames that a driver must not send are dropped, or put right, and the next one
// passes.
func TestNetHeaders(t *testing.T) {
	t.Parallel()
	const all = netFeatures
	for _, c := range []struct {
		name    string
		accept  uint64
		header  string
		frame   int
		arrives string // the header of what does
	}{
		{"plain", all, "00 00 0000 0000 0000 0000 0000", 60, "00 00 0000 0000 0000 0000 0000"},
		{"what has no meaning", all, "fe 00 0102 0304 0506 0708 090a", 60, "00 00 0000 0000 0000 0000 0000"},
		{"checksum", all, "01 00 2200 0000 2200 0600 0000", 60, "01 00 0000 0000 2200 0600 0000"},
		{"checksum at the end", all, "01 00 0000 0000 2200 1800 0000", 60, "01 00 0000 0000 2200 1800 0000"},
		{"checksum beyond the end", all, "01 00 0000 0000 2200 1900 0000", 60, ""},
		{"checksum, wraps", all, "01 00 0000 0000 ffff ffff 0000", 60, ""},
		{"checksum that was not agreed on", 1 << 15, "01 00 0000 0000 2200 0600 0000", 60, ""},
		{"TCP/IPv4", all, "01 01 3600 b405 2200 1000 0000", 3000, "01 01 3600 b405 2200 1000 0000"},
		{"TCP/IPv6 with ECN", all, "01 84 4a00 a005 3600 1000 ffff", 3000, "01 84 4a00 a005 3600 1000 0000"},
		{"segments without a checksum", all, "00 01 3600 b405 2200 1000 0000", 3000, ""},
		{"segments of nothing", all, "01 01 3600 0000 2200 1000 0000", 3000, ""},
		{"headers longer than the frame", all, "01 01 b90b b405 2200 1000 0000", 3000, ""},
		{"UDP fragments", all, "01 03 3600 b405 2200 0600 0000", 3000, ""},
		{"segments of UDP", all, "01 05 3600 b405 2200 0600 0000", 3000, ""},
		{"ECN of nothing", all, "01 80 3600 b405 2200 1000 0000", 3000, ""},
		{"an unknown type", all, "01 7f 3600 b405 2200 1000 0000", 3000, ""},
		{"TCP/IPv4 that was not agreed on", all &^ (1 << 11), "01 01 3600 b405 2200 1000 0000", 3000, ""},
		{"TCP/IPv6 that was not agreed on", all &^ (1 << 12), "01 04 3600 b405 2200 1000 0000", 3000, ""},
		{"ECN that was not agreed on", all &^ (1 << 13), "01 81 3600 b405 2200 1000 0000", 3000, ""},
		{"a short frame", all, "00 00 0000 0000 0000 0000 0000", 13, ""},
		{"nothing", all, "00 00 0000 0000 0000 0000 0000", 0, ""},
		{"half a header", all, "00 00 0000", 0, ""},
		{"a frame that is too long", all, "00 00 0000 0000 0000 0000 0000", 65554, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newNetCard(t, 1<<20, 2, c.accept)
			send := func(header []byte, n int) {
				t.Helper()
				out := [][]byte{header}
				if n > 0 {
					out = append(out, frame(max(n, 14))[:n])
				}
				if r, err := k.queues[1].request(out); err != nil || r.length != 0 {
					t.Fatal(err)
				}
			}
			send(unhex(t, c.header), c.frame)
			send(make([]byte, 12), 20)
			var want []byte
			if c.arrives != "" {
				want = append(unhex(t, c.arrives), frame(c.frame)...)
				if got := <-k.port.out; !bytes.Equal(got, want) {
					t.Errorf("% x, want % x", got[:40], want[:40])
				}
			}
			if got := <-k.port.out; len(got) != 32 {
				t.Errorf("%d bytes", len(got))
			}
			if n := k.drops.Malformed.Load(); (n == 1) != (c.arrives == "") {
				t.Errorf("%d dropped", n)
			}
			k.remove()
		})
	}
}

// A port that is no more ends the service.
func TestNetPortEnds(t *testing.T) {
	t.Parallel()
	c := newNetCard(t, 1<<20, 2, netFeatures)
	close(c.port.in)
	until(t, "the port has ended", func() bool { return c.port.ended.Load() == 1 })
	c.remove()
	if err := c.back.stop(); err == nil || !strings.Contains(err.Error(), "no more") {
		t.Error(err)
	}
}

// What a card cannot have is refused.
func TestNetConfig(t *testing.T) {
	b := newBoard(t, 0x8001, 1<<20, 2)
	dev := b.Device(t, 0, apart)
	for _, c := range []net.Config{{MAC: []byte{2, 0}}, {MAC: []byte{1, 0, 0, 0, 0, 1}}, {MTU: 67}, {MTU: 65536}} {
		if _, err := net.Device(dev, newNetPort(), c); err == nil {
			t.Errorf("%+v", c)
		}
	}
}

// loop is a port whose frames come back.
type loop struct {
	*netPort
	spoils bool
}

func (l loop) Begin(ctx context.Context, o net.Offloads) error {
	for len(l.in) > 0 { // of a driver before
		<-l.in
	}
	return l.netPort.Begin(ctx, o)
}

func (l loop) Write(b []byte) error {
	b = bytes.Clone(b)
	if l.spoils {
		b[len(b)-1]++
	}
	l.in <- b
	return nil
}

// serveNet serves a network card whose frames come back.
func serveNet(ctx context.Context, dev *ivshmem.Device, p *part) error {
	d, err := net.Device(dev, loop{newNetPort(), p.Sabotage}, net.Config{})
	if err != nil {
		return err
	}
	return serveDevice(ctx, dev, d)
}

// useNet sends a frame and waits until it is back.
func useNet(l *linux, tag []byte) error {
	l.mu.Lock()
	in, err := l.queues[0].add(nil, 2000)
	if err == nil {
		l.queues[0].kick()
	}
	l.mu.Unlock()
	if err != nil {
		return err
	}
	out := append(append(make([]byte, 12), frame(60)...), tag...)
	if _, err := l.queues[1].request([][]byte{out[:12], out[12:]}); err != nil {
		return err
	}
	l.mu.Lock()
	err = l.queues[0].await(in)
	l.mu.Unlock()
	if err == nil && (int(in.length) != len(out) || !bytes.Equal(in.in[12:in.length], out[12:])) {
		err = fmt.Errorf("a frame came back as % x, want % x", in.in[12:in.length], out[12:])
	}
	return err
}
