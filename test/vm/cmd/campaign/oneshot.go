package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// endOfSequence tells the waiter in the guest to end.
const endOfSequence = 1<<64 - 1

// oneShot rings a guest at random times, alone and in bursts, on all vectors,
// while the guest arms, looks and sleeps. After every quiet moment the guest
// must have seen the last sequence number; each arm must have let exactly one
// interrupt through.
func oneShot(ctx context.Context, r *Report) error {
	doorbells, sleeps := uint64(10000), 1000.0
	if r.Quick {
		doorbells, sleeps = 300, 30
	}
	return ringGuest(ctx, r, vm.Config{Driver: "vfio-pci"}, 4, doorbells, sleeps, r.Duration)
}

// doorbells does the same with larger bursts, on each back end that has
// interrupts, half of the time each.
func doorbells(ctx context.Context, r *Report) error {
	doorbells, sleeps := uint64(500000), 50000.0
	if r.Quick {
		doorbells, sleeps = 2000, 50
	}
	for _, c := range []vm.Config{
		{Driver: vm.OwnModule, Kernel: fetch.Bookworm},
		{Driver: "vfio-pci"},
	} {
		if err := ringGuest(ctx, r, c, 20, doorbells, sleeps, r.Duration/2); err != nil {
			return fmt.Errorf("%s: %w", c.Driver, err)
		}
	}
	return nil
}

// ringGuest is one guest's share of a campaign; burst is the most doorbells at
// a time.
func ringGuest(ctx context.Context, r *Report, config vm.Config, burst int, doorbells uint64, sleeps float64, d time.Duration) error {
	const vectors = 4
	r.Config["vectors"], r.Config["doorbells"], r.Config["burst"] = vectors, doorbells, burst
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
	r.say("booting a guest with %s", config.Driver)
	config.Devices = []vm.Device{{Socket: service.Socket}}
	config.Files = map[string]string{"/bin/guestprog": program}
	g, err := vm.Start(ctx, config)
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
	rung, lost, err := ringAtRandom(ctx, r, dev, waiter, burst, doorbells, d)
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
	name := func(s string) string { return config.Driver + ": " + s }
	r.atLeast(name("doorbells"), float64(rung), float64(doorbells))
	r.atMost(name("lost wake-ups"), float64(lost), 0)
	r.atLeast(name("interrupts"), float64(res.Interrupts), sleeps)
	r.atLeast(name("waits that slept"), float64(res.Slept), sleeps)
	r.info(name("waits"), float64(res.Waits))
	r.info(name("arms"), float64(res.Arms))
	r.atMost(name("interrupts beyond arms"), float64(res.Excess), 0)
	// The last arm may not have been used up yet.
	r.atMost(name("arms without their interrupt"), float64(res.Arms)-float64(res.Interrupts), 1)
	return nil
}

// ringAtRandom rings until there were enough doorbells and the time is up. It
// stops at the first wake-up that is lost.
func ringAtRandom(ctx context.Context, r *Report, dev *ivshmem.Device, waiter *background, burst int, doorbells uint64, d time.Duration) (rung, lost uint64, err error) {
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
	for start := time.Now(); rung < doorbells || time.Since(start) < d; {
		for range 1 + r.rand.IntN(20) {
			seq++
			if err := publish(seq, 1+r.rand.IntN(burst)); err != nil {
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
