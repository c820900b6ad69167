package tap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/vnet"
)

// measuredVariable makes this test program one end of virtual Ethernet, as
// `ivshctl net up` is, which tells at the end what CPU time its calls to the
// interface took: "INTERFACE MTU DEVICE OFFLOADS"; without offloads, 0, each
// frame is a call. A profile does not tell: what the
// runtime does every 10 ms coincides with the kernel's ticks, which it is made
// of.
const measuredVariable = "IVSHMEM_TAP_MEASURED"

func TestMain(m *testing.M) {
	if os.Getenv(measuredVariable) == "" {
		os.Exit(m.Run())
	}
	if err := measured(os.Getenv(measuredVariable)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func cpuTime(clock int32) int64 {
	var t unix.Timespec
	unix.ClockGettime(clock, &t)
	return t.Nano()
}

func measured(text string) error {
	var name, device string
	var mtu, offloads int
	if _, err := fmt.Sscan(text, &name, &mtu, &device, &offloads); err != nil {
		return err
	}
	runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0)))
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	d, err := ivshmem.Open(device)
	if err != nil {
		return err
	}
	defer d.Close()
	link, err := vnet.Open(d, vnet.Config{MTU: mtu})
	if err != nil {
		return err
	}
	defer link.Close()
	t, err := Open(Config{Name: name, MTU: mtu})
	if err != nil {
		return err
	}
	defer t.Close()
	if offloads == 0 {
		t.most = 1
		if err := unix.IoctlSetInt(t.fd, unix.TUNSETOFFLOAD, 0); err != nil {
			return err
		}
	}
	const oneOf = 13 // calls is measured
	var spent, calls atomic.Int64
	t.move = func(call uintptr, fd int, iovs []unix.Iovec) (int, error) {
		// A look at the clock takes as long as a call: most go without.
		if calls.Add(1)%oneOf != 0 {
			return transfer(call, fd, iovs)
		}
		runtime.LockOSThread() // the clock is the thread's
		defer runtime.UnlockOSThread()
		begin := cpuTime(unix.CLOCK_THREAD_CPUTIME_ID)
		n, err := transfer(call, fd, iovs)
		spent.Add(cpuTime(unix.CLOCK_THREAD_CPUTIME_ID) - begin)
		return n, err
	}
	// What a look at the clock takes is in what it measures.
	begin := cpuTime(unix.CLOCK_THREAD_CPUTIME_ID)
	const looks = 10000
	for range looks {
		cpuTime(unix.CLOCK_THREAD_CPUTIME_ID)
	}
	look := (cpuTime(unix.CLOCK_THREAD_CPUTIME_ID) - begin) / looks
	before := cpuTime(unix.CLOCK_PROCESS_CPUTIME_ID)
	fmt.Println("ready")
	if err := t.Run(ctx, link); !errors.Is(err, context.Canceled) {
		return err
	}
	measured := calls.Load() / oneOf
	return json.NewEncoder(os.Stdout).Encode(map[string]int64{
		"tap_ns":   (spent.Load() - measured*look) * oneOf,
		"total_ns": cpuTime(unix.CLOCK_PROCESS_CPUTIME_ID) - before - 2*measured*look,
	})
}
