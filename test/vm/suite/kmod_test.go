package suite

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

type uioRules struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Maps    []struct {
		Name string `json:"name"`
		Size uint64 `json:"size"`
	} `json:"maps"`
	Types  map[string]string `json:"types"`
	Broken []string          `json:"broken"`
}

// TestKernelModule uses the kernel module in guests with the oldest and the
// newest kernels that it is made for, on links with every combination of
// absent sections.
func TestKernelModule(t *testing.T) {
	for _, kernel := range []string{fetch.Bookworm, fetch.Trixie, fetch.Backports} {
		t.Run(kernel, func(t *testing.T) { testKernelModule(t, kernel, vm.AMD64) })
	}
	t.Run(vm.ARM64, func(t *testing.T) { testKernelModule(t, fetch.Trixie, vm.ARM64) })
}

func testKernelModule(t *testing.T, kernel, arch string) {
	type linkCase struct {
		options []string
		auto    bool              // bound by itself
		maps    map[string]uint64 // besides registers and the State Table
	}
	cases := []linkCase{
		{[]string{"--protocol", "0x4002", "--peers", "3", "--rw", "64K", "--output", "8K"}, false,
			map[string]uint64{"rw_section": 64 << 10, "input_sections": 24 << 10, "output_section": 8 << 10}},
		{[]string{"--protocol", "1", "--rw", "0", "--output", "8K"}, false,
			map[string]uint64{"input_sections": 16 << 10, "output_section": 8 << 10}},
		{[]string{"--protocol", "0x8001", "--rw", "64K", "--output", "0"}, false, map[string]uint64{"rw_section": 64 << 10}},
		{[]string{"--rw", "0", "--output", "0", "--vectors", "1"}, true, nil},
		// BAR2 above 4 GiB, for want of space below.
		{[]string{"--rw", "2G", "--output", "1G"}, true,
			map[string]uint64{"rw_section": 2 << 30, "input_sections": 2 << 30, "output_section": 1 << 30}},
	}
	var devices []vm.Device
	var sockets, addresses []string
	for i, c := range cases {
		s := serve(t, c.options...)
		sockets = append(sockets, s.Socket)
		devices = append(devices, vm.Device{Socket: s.Socket, Address: fmt.Sprintf("%#x", 4+i)})
		addresses = append(addresses, fmt.Sprintf("0000:00:%02x.0", 4+i))
	}
	g := guests(t, nil, vm.Config{
		Kernel: kernel, Arch: arch, Devices: devices, Modules: []string{vm.OwnModule},
		Files: map[string]string{"/bin/guestprog": buildFor(t, arch, "build", module+"/test/vm/guestprog", "guestprog")},
	})[0]
	for i, c := range cases {
		t.Run("maps/"+strings.Join(c.options, " "), func(t *testing.T) {
			out := run(t, g, 0, "sh", "-c", "ls /sys/bus/pci/devices/"+addresses[i])
			if got := strings.Contains(out, "driver\n"); got != c.auto {
				t.Errorf("bound by itself: %v, want %v", got, c.auto)
			}
			bind(t, g, addresses[i], vm.OwnModule)
			r := decode[uioRules](t, run(t, g, 0, "guestprog", "uio-rules", addresses[i]))
			if want := "uio_ivshmem[" + addresses[i] + "]"; r.Name != want || r.Version != "1" {
				t.Errorf("name %q, version %q; want %q, 1", r.Name, r.Version, want)
			}
			var got, want []string
			for _, m := range r.Maps {
				got = append(got, fmt.Sprintf("%s %d", m.Name, m.Size))
			}
			want = []string{"registers 4096", "state_table 4096"}
			for _, n := range []string{"rw_section", "input_sections", "output_section"} {
				if c.maps[n] != 0 {
					want = append(want, fmt.Sprintf("%s %d", n, c.maps[n]))
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("maps %q, want %q", got, want)
			}
			if len(r.Broken) > 0 {
				t.Errorf("rules broken:\n%s", strings.Join(r.Broken, "\n"))
			}
			t.Logf("memory types: %v", r.Types)
			if arch == vm.AMD64 && c.maps["rw_section"] == 2<<30 && (r.Types["rw_section"] != "write-back" || r.Types["registers"] != "uncached-minus") {
				t.Errorf("memory types %v, want rw_section write-back and registers uncached-minus", r.Types)
			}
			if driver := decode[info](t, run(t, g, 0, "ivshctl", "info", "--json", addresses[i])); !driver.OneShot {
				t.Error("one-shot mode is off")
			}
		})
	}

	address := addresses[0]
	onLink := func(t *testing.T, args ...string) string {
		t.Helper()
		out, err := onHost(t, "ivshctl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("ivshctl %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	// Interrupt Control is what the program finds.
	waiter := func(t *testing.T, control string) *process {
		t.Helper()
		w := start(t, g, "guestprog", "uio-wait", address)
		for _, want := range []string{control, "armed"} {
			if got := w.line(); !strings.HasPrefix(got, want) {
				t.Fatalf("got %q, want %q", got, want)
			}
		}
		return w
	}
	kill := func(t *testing.T, p *process) {
		t.Helper()
		if err := p.Signal(9); err != nil {
			t.Fatal(err)
		}
		p.end(128 + 9)
	}
	t.Run("interrupts of all vectors", func(t *testing.T) {
		w := waiter(t, "control 0")
		for vector := range 4 {
			onLink(t, "ring", "--device", sockets[0], "0", fmt.Sprint(vector))
			if got, want := w.line(), "grown 1 control 0"; got != want {
				t.Errorf("vector %d: got %q, want %q", vector, got, want)
			}
			if got := w.line(); got != "armed" {
				t.Errorf("got %q", got)
			}
		}
		kill(t, w)
	})
	t.Run("state after kill", func(t *testing.T) {
		watch := watchStates(t, sockets[0])
		best := time.Hour
		for range 5 {
			w := waiter(t, "control")
			watch.want(t, 7)
			killed := time.Now()
			if err := w.Signal(9); err != nil {
				t.Fatal(err)
			}
			watch.want(t, 0)
			took := time.Since(killed)
			best = min(best, took)
			t.Logf("state 0 seen %v after kill -9", took)
			w.end(128 + 9)
		}
		if best > 100*time.Millisecond {
			t.Errorf("state 0 seen after %v at best, want at most 100ms", best)
		}
	})
	t.Run("mapping keeps the state", func(t *testing.T) {
		h := start(t, g, "guestprog", "uio-hold", address)
		if got := h.line(); got != "closed" {
			t.Fatalf("got %q", got)
		}
		watch := watchStates(t, sockets[0])
		watch.want(t, 7)
		kill(t, h)
		watch.want(t, 0)
	})
	unbind := func(t *testing.T) {
		t.Helper()
		run(t, g, 0, "sh", "-c", "echo "+address+" >/sys/bus/pci/drivers/uio_ivshmem/unbind")
	}
	t.Run("unbound under a reader", func(t *testing.T) {
		watch := watchStates(t, sockets[0])
		w := waiter(t, "control")
		watch.want(t, 7)
		run(t, g, 0, "sh", "-c", "until grep -q uio_read /proc/$(pidof guestprog)/task/*/wchan; do :; done")
		unbind(t)
		if got := w.line(); got != "error input/output error" {
			t.Errorf("got %q", got)
		}
		w.end(0)
		watch.want(t, 0)
		command := strings.TrimSpace(run(t, g, 0, "od", "-An", "-tu2", "-j4", "-N2", "/sys/bus/pci/devices/"+address+"/config"))
		if n, err := strconv.Atoi(command); err != nil || n&4 != 0 {
			t.Errorf("Command register %s, %v: bus master is on", command, err)
		}
		bind(t, g, address, vm.OwnModule)
		kill(t, waiter(t, "control 0"))
	})
	t.Run("bound and unbound", func(t *testing.T) {
		run(t, g, 0, "sh", "-ec", fmt.Sprintf(`
			for i in $(seq 50); do
				echo %[1]s >/sys/bus/pci/drivers/uio_ivshmem/unbind
				test ! -e /sys/bus/pci/devices/%[1]s/uio
				echo %[1]s >/sys/bus/pci/drivers_probe
				test -e /sys/bus/pci/devices/%[1]s/uio
			done`, address))
		kill(t, waiter(t, "control 0"))
	})
	t.Run("unloaded", func(t *testing.T) {
		w := waiter(t, "control")
		run(t, g, 1, "rmmod", "uio_ivshmem") // in use
		kill(t, w)
		run(t, g, 0, "sh", "-ec", `
			rmmod uio_ivshmem
			test -z "$(ls /sys/class/uio)"
			! grep uio_ivshmem /proc/iomem /proc/interrupts
			modprobe uio_ivshmem
			test -n "$(ls /sys/class/uio)"`)
	})
	t.Run("kernel log", func(t *testing.T) { checkKernelLog(t, g) })
}

// checkKernelLog looks for anything that the kernel complained about.
func checkKernelLog(t *testing.T, g *vm.Guest) {
	t.Helper()
	log := run(t, g, 0, "dmesg")
	for _, bad := range []string{"WARNING:", "BUG:", "Oops", "Call Trace", "use-after-free", "refcount_t", "nobody cared", "memtype"} {
		if strings.Contains(log, bad) {
			t.Errorf("%q in the kernel log:\n%s", bad, log)
		}
	}
}

// stateWatch is a process on the host that is told about states by interrupts.
type stateWatch struct{ lines chan string }

func watchStates(t *testing.T, socket string) *stateWatch {
	t.Helper()
	cmd := onHost(t, "ivshctl", "state", "watch", "--json", "--device", socket)
	l := newLines()
	cmd.Stdout = l
	child, err := vm.StartChild(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = child.Kill() })
	return &stateWatch{l.c}
}

// want waits for a state of peer 0.
func (w *stateWatch) want(t *testing.T, state int) {
	t.Helper()
	for {
		select {
		case l := <-w.lines:
			if c := decode[struct{ Peer, State int }](t, l); c.Peer == 0 && c.State == state {
				return
			} else if c.Peer == 0 {
				t.Fatalf("got %s, want state %d", l, state)
			}
		case <-time.After(limit):
			t.Fatalf("state %d not seen in %v", state, limit)
		}
	}
}
