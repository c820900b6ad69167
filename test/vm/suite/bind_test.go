package suite

import (
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

const bindAddress = "0000:00:0e.0"

// bound checks what a device is bound to, and that no driver_override is left.
func bound(t *testing.T, g *vm.Guest, driver string) {
	t.Helper()
	got := run(t, g, 0, "sh", "-c", "cd /sys/bus/pci/devices/"+bindAddress+"; basename $(readlink driver || echo none); cat driver_override")
	if want := driver + "\n(null)\n"; got != want {
		t.Errorf("driver and driver_override: got %q, want %q", got, want)
	}
}

// says runs a command and looks for what it has to say.
func says(t *testing.T, g *vm.Guest, want int, words []string, argv ...string) string {
	t.Helper()
	out := run(t, g, want, argv...)
	for _, w := range words {
		if !strings.Contains(out, w) {
			t.Errorf("%q: got %q, want %q", argv, out, w)
		}
	}
	return out
}

func TestBind(t *testing.T) {
	s := serve(t, "--vectors", "3")
	g := guests(t, s, vm.Config{Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}, Packages: []string{"udev"}})[0]
	run(t, g, 0, "sh", "-ec", "echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd; echo ivshmem:x:500:user >>/etc/group")

	t.Run("dry run", func(t *testing.T) {
		script := says(t, g, 0, []string{"echo vfio-pci >", "/driver_override", "drivers_probe"}, "ivshctl", "bind", "--dry-run")
		bound(t, g, "none")
		run(t, g, 0, "sh", "-ec", script) // it is what bind would do
		bound(t, g, "vfio-pci")
		script = says(t, g, 0, []string{"/vfio-pci/unbind"}, "ivshctl", "unbind", "--dry-run")
		bound(t, g, "vfio-pci")
		run(t, g, 0, "sh", "-ec", script)
		bound(t, g, "none")
	})
	t.Run("vfio-pci", func(t *testing.T) {
		says(t, g, 0, []string{bindAddress + ": bound to vfio-pci, was none"}, "ivshctl", "bind", bindAddress)
		bound(t, g, "vfio-pci")
		i := decode[info](t, run(t, g, 0, "ivshctl", "info", "--json"))
		if i.Driver != "vfio-pci" || i.ID == nil || len(i.States) != 2 {
			t.Errorf("through it: %+v", i)
		}
		says(t, g, 0, []string{"bound to vfio-pci, as it was"}, "ivshctl", "bind")
		says(t, g, 0, []string{"bound to no driver, was vfio-pci"}, "ivshctl", "unbind")
		bound(t, g, "none")
		says(t, g, 0, []string{"bound to no driver, as it was"}, "ivshctl", "unbind")
	})
	t.Run("modules", func(t *testing.T) {
		for name, path := range map[string]string{"with modprobe": "/usr/bin", "without": "/nowhere"} {
			run(t, g, 0, "rmmod", "vfio-pci", "vfio_iommu_type1")
			run(t, g, 0, "env", "PATH="+path, "/usr/bin/ivshctl", "bind")
			bound(t, g, "vfio-pci")
			if i := decode[info](t, run(t, g, 0, "ivshctl", "info", "--json")); i.ID == nil {
				t.Errorf("%s: %+v", name, i)
			}
			run(t, g, 0, "ivshctl", "unbind")
		}
	})
	t.Run("from another driver and back", func(t *testing.T) {
		run(t, g, 0, "ivshctl", "bind", "--driver", "uio_pci_generic")
		bound(t, g, "uio_pci_generic")
		says(t, g, 0, []string{"bound to vfio-pci, was uio_pci_generic"}, "ivshctl", "bind")
		bound(t, g, "vfio-pci")
		says(t, g, 0, []string{"bound to uio_pci_generic, was vfio-pci"}, "ivshctl", "unbind")
		bound(t, g, "uio_pci_generic")
	})
	// From here on it is bound to uio_pci_generic.
	t.Run("no such driver", func(t *testing.T) {
		says(t, g, 1, []string{"expected kernel driver nonsense", "modprobe nonsense", "check the name"}, "ivshctl", "bind", "--driver", "nonsense")
		says(t, g, 1, []string{"expected kernel driver igb_uio", "dpdk-kmods-dkms"}, "env", "PATH=/nowhere", "/usr/bin/ivshctl", "bind", "--driver", "igb_uio")
		bound(t, g, "uio_pci_generic")
	})
	t.Run("driver refuses", func(t *testing.T) {
		out := says(t, g, 1, []string{"virtio-pci refused the device", "dmesg | grep " + bindAddress}, "ivshctl", "bind", "--driver", "virtio-pci", "--persist")
		if strings.Contains(out, "not as it was") {
			t.Errorf("got %q", out)
		}
		bound(t, g, "uio_pci_generic")
		run(t, g, 1, "sh", "-c", "ls /etc/udev/rules.d/*"+bindAddress+"*")
	})
	t.Run("ordinary user", func(t *testing.T) {
		says(t, g, 1, []string{"permission denied", "needs root"}, "su", "user", "-c", "ivshctl bind")
		says(t, g, 1, []string{"permission denied", "needs root"}, "su", "user", "-c", "ivshctl unbind")
		says(t, g, 0, []string{"echo vfio-pci >"}, "su", "user", "-c", "ivshctl bind --dry-run")
		bound(t, g, "uio_pci_generic")
	})
	t.Run("in use", func(t *testing.T) {
		run(t, g, 0, "ivshctl", "bind")
		w := start(t, g, "ivshctl", "wait", "1", "--state", "9")
		run(t, g, 0, "sh", "-c", "until ivshctl info --json | grep -q '\"command\": \"ivshctl\"'; do :; done")
		for _, argv := range [][]string{{"ivshctl", "bind", "--driver", "uio_pci_generic"}, {"ivshctl", "unbind"}, {"ivshctl", "unbind", "--dry-run"}} {
			says(t, g, 4, []string{"(ivshctl) owns it", "--force"}, argv...)
		}
		bound(t, g, "vfio-pci")
		says(t, g, 0, []string{"(ivshctl) owns it: taking the device away", "bound to uio_pci_generic, was vfio-pci"}, "ivshctl", "unbind", "--force")
		bound(t, g, "uio_pci_generic")
		w.end(7)

		// Open without being owned.
		w = start(t, g, "sh", "-c", "exec sleep 1000 </dev/uio0")
		run(t, g, 0, "sh", "-c", "until ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q /dev/uio0; do :; done")
		says(t, g, 4, []string{"(sleep) has /dev/uio0 open"}, "ivshctl", "bind")
		if err := w.Signal(9); err != nil {
			t.Error(err)
		}
		w.end(137)
		run(t, g, 0, "ivshctl", "unbind")
		bound(t, g, "none")
	})
	t.Run("group", func(t *testing.T) { groupTest(t, g, s) })
	t.Run("persist", func(t *testing.T) {
		rule := "/etc/udev/rules.d/70-ivshctl-" + bindAddress + ".rules"
		says(t, g, 0, []string{rule, "as it was", `KERNEL=="` + bindAddress + `"`}, "ivshctl", "bind", "--persist")
		run(t, g, 0, "udevadm", "verify", rule)
		// As at boot: from no driver, and from one that was quicker.
		for _, first := range []string{"none", "uio_pci_generic"} {
			run(t, g, 0, "sh", "-ec", `
				cd /sys/bus/pci/devices/`+bindAddress+`
				echo `+bindAddress+` >driver/unbind
				echo >driver_override
				[ `+first+` = none ] || { echo `+first+` >driver_override; echo `+bindAddress+` >/sys/bus/pci/drivers_probe; }
				udevadm trigger --settle --action=add /sys/bus/pci/devices/`+bindAddress+`
				[ $(basename $(readlink driver)) = vfio-pci ]`)
		}
		says(t, g, 0, []string{"removed " + rule}, "ivshctl", "unbind")
		run(t, g, 1, "test", "-e", rule)
		bound(t, g, "none")
	})
}

// groupTest lets an ordinary user in the group of `ivshctl udev` use the
// device, with a host process as its peer. The device is bound to vfio-pci
// afterwards.
func groupTest(t *testing.T, g *vm.Guest, s *vm.Service) {
	run(t, g, 0, "sh", "-ec", `
		mkdir -p /etc/udev/rules.d
		ivshctl udev >/etc/udev/rules.d/71-ivshmem.rules
		udevadm verify /etc/udev/rules.d/71-ivshmem.rules
		/usr/lib/systemd/systemd-udevd --daemon >/dev/null 2>&1
		udevadm trigger --settle --action=add`)
	// Without driver, or through one that is for polling, the sizes of the
	// sections are out of an ordinary user's reach.
	for _, driver := range []string{"", "uio_pci_generic"} {
		if driver != "" {
			run(t, g, 0, "ivshctl", "bind", "--driver", driver)
			run(t, g, 0, "udevadm", "settle")
		}
		says(t, g, 0, []string{"not seen", "root"}, "su", "user", "-c", "ivshctl info")
		says(t, g, 1, []string{"permission denied", "ivshctl udev"}, "su", "user", "-c", "ivsh-pingpong --mode poll")
	}
	run(t, g, 0, "ivshctl", "unbind")
	run(t, g, 0, "ivshctl", "bind")
	run(t, g, 0, "udevadm", "settle")
	i := decode[info](t, run(t, g, 0, "su", "user", "-c", "ivshctl info --json"))
	if i.ID == nil || *i.ID != 0 || i.Vectors != 3 || len(i.Sections) != 4 || len(i.States) != 2 || len(i.Missing) != 0 {
		t.Errorf("info as ordinary user: %+v", i)
	}
	run(t, g, 0, "su", "user", "-c", "ivshctl ring 1 && ivshctl write 0 1 && ivshctl read 0")

	// No memory is locked for a device without DMA.
	args := []string{"--json", "--count", "300", "--warmup", "30"}
	p := start(t, g, "su", "user", "-c", "ulimit -l 0; exec ivsh-pingpong "+strings.Join(args, " "))
	host := onHost(t, "ivsh-pingpong", append(args, "--device", s.Socket)...)
	out, err := host.Output()
	if err != nil {
		t.Fatalf("host: %v\n%s", err, out)
	}
	p.end(0)
	checkPingPong(t, p.line()+"\n"+p.line(), "ping", 300, "poll", "interrupt")

	// Nobody else gets in.
	run(t, g, 0, "sh", "-c", "echo other:x:1001:1001::/tmp:/bin/sh >>/etc/passwd")
	says(t, g, 1, []string{"permission denied", "ivshctl udev"}, "su", "other", "-c", "ivshctl state get")
}

func TestBindWithoutIOMMU(t *testing.T) {
	s := serve(t)
	g := guests(t, s, vm.Config{NoIOMMU: true, Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}})[0]
	for _, former := range []string{"none", "uio_pci_generic"} {
		says(t, g, 6, []string{"expects an IOMMU group, found none", "intel_iommu=on"}, "ivshctl", "bind")
		bound(t, g, former)
		// Not seen before the module is there: nothing is touched either.
		run(t, g, 0, "rmmod", "vfio-pci")
		says(t, g, 6, []string{"expects an IOMMU group, found none"}, "ivshctl", "bind", "--persist")
		bound(t, g, former)
		run(t, g, 0, "ivshctl", "bind", "--driver", "uio_pci_generic")
	}
}

// TestBindArm64: a device gets its IOMMU group with its first driver there.
func TestBindArm64(t *testing.T) {
	s := serve(t)
	g := guests(t, s, vm.Config{Arch: vm.ARM64, Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}})[0]
	run(t, g, 1, "test", "-e", "/sys/bus/pci/devices/"+bindAddress+"/iommu_group")
	run(t, g, 0, "ivshctl", "bind")
	bound(t, g, "vfio-pci")
	if i := decode[info](t, run(t, g, 0, "ivshctl", "info", "--json")); i.ID == nil {
		t.Errorf("through it: %+v", i)
	}
	run(t, g, 0, "ivshctl", "unbind")
	bound(t, g, "none")
}
