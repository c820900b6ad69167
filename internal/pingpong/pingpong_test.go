package pingpong

import (
	"context"
	"testing"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
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
