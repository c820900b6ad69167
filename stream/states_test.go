package stream_test

import (
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/boardtest"
	"github.com/ivshmem-go/ivshmem/stream"
)

// What makes an endpoint look at the State Table again and again: there are no
// interrupts to tell that it changed, or some of them may be lost.
var lookers = map[string]boardtest.Wiring{"without interrupts": boardtest.Silent, "one-shot": boardtest.OneShots}

// trips returns a round trip between ends that sleep, on a board whose looks at
// the State Table go through trap.
func trips(t *testing.T, looker string, peers uint32, trap func()) func() {
	b := boardtest.New(t, boardtest.Config{Peers: peers, Vectors: 1, Output: 64 << 10, Trap: trap})
	var eps [2]*stream.Endpoint
	for i := range eps {
		eps[i] = newEndpoint(t, b.Device(t, uint32(i), lookers[looker]), stream.Config{Mode: stream.Sleep})
	}
	x, y := connect(t, eps[0], eps[1], 7)
	var echo sync.WaitGroup
	echo.Go(func() { io.Copy(y, y) })
	t.Cleanup(func() {
		x.Close()
		y.Close()
		echo.Wait()
	})
	return func() {
		t.Helper()
		done := make(chan error, 1)
		go func() {
			p := make([]byte, 8)
			_, err := x.Write(p)
			if err == nil {
				_, err = io.ReadFull(x, p)
			}
			done <- err
		}()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a message waits for a look at the State Table")
		}
	}
}

// TestStateTableStalls has nobody wait for a look at the State Table: where it
// traps, each word is a message to the service.
func TestStateTableStalls(t *testing.T) {
	for name := range lookers {
		t.Run(name, func(t *testing.T) {
			var stalls, stalled atomic.Bool
			release := make(chan struct{})
			end := sync.OnceFunc(func() { close(release) })
			defer end()
			trip := trips(t, name, 3, func() {
				if stalls.Load() {
					stalled.Store(true)
					<-release
				}
			})
			stalls.Store(true)
			for !stalled.Load() {
				trip()
			}
			trip()
			end()
		})
	}
}

// TestStateTableShare has looks at the State Table take a share of the time
// only, however many peers there are.
func TestStateTableShare(t *testing.T) {
	for name := range lookers {
		t.Run(name, func(t *testing.T) {
			const peers = 8
			var looks, spent atomic.Int64
			trip := trips(t, name, peers, func() {
				begin := time.Now()
				time.Sleep(100 * time.Microsecond)
				spent.Add(int64(time.Since(begin)))
				looks.Add(1)
			})
			from, begin := spent.Load(), time.Now()
			for most := looks.Load() + 2*20*(peers-1); looks.Load() < most; {
				trip()
			}
			// Both ends look, each for a tenth of the time.
			took, elapsed := time.Duration(spent.Load()-from), time.Since(begin)
			if took > elapsed/3 {
				t.Errorf("looks at the State Table took %v of %v", took, elapsed)
			}
		})
	}
}
