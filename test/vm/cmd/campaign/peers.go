package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
)

// peers lets one guest watch the states by interrupts, while another sets its
// own to and fro, and is killed in the end; again and again with fresh ones.
func peers(ctx context.Context, r *Report) error {
	changesPerGuest := 200
	if r.Quick {
		changesPerGuest = 10
	}
	r.Config["changes_per_guest"] = changesPerGuest
	service, err := vm.Serve(ctx, nil, "--quiet")
	if err != nil {
		return err
	}
	defer service.Close()
	config := vm.Config{Driver: "vfio-pci", Devices: []vm.Device{{Socket: service.Socket}}}
	// The watcher stays; the one who is watched is killed and replaced.
	r.say("booting the watching guest")
	watching, err := vm.Start(ctx, config)
	if err != nil {
		return err
	}
	defer watching.Close()
	var seen, deaths, wrong uint64
	w, err := checks.Start(checks.Guest(watching), "ivshctl", "state", "watch", "--json")
	if err != nil {
		return err
	}
	was := uint32(0)
	// expect waits until the watcher has seen a state. A state 0 may have
	// been there before for a moment; nothing else may.
	expect := func(state uint32) error {
		for {
			line, err := w.Line(ctx)
			if err != nil {
				return fmt.Errorf("state %d was not seen: %w", state, err)
			}
			saw := func(state uint32) bool {
				return line == fmt.Sprintf(`{"peer":1,"state":%d,"was":%d}`, state, was)
			}
			switch {
			case saw(state):
				was = state
				return nil
			case saw(0):
				was = 0
			default:
				wrong++
				return fmt.Errorf("the watcher saw %s, expected state %d", line, state)
			}
		}
	}
	for begin := time.Now(); deaths == 0 || time.Since(begin) < r.Duration; {
		r.say("booting a guest to be watched")
		g, err := vm.Start(ctx, config)
		if err != nil {
			return err
		}
		err = func() error {
			defer g.Close()
			state := uint32(0)
			for range changesPerGuest {
				state = 1 + (state+r.rand.Uint32N(1<<31))%(1<<32-2)
				// Each command starts at state 0, sets its own, and leaves it.
				res, err := g.Run(ctx, "ivshctl", "state", "set", fmt.Sprint(state), "--hold")
				if err != nil {
					return err
				}
				if res.ExitCode() != 0 {
					return fmt.Errorf("state set: %v: %s", res.Status, res.Stderr)
				}
				if err := expect(state); err != nil {
					return err
				}
				seen++
			}
			if r.Sabotage {
				// Nobody sees to its death.
				if err := freeze(ctx, service.Child); err != nil {
					return err
				}
			}
			killed := time.Now()
			g.Kill()
			if err := expect(0); err != nil {
				return err
			}
			deaths++
			r.sample("death_to_interrupt_ms", float64(time.Since(killed).Microseconds())/1e3)
			return nil
		}()
		if err != nil {
			return err
		}
	}
	r.atLeast("state changes seen", float64(seen), float64(changesPerGuest))
	r.atLeast("deaths seen", float64(deaths), 1)
	r.atMost("wrong states", float64(wrong), 0)
	// `state watch` says so on standard error when it has no interrupts.
	r.atMost("bytes of complaints of the watcher", float64(len(w.Stderr())), 0)
	for _, ms := range r.Samples["death_to_interrupt_ms"] {
		r.info("death to interrupt, ms", ms)
	}
	return nil
}

// freeze stops a process, and returns when it has stopped.
func freeze(ctx context.Context, c *vm.Child) error {
	c.Signal(syscall.SIGSTOP)
	for ctx.Err() == nil {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.Pid()))
		if err != nil {
			return err
		}
		// pid (name) state …
		if i := bytes.LastIndexByte(stat, ')'); i >= 0 && bytes.HasPrefix(stat[i:], []byte(") T")) {
			return nil
		}
	}
	return ctx.Err()
}
