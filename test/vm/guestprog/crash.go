package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
)

// crash sets the own state, and panics when it gets SIGUSR1: in the
// goroutine that has deferred Close ("own"), or in another ("other"), where no
// deferred call of the first runs.
func crash(_ context.Context, args []string) (any, error) {
	if len(args) != 3 {
		return nil, errors.New("expected own or other, a state, and a device")
	}
	state, err := strconv.ParseUint(args[1], 0, 32)
	if err != nil {
		return nil, err
	}
	now := make(chan os.Signal, 1)
	signal.Notify(now, unix.SIGUSR1)
	dev, err := ivshmem.Open(args[2])
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	if err := dev.SetState(uint32(state)); err != nil {
		return nil, err
	}
	<-now
	if args[0] == "own" {
		panic("in the goroutine with Close")
	}
	go panic("in another goroutine")
	select {}
}
