package stream_test

import (
	"io"
	"sync"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/boardtest"
	"github.com/ivshmem-go/ivshmem/stream"
)

// TestAdaptiveLooksAgain has interrupts take their time, as between guests. Two
// that have slept for long, and are busy with each other then, look again, and
// ring no more.
func TestAdaptiveLooksAgain(t *testing.T) {
	before := stream.SetMaxSpinners(2) // both are in this process
	defer stream.SetMaxSpinners(before)
	if before == 0 {
		return // a single processor: nobody ever looks
	}
	b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 2, Output: 64 << 10, Delay: 300 * time.Microsecond})
	x, y := newEndpoint(t, b.Device(t, 0, boardtest.Apart), stream.Config{}), newEndpoint(t, b.Device(t, 1, boardtest.Apart), stream.Config{})
	c, d := connect(t, x, y, 7)
	var echo sync.WaitGroup
	echo.Go(func() { io.Copy(d, d) })
	defer echo.Wait()
	defer d.Close()
	defer c.Close()
	p := make([]byte, 8)
	trip := func() {
		if _, err := c.Write(p); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, p); err != nil {
			t.Fatal(err)
		}
	}
	const idle = 20 * time.Millisecond
	for range 15 { // each time it looks for half as long, until not at all
		time.Sleep(idle)
		trip()
	}
	const trips = 200
	for end := time.Now().Add(30 * time.Second); ; {
		from := x.Stats().Doorbells + y.Stats().Doorbells
		for range trips {
			trip()
		}
		rung := x.Stats().Doorbells + y.Stats().Doorbells - from
		if rung < trips/2 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("both are busy, and %d of %d messages ring", rung, 2*trips)
		}
	}
}
