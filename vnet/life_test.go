package vnet_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/vnet"
)

func TestUnsuitable(t *testing.T) {
	good := config(0x10000)
	for _, c := range []struct {
		name   string
		change func(*link.Config, *pcidev.Options)
		opts   []ivshmem.Option
		want   error
		text   string
	}{
		{"undefined protocol", func(c *link.Config, _ *pcidev.Options) { c.Protocol = 0 }, nil, vnet.ErrUnsuitable, "0001h"},
		{"another protocol", func(c *link.Config, _ *pcidev.Options) { c.Protocol = 0x8003 }, nil, vnet.ErrUnsuitable, "--protocol 1"},
		{"three peers", func(c *link.Config, _ *pcidev.Options) { c.Peers = 3 }, nil, vnet.ErrUnsuitable, "--peers 2"},
		{"no output sections", func(c *link.Config, _ *pcidev.Options) { c.Output, c.ReadWrite = 0, 0x10000 }, nil, vnet.ErrUnsuitable, "--output"},
		{"strict", func(_ *link.Config, o *pcidev.Options) { o.Mode = pcidev.ModeStrict }, nil, vnet.ErrUnsuitable, "--mode strict"},
		{"observer", func(_ *link.Config, o *pcidev.Options) {}, []ivshmem.Option{ivshmem.AsObserver()}, ivshmem.ErrNotSupported, "observer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config, options := good, pcidev.Options{}
			c.change(&config, &options)
			path, stop := ivshmemtest.ServeUntil(t, config, options)
			defer stop()
			d, err := ivshmem.Open(path, c.opts...)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if _, err := vnet.Open(d, vnet.Config{}); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), path) {
				t.Errorf("%v", err)
			}
		})
	}
}

// both sends a frame each way.
func both(t testing.TB, l [2]*vnet.Link) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := make([]byte, vnet.MaxFrame)
	for i := range l {
		f := frame(60, i)
		if err := l[i].Send(ctx, f); err != nil {
			t.Fatal(err)
		}
		if n, err := l[1-i].Receive(ctx, p); err != nil || !bytes.Equal(p[:n], f) {
			t.Fatal(n, err)
		}
	}
}

func TestUpAndDown(t *testing.T) {
	l := pair(t, 0x10000, vnet.Config{})
	both(t, l)
	for i := range 40 {
		x, y := l[i%2], l[1-i%2]
		if err := x.Down(); err != nil {
			t.Fatal(err)
		}
		carrier(t, false, x, y)
		if err := x.Send(t.Context(), frame(60, 1)); !errors.Is(err, vnet.ErrNoCarrier) {
			t.Fatal(err)
		}
		if i%4 < 2 { // sometimes at once
			until(t, "READY", func() bool { return x.Stats().State == vnet.StateReady })
			if s := x.Stats(); s.Up || s.Carrier || s.Resets.Down == 0 {
				t.Errorf("%+v", s)
			}
		}
		if i%8 == 5 { // both
			y.Down()
			y.Down()
			y.Up()
		}
		if err := x.Up(); err != nil {
			t.Fatal(err)
		}
		carrier(t, true, x, y)
		both(t, l)
	}
	if s := l[1].Stats(); s.Resets.Down < 20 || s.Resets.Peer < 15 {
		t.Errorf("%+v", s.Resets)
	}
}

// TestRestart closes one end, and opens another in its place.
func TestRestart(t *testing.T) {
	path := ivshmemtest.Serve(t, config(0x10000))
	device := func() (d *ivshmem.Device) {
		until(t, "a free peer ID", func() bool {
			var err error
			if d, err = ivshmem.Open(path); err != nil && !errors.Is(err, ivshmem.ErrBusy) {
				t.Fatal(err)
			}
			return err == nil
		})
		t.Cleanup(func() { d.Close() })
		return d
	}
	devices := [2]*ivshmem.Device{device(), device()}
	l := [2]*vnet.Link{open(t, devices[0], vnet.Config{}), open(t, devices[1], vnet.Config{})}
	for i := range 12 {
		carrier(t, true, l[:]...)
		both(t, l)
		x := i % 2
		// Frames that nobody takes any more.
		for range 10 {
			l[1-x].Send(t.Context(), frame(60, 0))
			l[x].Send(t.Context(), frame(60, 0))
		}
		if i%3 > 0 {
			if err := l[x].Close(); err != nil {
				t.Fatal(err)
			}
		}
		if i%3 < 2 { // without Close of the link this is how a process dies
			devices[x].Close()
			devices[x] = device()
		}
		carrier(t, false, l[1-x])
		l[x] = open(t, devices[x], vnet.Config{})
	}
	carrier(t, true, l[:]...)
	if s := l[0].Stats(); s.Sent.Lost+l[1].Stats().Sent.Lost == 0 {
		t.Errorf("no frames are known to be lost: %+v", s)
	}
}

// TestClose closes a link, or its device, while everybody waits for something.
func TestClose(t *testing.T) {
	for _, what := range []string{"link", "device", "both"} {
		for w, name := range map[wiring]string{apart: "apart", merged: "merged", silent: "silent"} {
			t.Run(what+"/"+name, func(t *testing.T) {
				b := newBoard(t, 0x1000, 2)
				r := newRaw(t, b, 1)
				d := b.Device(t, 0, w)
				l := open(t, d, vnet.Config{MTU: 68})
				r.start()
				carrier(t, true, l)
				var all sync.WaitGroup
				waits := func(f func() error) {
					all.Go(func() {
						var err error
						for err == nil {
							err = f()
						}
						if !errors.Is(err, os.ErrClosed) {
							t.Errorf("%v, want %v", err, os.ErrClosed)
						}
					})
				}
				waits(func() error { return l.Send(context.Background(), frame(60, 0)) })
				waits(func() error { _, err := l.Receive(context.Background(), make([]byte, vnet.MaxFrame)); return err })
				waits(func() error { return l.WaitCarrier(context.Background(), false) })
				until(t, "a full queue", func() bool { return l.Stats().Sent.Waits > 0 })
				if what != "link" {
					d.Close()
				}
				if what != "device" {
					if err := l.Close(); err != nil {
						t.Error(err)
					}
				}
				if what == "link" {
					r.await(0)
				}
				all.Wait()
				for name, err := range map[string]error{"Up": l.Up(), "Down": l.Down(), "Commit": l.UnsafeCommit(60), "Release": l.UnsafeRelease(), "carrier": l.WaitCarrier(t.Context(), true)} {
					if !errors.Is(err, os.ErrClosed) {
						t.Errorf("%s: %v", name, err)
					}
				}
				if l.Carrier() || l.Stats().Carrier {
					t.Error("carrier")
				}
				l.Flush()
			})
		}
	}
}

// TestWaitEnds ends waits by their contexts.
func TestWaitEnds(t *testing.T) {
	for w, name := range map[wiring]string{apart: "apart", silent: "silent"} {
		t.Run(name, func(t *testing.T) {
			b := newBoard(t, 0x1000, 2)
			r := newRaw(t, b, 1)
			l := open(t, b.Device(t, 0, w), vnet.Config{MTU: 68})
			r.start()
			carrier(t, true, l)
			for what, f := range map[string]func(context.Context) error{
				"receive": func(ctx context.Context) error { _, err := l.Receive(ctx, make([]byte, 100)); return err },
				"peek":    func(ctx context.Context) error { _, err := l.UnsafePeek(ctx); return err },
				"send":    func(ctx context.Context) error { return l.Send(ctx, frame(60, 0)) },
				"reserve": func(ctx context.Context) error {
					if _, err := l.UnsafeReserve(ctx); err != nil {
						return err
					}
					return l.UnsafeCommit(60)
				},
				"carrier": func(ctx context.Context) error { return l.WaitCarrier(ctx, false) },
			} {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
				var err error
				for err == nil {
					err = f(ctx)
				}
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s: %v", what, err)
				}
				cancel()
			}
			// The caretaker sees to the state when nobody waits.
			b.SetState(1, 0)
			carrier(t, false, l)
			r.start()
			carrier(t, true, l)
			works(t, l, r)
		})
	}
}

// TestResetInHand resets the link while frames are in the caller's hands.
func TestResetInHand(t *testing.T) {
	l, r := against(t, 0x4000, vnet.Config{})
	for i := range 6 {
		r.send(frame(60, i))
		if _, err := l.UnsafePeek(t.Context()); err != nil {
			t.Fatal(err)
		}
		p, err := l.UnsafeReserve(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		b := r.b
		if i%2 == 0 {
			b.SetState(1, 0)
		} else {
			l.Down()
		}
		carrier(t, false, l)
		if i%3 > 0 { // what was reserved is no more, nor afterwards
			l.Up()
			r.start()
			carrier(t, true, l)
		}
		copy(p, frame(60, i)) // harms nobody
		if err := l.UnsafeCommit(60); !errors.Is(err, vnet.ErrReset) {
			t.Errorf("commit: %v", err)
		}
		if err := l.UnsafeRelease(); !errors.Is(err, vnet.ErrReset) {
			t.Errorf("release: %v", err)
		}
		l.Flush()
		if got := get16(r.other, r.used+2); i%3 > 0 && got != 0 {
			t.Errorf("%d frames were returned that the peer did not send", got)
		}
		l.Up()
		r.start()
		carrier(t, true, l)
		works(t, l, r)
	}
	if s := l.Stats(); s.Sent.Reset != 6 || s.Received.Reset != 6 {
		t.Errorf("%+v", s)
	}
}

// TestUnknownStates has the peer in states that nobody knows, and go to and fro.
func TestUnknownStates(t *testing.T) {
	b := newBoard(t, 0x4000, 2)
	r := newRaw(t, b, 1)
	r.setState(99)
	l := open(t, b.Device(t, 0, apart), vnet.Config{})
	until(t, "a look", func() bool { return l.Stats().PeerState == 99 })
	if r.state() != 0 {
		t.Errorf("state %d, the peer is in 99", r.state())
	}
	r.setState(1)
	r.await(2)
	r.setState(1<<32 - 1)
	until(t, "a look", func() bool { return l.Stats().PeerState == 1<<32-1 })
	if r.state() != 2 {
		t.Errorf("state %d, the peer is in 2^32-1", r.state())
	}
	r.start()
	carrier(t, true, l)
	r.setState(4)
	until(t, "a look", func() bool { return l.Stats().PeerState == 4 })
	if r.state() != 3 {
		t.Errorf("state %d, the peer is in 4", r.state())
	}
	for i := range uint32(20000) {
		r.setState(i * 2654435761 >> 29)
	}
	r.start()
	carrier(t, true, l)
	works(t, l, r)
}

// TestFlappingPeer has the peer's state change at each look, for so long that the
// link lets others have their turn, and then no more, without an interrupt.
func TestFlappingPeer(t *testing.T) {
	b := newBoard(t, 0x4000, 2)
	d := b.Device(t, 0, apart)
	states := []uint32{0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1}
	var mu sync.Mutex
	b.Script(0, func() uint32 {
		mu.Lock()
		defer mu.Unlock()
		if len(states) == 0 {
			return 3
		}
		s := states[0]
		states = states[1:]
		return s
	})
	l := open(t, d, vnet.Config{})
	carrier(t, true, l)
	if s := l.Stats(); s.Resets.Peer != 4 {
		t.Errorf("%+v", s)
	}
}

func TestStatsJSON(t *testing.T) {
	l, r := against(t, 0x4000, vnet.Config{})
	works(t, l, r)
	b, err := json.Marshal(l.Stats())
	if err != nil {
		t.Fatal(err)
	}
	var got vnet.Stats
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if want := l.Stats(); got != want || !bytes.Contains(b, []byte(`"peer_state":"RUN"`)) {
		t.Errorf("%s", b)
	}
}
