package main

import (
	"context"
	"errors"
	"flag"
	"runtime"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/peer"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/uio"
	"github.com/ivshmem-go/ivshmem/vfio"
)

// OneShotResult is what the waiter of the campaign oneshot counted.
type OneShotResult struct {
	Arms       uint64 `json:"arms"`       // writes of 1 to Interrupt Control
	Interrupts uint64 `json:"interrupts"` // delivered, over all vectors
	Waits      uint64 `json:"waits"`
	Slept      uint64 `json:"slept"` // waits in which the thread gave up the CPU
	Last       uint64 `json:"last"`  // the last sequence number seen
	// Excess is how often more interrupts had come than there were arms.
	Excess uint64 `json:"excess"`
}

// endOfSequence ends the run.
const endOfSequence = 1<<64 - 1

// armCounter is a back end that counts how often the device is armed, and in
// a sabotaged run loses some of the arms.
type armCounter struct {
	ivshmem.Backend
	arms atomic.Uint64
	lose uint64
}

func (a *armCounter) Store(r regs.Register, v uint32) error {
	if r == regs.InterruptControl && v == 1 {
		if n := a.arms.Add(1); a.lose > 0 && n%a.lose == 0 {
			return nil
		}
	}
	return a.Backend.Store(r, v)
}

// backEnd opens what carries a device, which Open keeps to itself.
func backEnd(device string) (ivshmem.Backend, error) {
	if strings.Contains(device, "/") {
		return peer.Dial(device)
	}
	found, err := ivshmem.Find(device)
	if err != nil {
		return nil, err
	}
	dev, err := sysfs.Root.Device(found.Address)
	switch {
	case err != nil:
		return nil, err
	case found.Driver == vfio.Driver:
		return vfio.Open(found.Address)
	case uio.Carries(dev):
		return uio.Open(found.Address)
	case uio.IsGeneric(dev):
		return uio.OpenGeneric(found.Address)
	}
	return dev.Open()
}

// oneShot waits for a sequence number in the other peer's output section to
// grow, in one-shot mode, and confirms each that it sees in its own.
func oneShot(ctx context.Context, args []string) (any, error) {
	flags := flag.NewFlagSet("oneshot", flag.ContinueOnError)
	device := flags.String("device", "", "PCI address or socket path; the only one")
	lose := flags.Uint64("lose", 0, "lose every Nth arm")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	carrier, err := backEnd(*device)
	if err != nil {
		return nil, err
	}
	counter := &armCounter{Backend: carrier, lose: *lose}
	dev, err := ivshmem.New(counter, ivshmem.WithOneShot())
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	in, err := dev.Sections().Input(1 - dev.ID())
	if err != nil {
		return nil, err
	}
	if err := until(ctx, func() (bool, error) {
		s, err := dev.State(1 - dev.ID())
		return s == 1, err
	}); err != nil {
		return nil, errors.Join(errors.New("waiting for the other side"), err)
	}
	if err := greet(dev); err != nil {
		return nil, err
	}
	runtime.LockOSThread()
	r := &OneShotResult{}
	var seen uint64
	for {
		var now uint64
		var loadErr error
		before := voluntarySwitches()
		err := dev.Wait(ctx, nil, func() bool {
			now, loadErr = in.Load64(0)
			return now != seen || loadErr != nil
		})
		if err = errors.Join(err, loadErr); err != nil {
			return r, err
		}
		r.Waits++
		if voluntarySwitches() > before {
			r.Slept++
		}
		r.Arms, r.Interrupts = counter.arms.Load(), total(dev)
		if r.Interrupts > r.Arms {
			r.Excess++
		}
		if now == endOfSequence {
			return r, nil
		}
		seen, r.Last = now, now
		if err := dev.Sections().Output.Store64(0, seen); err != nil {
			return r, err
		}
	}
}

func total(dev *ivshmem.Device) (n uint64) {
	for v := range dev.Vectors() {
		n += dev.Interrupts(v)
	}
	return n
}

func voluntarySwitches() int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		return 0
	}
	return u.Nvcsw
}
