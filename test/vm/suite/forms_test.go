package suite

import (
	"slices"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// The forms of the device that the specification allows besides the usual one:
// INTx in place of MSI-X, a Base Address in place of BAR2, registers in I/O
// space.

// playForm runs ping-pong in both modes between two guests.
func playForm(t *testing.T, g []*vm.Guest, modes ...string) {
	t.Helper()
	for _, mode := range modes {
		argv := []string{"ivsh-pingpong", "--json", "--count", "200", "--warmup", "20", "--mode", mode}
		p := start(t, g[1], append(argv, "--peer", "0")...)
		out := run(t, g[0], 0, append(argv, "--peer", "1")...)
		p.end(0)
		if r := decode[pingpong](t, out); r.Mode != mode || r.Errors != 0 || r.Messages != 200 || r.RTT == nil {
			t.Errorf("got %+v", r)
		} else {
			t.Logf("%s: round trip %d us", mode, r.RTT.P50/1000)
		}
	}
}

// waitForm waits for doorbells in the first guest, and returns when the second
// sees that it does. The state tells the one waiting from one that was killed.
func waitForm(t *testing.T, g []*vm.Guest, state, count string) *process {
	t.Helper()
	w := start(t, g[0], "ivshctl", "wait", "0", "--state", state, "--count", count)
	run(t, g[1], 0, "sh", "-c", "until test $(ivshctl state get 0) = "+state+"; do :; done")
	return w
}

// ringForm waits for doorbells in the first guest, which the second rings.
func ringForm(t *testing.T, g []*vm.Guest) {
	t.Helper()
	w := waitForm(t, g, "1", "3")
	for range 3 {
		// The next one only when the last one was seen: they may merge.
		run(t, g[1], 0, "ivshctl", "ring", "0", "0")
		if got := w.line(); !strings.HasPrefix(got, "vector 0: ") {
			t.Errorf("got %q", got)
		}
	}
	w.end(0)
}

// doctorForm runs the doctor and looks for what it has to say.
func doctorForm(t *testing.T, g *vm.Guest, exit int, say ...string) {
	t.Helper()
	got := run(t, g, exit, "ivshctl", "doctor")
	for _, s := range say {
		if !strings.Contains(got, s) {
			t.Errorf("doctor: expected %q in\n%s", s, got)
		}
	}
}

// TestINTx runs the toolkit with an interrupt pin, through every driver.
func TestINTx(t *testing.T) {
	const address = "0000:00:0e.0"
	cache, err := fetch.Open(func(message string) { t.Log(message) })
	if err != nil {
		t.Fatal(err)
	}
	ko, err := cache.IGBUIO(t.Context(), fetch.Bookworm, vm.AMD64)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, "--intx", "--peers", "3", "--protocol", "0x4000")
	config := vm.Config{
		Kernel: fetch.Bookworm, Modules: []string{vm.OwnModule}, Files: map[string]string{"/igb_uio.ko": ko},
		Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}},
	}
	g := guests(t, s, config, config)
	for _, g := range g {
		run(t, g, 0, "insmod", "/igb_uio.ko")
	}
	for _, driver := range []string{"uio_pci_generic", "igb_uio", "vfio-pci", vm.OwnModule} {
		t.Run(driver, func(t *testing.T) {
			for _, g := range g {
				bind(t, g, address, driver)
			}
			i := decode[info](t, run(t, g[0], 0, "ivshctl", "info", "--json"))
			if i.Driver != driver || i.ID == nil || *i.ID != 0 || i.Vectors != 1 || len(i.Sections) != 5 {
				t.Errorf("got %+v", i)
			}
			doctorForm(t, g[0], 0, "no MSI-X: one vector, by INTx", "through "+driver, "a doorbell to itself arrives on each of 1 vectors", "without --intx, or")
			if driver == "uio_pci_generic" || driver == "igb_uio" {
				doctorForm(t, g[0], 0, driver+", by INTx", "as the device sets Interrupt Status against the specification")
			}
			t.Run("ring", func(t *testing.T) { ringForm(t, g) })
			t.Run("pingpong", func(t *testing.T) { playForm(t, g, "poll", "interrupt") })
			t.Run("killed while waiting", func(t *testing.T) {
				w := waitForm(t, g, "2", "1")
				if err := w.Signal(9); err != nil {
					t.Fatal(err)
				}
				w.end(128 + 9)
				// The interrupt that nobody waits for leaves INTx disabled.
				run(t, g[1], 0, "ivshctl", "ring", "0", "0")
				ringForm(t, g)
			})
			for _, g := range g {
				checkKernelLog(t, g)
			}
		})
	}
	t.Run("host process", func(t *testing.T) {
		argv := []string{"--json", "--count", "200", "--warmup", "20", "--mode", "interrupt"}
		p := start(t, g[0], append([]string{"ivsh-pingpong", "--peer", "2"}, argv...)...)
		out, err := onHost(t, "ivsh-pingpong", append(argv, "--device", s.Socket, "--peer", "0")...).Output()
		if err != nil {
			t.Fatal(err)
		}
		p.end(0)
		if r := decode[pingpong](t, string(out)); r.Errors != 0 || r.Messages != 200 {
			t.Errorf("got %+v", r)
		}
	})
}

// TestINTxWithoutStatus shows the doctor a device that keeps to the
// specification: it has a pin, and never sets Interrupt Status.
func TestINTxWithoutStatus(t *testing.T) {
	f := &faulty{noMSIX: true, config: map[uint64]byte{vendorCap + 1: 0, 0x3d: 1}}
	g := guests(t, nil, vm.Config{NoIOMMU: true, Devices: []vm.Device{{Socket: serveFaulty(t, f), Address: "0xe"}}})[0]
	bind(t, g, "0000:00:0e.0", "uio_pci_generic")
	doctorForm(t, g, 1, "uio_pci_generic, by INTx", "fail  interrupts", "only if the device sets Interrupt Status, which the specification forbids: bind it to uio_ivshmem")
}

// TestBaseAddress runs two guests whose devices have no BAR2, with MSI-X, and
// with INTx as on Jailhouse's ARM machines.
func TestBaseAddress(t *testing.T) {
	const address = "0000:00:0e.0"
	for _, c := range []struct {
		name, option, doctor string
		vectors              int
	}{
		{"MSI-X", "--vectors=3", "arrives on each of 3 vectors", 3},
		{"INTx", "--intx", "no MSI-X: one vector, by INTx", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, "--peers", "3", "--protocol", "0x4000", "--base-address", "4G", c.option)
			config := vm.Config{
				Modules: []string{vm.OwnModule}, Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}},
				QEMU: slices.Concat([]string{"-m", "maxmem=2G"}, s.QEMU),
			}
			g := guests(t, s, config, config)
			for _, driver := range []string{"uio_pci_generic", "vfio-pci"} {
				bind(t, g[0], address, driver)
				if got := run(t, g[0], 6, "ivshctl", "state", "get"); !strings.Contains(got, "no BAR2") || !strings.Contains(got, "ivshctl bind --driver uio_ivshmem") {
					t.Errorf("%s: got %q", driver, got)
				}
				doctorForm(t, g[0], 1, "fail  BARs", "no BAR2: the shared memory has a Base Address only, 0x100000000", "ivshctl bind --driver uio_ivshmem")
			}
			for _, g := range g {
				bind(t, g, address, vm.OwnModule)
			}
			i := decode[info](t, run(t, g[0], 0, "ivshctl", "info", "--json"))
			if i.Driver != vm.OwnModule || i.ID == nil || *i.ID != 0 || i.Vectors != c.vectors || len(i.Sections) != 5 {
				t.Errorf("got %+v", i)
			}
			// The kernel has the memory as nothing else, RAM least of all, and
			// does not see the device that it is of.
			out := run(t, g[0], 0, "sh", "-c", "cat /proc/iomem; ls /sys/bus/pci/devices")
			if !strings.Contains(out, "\n100000000-1001c0fff : uio_ivshmem\n") || strings.Contains(out, "00:1d.") {
				t.Errorf("memory and devices of the guest:\n%s", out)
			}
			// INTx or not, the memory stays mapped.
			doctorForm(t, g[0], 0, "ok    BARs", "ok    copy rate", "ok    interrupts", c.doctor)
			ringForm(t, g)
			playForm(t, g, "poll", "interrupt")
			host, err := onHost(t, "ivshctl", "info", s.Socket).CombinedOutput()
			if err == nil || !strings.Contains(string(host), "no BAR2") || !strings.Contains(string(host), "without --base-address") {
				t.Errorf("host process: %v, %s", err, host)
			}
			checkKernelLog(t, g[0])
		})
	}
}

// TestIORegisters runs the toolkit with registers in I/O space.
func TestIORegisters(t *testing.T) {
	const address = "0000:00:0e.0"
	s := serve(t, "--vectors", "3", "--protocol", "0x4000", "--io-registers")
	config := vm.Config{Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}, Modules: []string{vm.OwnModule}}
	g := guests(t, s, config, config)
	t.Run("no driver", func(t *testing.T) {
		i := decode[info](t, run(t, g[0], 0, "ivshctl", "info", "--json"))
		if i.ID == nil || *i.ID != 0 || i.Vectors != 3 || len(i.Sections) != 4 {
			t.Errorf("got %+v", i)
		}
		doctorForm(t, g[0], 1, "ok    BARs", "BAR0 in I/O space, and BAR2", "fail  driver")
		playForm(t, g, "poll")
	})
	t.Run("uio_ivshmem", func(t *testing.T) {
		run(t, g[0], 1, "ivshctl", "bind", "--driver", vm.OwnModule)
	})
	t.Run("vfio-pci", func(t *testing.T) {
		for _, g := range g {
			bind(t, g, address, "vfio-pci")
		}
		doctorForm(t, g[0], 0, "BAR0 in I/O space, and BAR2", "arrives on each of 3 vectors")
		ringForm(t, g)
		playForm(t, g, "poll", "interrupt")
	})
	checkKernelLog(t, g[0])
}

// TestFormsARM64 runs the forms in a guest of the other architecture, but for
// the Base Address: QEMU has no device there that could put the memory.
func TestFormsARM64(t *testing.T) {
	s := serve(t, "--intx", "--io-registers", "--protocol", "0x4000")
	g := guests(t, s, vm.Config{Arch: vm.ARM64, Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}})[0]
	for _, driver := range []string{"uio_pci_generic", "vfio-pci"} {
		t.Run(driver, func(t *testing.T) {
			bind(t, g, "0000:00:0e.0", driver)
			for range 2 {
				doctorForm(t, g, 0, "BAR0 in I/O space", "no MSI-X: one vector, by INTx", "ok    interrupts", "through "+driver)
			}
		})
	}
	checkKernelLog(t, g)
}
