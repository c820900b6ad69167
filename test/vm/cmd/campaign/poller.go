package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// floorPoller is the argument by which this program is the floor under a
// round trip between two Go programs that wait in Go's poller: an eventfd in
// each direction, and nothing else.
const floorPoller = "floor-poller"

// poller runs one side: the parent measures COUNT round trips, its child
// answers. Each has a CPU of its own from the start on, as the runtime looks.
func poller(args []string) error {
	count, err := strconv.Atoi(args[0])
	if err != nil || count < 1 {
		return errors.New("expected the number of round trips")
	}
	const warmup = 500
	switch len(args) {
	case 1:
		return pollerParent(count)
	case 2:
		in, out := eventFile(3), eventFile(4)
		if args[1] == "pong" {
			for range warmup + count {
				if err := errors.Join(take(in), give(out)); err != nil {
					return err
				}
			}
			return nil
		}
		in, out = out, in
		rtt := make([]float64, 0, count)
		for i := range warmup + count {
			start := time.Now()
			if err := errors.Join(give(out), take(in)); err != nil {
				return err
			}
			if i >= warmup {
				rtt = append(rtt, float64(time.Since(start)))
			}
		}
		slices.Sort(rtt)
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"rtt_ns": map[string]float64{"p50": rtt[count/2]}})
	}
	return errors.New("too many arguments")
}

// eventFile is a descriptor that was inherited.
func eventFile(fd uintptr) *os.File {
	unix.SetNonblock(int(fd), true) // what os.NewFile asks for to use the poller
	return os.NewFile(fd, "eventfd")
}

func give(f *os.File) error {
	_, err := f.Write(binary.NativeEndian.AppendUint64(nil, 1))
	return err
}

func take(f *os.File) error {
	var b [8]byte
	_, err := f.Read(b[:])
	return err
}

func pollerParent(count int) error {
	var files []*os.File
	for range 2 {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return err
		}
		files = append(files, os.NewFile(uintptr(fd), "eventfd"))
	}
	done := make(chan error, 2)
	for cpu, side := range []string{"ping", "pong"} {
		cmd := exec.Command("/proc/self/exe", floorPoller, strconv.Itoa(count), side)
		cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = os.Stdout, os.Stderr, files
		cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		go func() {
			// The child inherits the CPUs of the thread that starts it, which
			// has to live as long as the child.
			runtime.LockOSThread()
			var set unix.CPUSet
			set.Set(cpu)
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				done <- err
				return
			}
			if err := cmd.Run(); err != nil {
				done <- fmt.Errorf("%s: %w", side, err)
				return
			}
			done <- nil
		}()
	}
	return errors.Join(<-done, <-done)
}
