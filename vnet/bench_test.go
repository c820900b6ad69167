package vnet_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// BenchmarkFrames sends frames one way between two goroutines, in batches of 64,
// without copies: the sender fills what it reserves, the receiver copies out of what it
// peeks at. Beside it, under the name "memcpy", what the two copies cost.
func BenchmarkFrames(b *testing.B) {
	for _, size := range []int{64, 1500} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			l := pair(b, 1<<20, vnet.Config{MTU: 1500})
			ctx := b.Context()
			done := make(chan error, 1)
			n := b.N
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.ResetTimer()
			go func() {
				out := make([]byte, size)
				for range n {
					p, err := l[1].UnsafePeek(ctx)
					if err == nil {
						copy(out, p)
						err = l[1].UnsafeRelease()
					}
					if err != nil {
						done <- err
						return
					}
				}
				done <- nil
			}()
			in := make([]byte, size)
			for i := range n {
				p, err := l[0].UnsafeReserve(ctx)
				if err != nil {
					b.Fatal(err)
				}
				copy(p, in)
				if err := l[0].UnsafeCommit(size); err != nil {
					b.Fatal(err)
				}
				if i%64 == 63 {
					l[0].Flush()
				}
			}
			l[0].Flush()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "frames/s")
			s := l[0].Stats()
			b.ReportMetric(float64(s.Sent.Doorbells+l[1].Stats().Received.Doorbells)/float64(n), "doorbells/op")
		})
		b.Run(fmt.Sprintf("size=%d/memcpy", size), func(b *testing.B) {
			in, between, out := make([]byte, size), make([]byte, 1<<20), make([]byte, size)
			b.SetBytes(int64(size))
			at := 0
			for b.Loop() {
				copy(between[at:at+size], in)
				copy(out, between[at:])
				if at += size; at+size > len(between) {
					at = 0
				}
			}
		})
	}
}

// BenchmarkRoundTrip sends a frame there and back between two goroutines that
// sleep.
func BenchmarkRoundTrip(b *testing.B) {
	l := pair(b, 1<<20, vnet.Config{MTU: 1500})
	ctx := context.Background()
	done := make(chan error, 1)
	n := b.N
	go func() {
		p := make([]byte, vnet.MaxFrame)
		for range n {
			m, err := l[1].Receive(ctx, p)
			if err == nil {
				err = l[1].Send(ctx, p[:m])
			}
			if err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	b.ReportAllocs()
	p := make([]byte, vnet.MaxFrame)
	b.ResetTimer()
	for range n {
		if err := l[0].Send(ctx, p[:64]); err != nil {
			b.Fatal(err)
		}
		if _, err := l[0].Receive(ctx, p); err != nil {
			b.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}
