package virtio_test

import (
	"context"
	"testing"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// consume is a device that returns buffers as they are.
func consume(entries int) virtio.Device {
	return virtio.Device{ID: 4, Queues: []int{entries}, Run: func(ctx context.Context, s *virtio.Session) error {
		q := s.Queue(0)
		for {
			c, err := q.Next(ctx)
			if err == nil {
				err = q.Push(c, 0)
			}
			if err != nil {
				return err
			}
		}
	}}
}

// over is a driver of a device over the link service.
func over(t testing.TB, d virtio.Device, entries int) (*virtio.Driver, *virtio.DriverQueue) {
	t.Helper()
	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: protocol, ReadWrite: 1 << 20})
	serve(t, peers[0], d)
	driver, err := virtio.Open(t.Context(), peers[1], virtio.DriverConfig{ID: 4})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { driver.Close() })
	q, err := driver.SetUpQueue(t.Context(), 0, entries)
	if err != nil {
		t.Fatal(err)
	}
	if err := driver.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return driver, q
}

// BenchmarkDescriptors is how many buffers of one descriptor pass from driver to
// device and back.
func BenchmarkDescriptors(b *testing.B) {
	const entries = 256
	d, q := over(b, consume(entries), entries)
	var bufs []*virtio.Buffer
	for range entries {
		bufs = append(bufs, alloc(b, d, 64))
	}
	ctx := context.Background()
	b.ReportAllocs()
	b.ResetTimer()
	for sent, back := 0, 0; back < b.N; {
		for sent < b.N && sent-back < entries {
			if err := q.Add(bufs[sent%entries], virtio.Out(0, 64)); err != nil {
				b.Fatal(err)
			}
			sent++
		}
		if err := q.Kick(); err != nil {
			b.Fatal(err)
		}
		if _, _, err := q.Next(ctx); err != nil {
			b.Fatal(err)
		}
		back++
		for {
			buf, _, err := q.TryNext()
			if err != nil {
				b.Fatal(err)
			}
			if buf == nil {
				break
			}
			back++
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "descriptors/s")
}

// BenchmarkRoundTrip is a request and its answer between two that sleep.
func BenchmarkRoundTrip(b *testing.B) {
	d, q := over(b, echo(8), 8)
	buf := alloc(b, d, 128)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		roundTrip(b, ctx, q, buf)
	}
}

func roundTrip(t testing.TB, ctx context.Context, q *virtio.DriverQueue, buf *virtio.Buffer) {
	if err := q.Add(buf, virtio.Out(0, 64), virtio.In(64, 64)); err != nil {
		t.Fatal(err)
	}
	if err := q.Kick(); err != nil {
		t.Fatal(err)
	}
	if _, n, err := q.Next(ctx); err != nil || n != 64 {
		t.Fatal(n, err)
	}
}
