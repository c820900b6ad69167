package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
)

// endOfSequence tells the waiter in the guest to end.
const endOfSequence = 1<<64 - 1

// oneShot rings a guest at random times, alone and in bursts, on all vectors,
// while the guest arms, looks and sleeps. After every quiet moment the guest
// must have seen the last sequence number; each arm must have let exactly one
// interrupt through.
func oneShot(ctx context.Context, r *Report) error {
	const vectors = 4
	doorbells, sleeps := 10000.0, 1000.0
	if r.Quick {
		doorbells, sleeps = 300, 30
	}
	r.Config["vectors"], r.Config["doorbells"] = vectors, doorbells
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program, err := buildGuestProgram(ctx, dir)
	if err != nil {
		return err
	}
	service, err := vm.Serve(ctx, nil, "--vectors", fmt.Sprint(vectors), "--quiet")
	if err != nil {
		return err
	}
	defer service.Close()
	r.say("booting a guest")
	g, err := vm.Start(ctx, vm.Config{
		Driver: "vfio-pci", Devices: []vm.Device{{Socket: service.Socket}},
		Files: map[string]string{"/bin/guestprog": program},
	})
	if err != nil {
		return err
	}
	defer g.Close()
	dev, err := ivshmem.Open(service.Socket)
	if err != nil {
		return err
	}
	defer dev.Close()
	argv := []string{"guestprog", "oneshot"}
	if r.Sabotage {
		argv = append(argv, "-lose", "20")
	}
	waiter, err := start(g, argv...)
	if err != nil {
		return err
	}
	rung, lost, err := ringAtRandom(ctx, r, dev, waiter, uint64(doorbells))
	if err != nil {
		return errors.Join(err, errors.New(waiter.stderr.String()))
	}
	var res struct {
		Arms, Interrupts, Waits, Slept, Excess uint64
	}
	if lost == 0 {
		if err := waiter.result(ctx, &res); err != nil {
			return err
		}
	}
	r.atLeast("doorbells", float64(rung), doorbells)
	r.atMost("lost wake-ups", float64(lost), 0)
	r.atLeast("interrupts", float64(res.Interrupts), sleeps)
	r.atLeast("waits that slept", float64(res.Slept), sleeps)
	r.info("waits", float64(res.Waits))
	r.info("arms", float64(res.Arms))
	r.atMost("interrupts beyond arms", float64(res.Excess), 0)
	// The last arm may not have been used up yet.
	r.atMost("arms without their interrupt", float64(res.Arms)-float64(res.Interrupts), 1)
	return nil
}

// ringAtRandom rings until there were enough doorbells and the time is up. It
// stops at the first wake-up that is lost.
func ringAtRandom(ctx context.Context, r *Report, dev *ivshmem.Device, waiter *background, doorbells uint64) (rung, lost uint64, err error) {
	guest := 1 - dev.ID()
	ack, err := dev.Sections().Input(guest)
	if err != nil {
		return 0, 0, err
	}
	if err := until(ctx, waiter, func() (bool, error) {
		s, err := dev.State(guest)
		return s == 1, err
	}); err != nil {
		return 0, 0, fmt.Errorf("waiting for the guest: %w", err)
	}
	out := dev.Sections().Output
	publish := func(seq uint64, times int) error {
		if err := out.Store64(0, seq); err != nil {
			return err
		}
		for range times {
			if err := dev.Ring(guest, r.rand.IntN(dev.Vectors())); err != nil {
				return err
			}
			rung++
		}
		return nil
	}
	seq := uint64(0)
	for start := time.Now(); rung < doorbells || time.Since(start) < r.Duration; {
		for range 1 + r.rand.IntN(20) {
			seq++
			if err := publish(seq, 1+r.rand.IntN(3)*r.rand.IntN(3)); err != nil {
				return rung, lost, err
			}
			time.Sleep(time.Duration(r.rand.Int64N(int64(3 * time.Millisecond))))
		}
		// The quiet moment.
		err := until(ctx, waiter, func() (bool, error) {
			seen, err := ack.Load64(0)
			return seen == seq, err
		})
		if errors.Is(err, errPatience) {
			return rung, lost + 1, nil
		}
		if err != nil {
			return rung, lost, err
		}
	}
	return rung, 0, publish(endOfSequence, 1)
}

var errPatience = errors.New("it did not happen")

// until looks at a condition until it holds, the process ends, or patience
// does.
func until(ctx context.Context, p *background, ready func() (bool, error)) error {
	end := time.After(patience / 4)
	for {
		ok, err := ready()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.Done():
			return errors.New("the program in the guest ended")
		case <-end:
			return errPatience
		case <-time.After(100 * time.Microsecond):
		}
	}
}
