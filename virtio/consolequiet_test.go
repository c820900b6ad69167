package virtio_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// A back-end of consoles, as the page has the example, does not interrupt for what
// the driver says: Linux polls for it.
func TestConsoleBackEndIsQuiet(t *testing.T) {
	t.Parallel()
	for _, vectors := range []int{1, 2, 3} {
		b := newBoard(t, 0x8003, 1<<20, vectors)
		var got []byte
		e := newExample(t, b, 2, make([]byte, 12), nil)
		e.quiet, e.idle = 1<<1, 1<<0
		e.low = 0 // no features but those that have to be
		e.handle = func(q int, s []exampleSegment) uint32 {
			time.Sleep(time.Millisecond) // slower than who writes
			got = append(got, e.m[s[0].at:s[0].at+uint64(s[0].n)]...)
			return 0
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		d, err := console.Open(ctx, b.Device(t, 1, apart), console.Config{})
		if err != nil {
			t.Fatal(err)
		}
		p := d.Port(0)
		if err := p.Open(); err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte("something to say"), 20_000)
		if _, err := p.WriteAll(ctx, want); err != nil {
			t.Fatal(err)
		}
		if err := p.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		e.end()
		if !bytes.Equal(got, want) {
			t.Errorf("%d vectors: %d bytes arrived, want %d", vectors, len(got), len(want))
		}
	}
}
