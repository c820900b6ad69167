package main

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"time"

	"github.com/ivshmem-go/ivshmem"
)

// RingResult is what the other side of the program oneshot counted.
type RingResult struct {
	Rung uint64 `json:"rung"` // doorbells
	Lost uint64 `json:"lost"` // wake-ups that did not come; the first one ends the run
}

// patience is how long the waiter may take to confirm what it was rung for.
const patience = 8 * time.Second

// quiet is how long nobody rings after that, so that the waiter falls asleep.
const quiet = 20 * time.Millisecond

// ring rings the waiter at random times, alone and in bursts, on all vectors.
// After every quiet moment the waiter must have seen the last sequence number.
func ring(ctx context.Context, args []string) (any, error) {
	flags := flag.NewFlagSet("ring", flag.ContinueOnError)
	device := flags.String("device", "", "PCI address or socket path")
	burst := flags.Int("burst", 4, "the most doorbells at a time")
	doorbells := flags.Uint64("doorbells", 100, "at least so many")
	duration := flags.Duration("for", 0, "and at least so long")
	seed := flags.Uint64("seed", 1, "")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	dev, err := ivshmem.Open(*device)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	random := rand.New(rand.NewPCG(*seed, 0))
	waiter := 1 - dev.ID()
	ack, err := dev.Sections().Input(waiter)
	if err != nil {
		return nil, err
	}
	if err := greet(dev); err != nil {
		return nil, err
	}
	if err := until(ctx, func() (bool, error) {
		s, err := dev.State(waiter)
		return s == 1, err
	}); err != nil {
		return nil, errors.Join(errors.New("waiting for the waiter"), err)
	}
	r := &RingResult{}
	publish := func(seq uint64, times int) error {
		if err := dev.Sections().Output.Store64(0, seq); err != nil {
			return err
		}
		for range times {
			if err := dev.Ring(waiter, random.IntN(dev.Vectors())); err != nil {
				return err
			}
			r.Rung++
		}
		return nil
	}
	seq := uint64(0)
	for start := time.Now(); r.Rung < *doorbells || time.Since(start) < *duration; {
		for range 1 + random.IntN(20) {
			seq++
			if err := publish(seq, 1+random.IntN(*burst)); err != nil {
				return r, err
			}
			time.Sleep(time.Duration(random.Int64N(int64(3 * time.Millisecond))))
		}
		// The quiet moment.
		err := until(ctx, func() (bool, error) {
			seen, err := ack.Load64(0)
			return seen == seq, err
		})
		if errors.Is(err, errPatience) {
			r.Lost++
			return r, nil
		}
		if err != nil {
			return r, err
		}
		time.Sleep(quiet)
	}
	if err := publish(endOfSequence, 1); err != nil {
		return r, err
	}
	// The output section is the link's: the waiter reads it until it is gone.
	return r, until(ctx, func() (bool, error) {
		s, err := dev.State(waiter)
		return s == 0, err
	})
}

// greet tells the other side that this one is there, and that what its section
// has from former programs does not count.
func greet(dev *ivshmem.Device) error {
	if err := dev.Sections().Output.Store64(0, 0); err != nil {
		return err
	}
	return dev.SetState(1)
}

var errPatience = errors.New("it did not happen")

// until looks at a condition until it holds, or patience ends.
func until(ctx context.Context, ready func() (bool, error)) error {
	end := time.After(patience)
	for {
		ok, err := ready()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-end:
			return errPatience
		case <-time.After(100 * time.Microsecond):
		}
	}
}
