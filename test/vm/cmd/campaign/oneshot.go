package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

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
	program, err := buildGuestProgram(ctx, dir, vm.AMD64)
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
	argv := []string{"guestprog", "oneshot"}
	if r.Sabotage {
		argv = append(argv, "-lose", "20")
	}
	waiter, err := checks.Start(checks.Guest(g), argv...)
	if err != nil {
		return err
	}
	ringer, err := checks.Start(checks.Host(dir), "guestprog", "ring", "-device", service.Socket, "-burst", fmt.Sprint(burst),
		"-doorbells", fmt.Sprint(doorbells), "-for", d.String(), "-seed", fmt.Sprint(r.rand.Uint64()))
	if err != nil {
		return err
	}
	defer ringer.Kill()
	select {
	case <-ringer.Done():
	case <-ctx.Done():
		return ctx.Err()
	}
	var rang struct{ Rung, Lost uint64 }
	if err := ringer.Result(ctx, &rang); err != nil {
		return errors.Join(err, errors.New(waiter.Stderr()))
	}
	var res struct {
		Arms, Interrupts, Waits, Slept, Excess uint64
	}
	if rang.Lost == 0 {
		if err := waiter.Result(ctx, &res); err != nil {
			return err
		}
	}
	name := func(s string) string { return config.Driver + ": " + s }
	r.atLeast(name("doorbells"), float64(rang.Rung), float64(doorbells))
	r.atMost(name("lost wake-ups"), float64(rang.Lost), 0)
	r.atLeast(name("interrupts"), float64(res.Interrupts), sleeps)
	r.atLeast(name("waits that slept"), float64(res.Slept), sleeps)
	r.info(name("waits"), float64(res.Waits))
	r.info(name("arms"), float64(res.Arms))
	r.atMost(name("interrupts beyond arms"), float64(res.Excess), 0)
	// The last arm may not have been used up yet.
	r.atMost(name("arms without their interrupt"), float64(res.Arms)-float64(res.Interrupts), 1)
	return nil
}
