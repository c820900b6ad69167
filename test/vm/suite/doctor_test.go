package suite

import (
	"fmt"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

type diagnosis struct {
	Checks []struct {
		Name, Status, Found, Remedy string
	}
	Usable bool
}

// TestDoctor brings a guest into the states that the doctor has to know.
func TestDoctor(t *testing.T) {
	const address = "0000:00:0e.0"
	s := serve(t, "--output", "0")
	g := guests(t, s, vm.Config{Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}})[0]
	// doctor runs it and checks the first check with the given status.
	doctor := func(t *testing.T, usable bool, status, name, remedy string, argv ...string) {
		t.Helper()
		if argv == nil {
			argv = []string{"ivshctl", "doctor", "--json"}
		}
		r, err := g.Run(deadline(t), argv...)
		if err != nil {
			t.Fatal(err)
		}
		d := decode[diagnosis](t, string(r.Stdout))
		if d.Usable != usable || (r.ExitCode() == 0) != usable {
			t.Errorf("usable %v, exit code %d; want usable %v", d.Usable, r.ExitCode(), usable)
		}
		for _, c := range d.Checks {
			if c.Status != status {
				continue
			}
			if c.Name != name || !strings.Contains(c.Found+" "+c.Remedy, remedy) {
				t.Errorf("first %s: %+v, want %q with %q", status, c, name, remedy)
			}
			return
		}
		t.Errorf("no check with %s in %+v", status, d.Checks)
	}
	t.Run("no driver", func(t *testing.T) { doctor(t, false, "fail", "driver", "ivshctl bind") })
	t.Run("wrong driver", func(t *testing.T) {
		bind(t, g, address, "uio_pci_generic")
		doctor(t, false, "fail", "driver", "vfio-pci")
	})
	t.Run("no such device", func(t *testing.T) {
		doctor(t, false, "fail", "enumeration", "ivshctl list", "ivshctl", "doctor", "--json", "0000:00:13.0")
	})
	bind(t, g, address, "vfio-pci")
	t.Run("in order, but no peer", func(t *testing.T) { doctor(t, true, "warn", "peers", "start a program") })
	t.Run("no permission", func(t *testing.T) {
		run(t, g, 0, "sh", "-c", "echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd; chmod 600 /dev/vfio/*")
		doctor(t, false, "fail", "IOMMU group", "rights", "su", "user", "-c", "ivshctl doctor --json")
	})
	t.Run("owned", func(t *testing.T) {
		w := start(t, g, "ivshctl", "wait", "1")
		run(t, g, 0, "sh", "-c", "until ivshctl info --json | grep -q '\"command\": \"ivshctl\"'; do :; done")
		doctor(t, false, "warn", "owner", "ivshctl")
		if err := w.Signal(2); err != nil {
			t.Fatal(err)
		}
		w.end(0)
	})
	t.Run("service gone", func(t *testing.T) {
		s.Close()
		doctor(t, false, "fail", "configuration space", "service behind the device has ended")
	})

	t.Run("no IOMMU, no sections", func(t *testing.T) {
		s := serve(t, "--output", "0", "--rw", "0")
		g = guests(t, s, vm.Config{NoIOMMU: true, Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}})[0]
		doctor(t, false, "warn", "sections", "--rw")
		// vfio-pci does not bind without an IOMMU.
		out := run(t, g, 0, "sh", "-c", fmt.Sprintf("d=/sys/bus/pci/devices/%s; echo vfio-pci >$d/driver_override; echo %s >/sys/bus/pci/drivers_probe; ls $d", address, address))
		if strings.Contains(out, "iommu_group") {
			t.Errorf("there is an IOMMU group: %s", out)
		}
		doctor(t, false, "fail", "driver", "none is bound")
	})
}
