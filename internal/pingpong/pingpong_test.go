package pingpong

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/stream"
)

func TestMode(t *testing.T) {
	for m, want := range map[Mode]string{
		Poll: "poll", Interrupt: "interrupt",
		15: "15 (unknown)", // from the state of a hostile peer
	} {
		if got := m.String(); got != want {
			t.Errorf("mode %d: got %q, want %q", int(m), got, want)
		}
	}
}

// TestSilenceShort watches with the shortest time there is.
func TestSilenceShort(t *testing.T) {
	p := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 1, ReadWrite: 4096})
	ctx, cancel := context.WithCancelCause(t.Context())
	r := &run{Config: Config{Silence: 1}, dev: p[0], peer: 1}
	r.watch(ctx, cancel)
	if context.Cause(ctx) == nil {
		t.Error("a peer that is silent, and absent, was not noticed")
	}
}

// waitState waits until a device has the state.
func waitState(t *testing.T, d *ivshmem.Device, id, want uint32) {
	t.Helper()
	for {
		s, err := d.State(id)
		if err != nil || t.Context().Err() != nil {
			t.Fatal(err)
		}
		if s == want {
			return
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// TestPart parts from a peer that is slow. Who parts has to stay until neither
// state says anything any more, as what follows may read it as its own.
func TestPart(t *testing.T) {
	p := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 1, ReadWrite: 4096})
	r := &run{Config: Config{Mode: Poll, Phase: 4}, dev: p[0], peer: 1}
	set := func(s uint32) {
		if err := p[1].SetState(s); err != nil {
			t.Error(err)
		}
	}
	for name, next := range map[string]uint32{
		"gone":       0,
		"next phase": state(Config{Phase: 5}, stepHello),
		"a protocol": 0xdeadbeef,
		"a low one":  1,
	} {
		set(state(r.Config, stepGo))
		parted := make(chan error, 1)
		go func() { parted <- r.part(t.Context()) }()
		waitState(t, p[1], 0, state(r.Config, stepDone))
		set(state(r.Config, stepDone))
		waitState(t, p[1], 0, 0)
		time.Sleep(2 * time.Millisecond) // it looks once in a millisecond
		select {
		case err := <-parted:
			t.Errorf("%s: parted (%v) while the peer's state still said so", name, err)
		default:
			set(next)
			if err := <-parted; err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestMeet meets a peer whose state is another protocol's first.
func TestMeet(t *testing.T) {
	p := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 1, ReadWrite: 4096})
	r := &run{Config: Config{Mode: Poll}, dev: p[0], peer: 1}
	met := make(chan error, 1)
	if err := p[1].SetState(0xdeadbeef); err != nil {
		t.Fatal(err)
	}
	go func() { met <- r.step(t.Context(), stepHello, stepHello) }()
	waitState(t, p[1], 0, state(r.Config, stepHello))
	for _, s := range []uint32{0, state(Config{Phase: 7}, stepGo), state(r.Config, stepHello)} {
		select {
		case err := <-met:
			t.Fatalf("met somebody else: %v", err)
		default:
		}
		if err := p[1].SetState(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-met; err != nil {
		t.Error(err)
	}
	// Having met it, its departure is one.
	if err := p[1].SetState(0); err != nil {
		t.Fatal(err)
	}
	if err := r.step(t.Context(), stepGo, stepGo); !errors.Is(err, ivshmem.ErrGone) {
		t.Errorf("peer left: got %v, want ErrGone", err)
	}
}

// TestFollowLeft follows a peer that leaves before it has said what to do.
func TestFollowLeft(t *testing.T) {
	p := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, ReadWrite: 4096, Output: 1 << 20})
	ep, err := stream.New(p[1], stream.Config{Mode: stream.Sleep})
	if err != nil {
		t.Fatal(err)
	}
	defer ep.Close()
	l, err := ep.Listen(controlPort)
	if err != nil {
		t.Fatal(err)
	}
	if err := p[0].SetState(1); err != nil {
		t.Fatal(err)
	}
	left := make(chan error, 1)
	go func() {
		_, err := acceptFrom(t.Context(), p[1], 0, l, time.Millisecond)
		left <- err
	}()
	for {
		select {
		case err := <-left:
			if !errors.Is(err, ivshmem.ErrGone) {
				t.Errorf("got %v, want ErrGone", err)
			}
			return
		case <-time.After(time.Millisecond):
			// It has to have seen the peer before it can miss it.
			if err := p[0].SetState(0); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Millisecond)
			if err := p[0].SetState(1); err != nil {
				t.Fatal(err)
			}
		}
	}
}
