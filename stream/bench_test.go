package stream_test

import (
	"testing"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/stream"
)

// What the code costs by itself: both ends in one goroutine.
func BenchmarkSendReceive(b *testing.B) {
	eps := endpoints(b, link.Config{Peers: 2, Vectors: 2, Output: 1 << 20}, stream.Config{Mode: stream.Poll})
	x, y := connect(b, eps[0], eps[1], 7)
	p := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		if err := x.Send(p); err != nil {
			b.Fatal(err)
		}
		if _, err := y.Receive(p); err != nil {
			b.Fatal(err)
		}
	}
}

// Messages one way, many at once.
func BenchmarkSendAll(b *testing.B) {
	eps := endpoints(b, link.Config{Peers: 2, Vectors: 2, Output: 1 << 24}, stream.Config{})
	x, y := connect(b, eps[0], eps[1], 7)
	batch := make([][]byte, 64)
	for i := range batch {
		batch[i] = make([]byte, 64)
	}
	go func() {
		p := make([]byte, 64)
		for {
			if _, err := y.Receive(p); err != nil {
				y.Close()
				return
			}
		}
	}()
	b.ReportAllocs()
	for n := 0; n < b.N; n += len(batch) {
		if _, err := x.SendAll(batch); err != nil {
			b.Fatal(err)
		}
	}
	x.CloseWrite()
	x.Read(make([]byte, 1))
}
