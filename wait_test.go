package ivshmem_test

import (
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var pair = link.Config{Peers: 2, Vectors: 4, ReadWrite: 4096, Output: 4096}

// ways are all the ways to sleep and arm.
var ways = map[string][]ivshmem.Option{
	"thread":          {ivshmem.WithSleep(ivshmem.SleepThread)},
	"poller":          {ivshmem.WithSleep(ivshmem.SleepPoller)},
	"thread one-shot": {ivshmem.WithSleep(ivshmem.SleepThread), ivshmem.WithOneShot()},
	"poller one-shot": {ivshmem.WithSleep(ivshmem.SleepPoller), ivshmem.WithOneShot()},
}

func eachWay(t *testing.T, f func(t *testing.T, opts []ivshmem.Option)) {
	for name, opts := range ways {
		t.Run(name, func(t *testing.T) { f(t, opts) })
	}
}

func TestWaitReadyAtOnce(t *testing.T) {
	p := ivshmemtest.Peers(t, pair)
	if err := p[0].Wait(t.Context(), nil, func() bool { return true }); err != nil {
		t.Error(err)
	}
}

func TestWaitByVector(t *testing.T) {
	eachWay(t, func(t *testing.T, opts []ivshmem.Option) {
		p := ivshmemtest.Peers(t, pair, opts...)
		for v := range 4 {
			if err := p[0].Ring(1, v); err != nil {
				t.Fatal(err)
			}
			if err := p[1].Wait(t.Context(), []int{v}, func() bool { return p[1].Interrupts(v) == 1 }); err != nil {
				t.Fatal(err)
			}
			for other := v + 1; other < 4; other++ {
				if n := p[1].Interrupts(other); n != 0 {
					t.Errorf("vector %d was rung, vector %d counts %d", v, other, n)
				}
			}
		}
	})
}

// TestWaitNoLostWakeup lets two peers hand a number to and fro: a wake-up
// that is lost stops the test.
func TestWaitNoLostWakeup(t *testing.T) {
	const rounds = 2000
	eachWay(t, func(t *testing.T, opts []ivshmem.Option) {
		p := ivshmemtest.Peers(t, pair, opts...)
		errs := make(chan error, 2)
		play := func(own, other *ivshmem.Device, first uint32) {
			in, err := own.Sections().Input(other.ID())
			if err != nil {
				errs <- err
				return
			}
			for n := first; n <= rounds; n += 2 {
				var got uint32
				if err := own.Wait(t.Context(), nil, func() bool {
					got, err = in.Load32(0)
					return got == n-1 || err != nil
				}); err != nil {
					errs <- err
					return
				}
				if err := own.Sections().Output.Store32(0, n); err != nil {
					errs <- err
					return
				}
				if err := own.Ring(other.ID(), int(n%3)); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}
		go play(p[0], p[1], 1)
		go play(p[1], p[0], 2)
		for range 2 {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestWaitMany lets many goroutines wait for conditions of their own. Each is
// woken for its own, in whatever order, and one interrupt wakes no other.
func TestWaitMany(t *testing.T) {
	const n = 200
	eachWay(t, func(t *testing.T, opts []ivshmem.Option) {
		p := ivshmemtest.Peers(t, pair, opts...)
		var turn atomic.Int64
		turn.Store(-1)
		var wg sync.WaitGroup
		done := make(chan int, n)
		for i := range n {
			wg.Go(func() {
				if err := p[0].Wait(t.Context(), []int{i % 4}, func() bool { return turn.Load() >= int64(i) }); err != nil {
					t.Error(err)
				}
				done <- i
			})
		}
		for i := range n {
			turn.Store(int64(i))
			if err := p[1].Ring(0, i%4); err != nil {
				t.Fatal(err)
			}
			if got := <-done; got != i {
				t.Fatalf("waiter %d returned, want %d", got, i)
			}
		}
		wg.Wait()
	})
}

func TestWaitContext(t *testing.T) {
	eachWay(t, func(t *testing.T, opts []ivshmem.Option) {
		p := ivshmemtest.Peers(t, pair, opts...)
		// A leader and followers that give up in any order, and one that stays.
		stay := make(chan error, 1)
		var asked atomic.Int64
		go func() {
			stay <- p[0].Wait(t.Context(), []int{1}, func() bool { return p[0].Interrupts(1) > 0 })
		}()
		for range 20 {
			var wg sync.WaitGroup
			ctx, cancel := context.WithCancel(t.Context())
			for range 5 {
				wg.Go(func() {
					err := p[0].Wait(ctx, []int{2}, func() bool {
						if asked.Add(1)%3 == 0 {
							cancel()
						}
						return false
					})
					if !errors.Is(err, context.Canceled) {
						t.Errorf("got %v, want context.Canceled", err)
					}
				})
			}
			wg.Wait()
			cancel()
		}
		if err := p[1].Ring(0, 1); err != nil {
			t.Fatal(err)
		}
		if err := <-stay; err != nil {
			t.Errorf("the one that stayed: %v", err)
		}
	})
	p := ivshmemtest.Peers(t, pair)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p[0].Wait(ctx, nil, func() bool { return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that ended before: got %v", err)
	}
}

// TestWaitContextReady ends the context of a waiter just when its condition
// comes true. What the condition took must not be lost: Wait reports it.
func TestWaitContextReady(t *testing.T) {
	p := ivshmemtest.Peers(t, pair)
	leaderCtx, endLeader := context.WithCancel(t.Context())
	leading := make(chan struct{})
	left := make(chan error, 1)
	asked := 0
	go func() {
		left <- p[0].Wait(leaderCtx, nil, func() bool {
			if asked++; asked == 2 {
				close(leading)
			}
			return false
		})
	}()
	<-leading
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		done := make(chan error, 1)
		go func() {
			done <- p[0].Wait(ctx, nil, func() bool {
				if n++; n < 2 {
					return false
				}
				cancel()
				return true
			})
		}()
		for waiting := true; waiting; {
			if err := p[1].Ring(0, 1); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("ready reported true, Wait returned %v", err)
				}
				waiting = false
			default:
			}
		}
		cancel()
	}
	endLeader()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestWaitPanic lets ready panic: the device can be closed on the way out, so
// that the program ends with that panic and does not hang.
func TestWaitPanic(t *testing.T) {
	for call := 1; call <= 2; call++ {
		p := ivshmemtest.Peers(t, pair)
		func() {
			defer func() {
				if got := recover(); got != "ready" {
					t.Errorf("call %d: recovered %v", call, got)
				}
			}()
			defer p[0].Close()
			n := 0
			p[0].Wait(t.Context(), nil, func() bool {
				if n++; n == call {
					panic("ready")
				}
				return false
			})
		}()
	}
}

func TestWaitClose(t *testing.T) {
	eachWay(t, func(t *testing.T, opts []ivshmem.Option) {
		p := ivshmemtest.Peers(t, pair, opts...)
		const n = 10
		errs := make(chan error, n)
		var asked sync.WaitGroup
		asked.Add(n)
		for range n {
			var once sync.Once
			go func() {
				errs <- p[0].Wait(t.Context(), nil, func() bool { once.Do(asked.Done); return false })
			}()
		}
		asked.Wait()
		if err := p[0].Close(); err != nil {
			t.Fatal(err)
		}
		for range n {
			if err := <-errs; !errors.Is(err, os.ErrClosed) {
				t.Errorf("got %v, want os.ErrClosed", err)
			}
		}
		if err := p[0].Wait(t.Context(), nil, func() bool { return false }); !errors.Is(err, os.ErrClosed) {
			t.Errorf("wait after close: got %v", err)
		}
		if err := p[0].SetState(1); !errors.Is(err, os.ErrClosed) {
			t.Errorf("set state after close: got %v", err)
		}
		if _, err := p[0].Sections().ReadWrite.Load32(0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("shared memory after close: got %v", err)
		}
	})
}

func TestWaitServiceGone(t *testing.T) {
	eachWay(t, func(t *testing.T, opts []ivshmem.Option) {
		path, stop := ivshmemtest.ServeUntil(t, pair, pcidev.Options{})
		d, err := ivshmem.Open(path, opts...)
		if err != nil {
			t.Fatal(err)
		}
		const n = 3
		errs := make(chan error, n)
		for range n {
			go func() { errs <- d.Wait(t.Context(), nil, func() bool { return false }) }()
		}
		stop()
		for range n {
			if err := <-errs; !errors.Is(err, ivshmem.ErrGone) {
				t.Errorf("got %v, want ErrGone", err)
			}
		}
		if err := d.SetState(1); !errors.Is(err, ivshmem.ErrGone) {
			t.Errorf("set state: got %v, want ErrGone", err)
		}
		// The memory is still there, and closing is no error.
		if err := d.Sections().ReadWrite.Store32(0, 1); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}

func TestWaitArguments(t *testing.T) {
	p := ivshmemtest.Peers(t, pair)
	never := func() bool { t.Error("asked"); return false }
	for _, v := range []int{-1, 4} {
		if err := p[0].Wait(t.Context(), []int{v}, never); err == nil {
			t.Errorf("vector %d accepted", v)
		}
		if err := p[0].Ring(1, v); err == nil {
			t.Errorf("ring of vector %d accepted", v)
		}
	}
	if err := p[0].Ring(2, 0); err == nil {
		t.Error("ring of peer 2 of 2 accepted")
	}
}

func TestOneShotArmsOnce(t *testing.T) {
	p := ivshmemtest.Peers(t, pair, ivshmem.WithOneShot())
	if !p[0].OneShot() {
		t.Fatal("one-shot mode is off")
	}
	// Of all these, the first one is delivered, and the rest discarded.
	for range 100 {
		if err := p[1].Ring(0, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := p[0].Wait(t.Context(), nil, func() bool { return p[0].Interrupts(1) > 0 }); err != nil {
		t.Fatal(err)
	}
	if n := p[0].Interrupts(1); n != 1 {
		t.Errorf("one arm let %d interrupts through, want 1", n)
	}
}

func TestRecheck(t *testing.T) {
	eachWay(t, func(t *testing.T, opts []ivshmem.Option) {
		p := ivshmemtest.Peers(t, pair, opts...)
		var ready [3]atomic.Bool
		var asked atomic.Int32
		done := make(chan error, len(ready))
		for i := range ready {
			go func() {
				done <- p[0].Wait(t.Context(), []int{i}, func() bool {
					asked.Add(1)
					return ready[i].Load()
				})
			}()
		}
		for asked.Load() < int32(len(ready)) {
			runtime.Gosched()
		}
		for i := range ready {
			ready[i].Store(true)
			p[0].Recheck()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
	})
}
