package suite

import (
	"slices"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

type section struct {
	Name     string `json:"name"`
	Offset   uint64 `json:"offset"`
	Size     uint64 `json:"size"`
	Writable bool   `json:"writable"`
}

type info struct {
	Address  string    `json:"address"`
	ID       *uint32   `json:"id"`
	MaxPeers *uint32   `json:"max_peers"`
	Protocol uint16    `json:"protocol"`
	Vectors  int       `json:"vectors"`
	Driver   string    `json:"driver"`
	OneShot  bool      `json:"one_shot"`
	Sections []section `json:"sections"`
	States   []uint32  `json:"states"`
	Owner    *struct {
		PID     int    `json:"pid"`
		Command string `json:"command"`
	} `json:"owner"`
	Missing []string `json:"missing"`
}

// TestInfo looks at the device through every driver binding that a stock
// guest has, as root and as an ordinary user.
func TestInfo(t *testing.T) {
	s := serve(t, "--peers", "3", "--vectors", "5", "--protocol", "0x4002", "--rw", "64K", "--output", "8K")
	g := guests(t, s, vm.Config{Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}})[0]
	sections := []section{
		{"state_table", 0, 4096, false},
		{"rw_section", 0x1000, 0x10000, true},
		{"output_section_0", 0x11000, 0x2000, true},
		{"output_section_1", 0x13000, 0x2000, false},
		{"output_section_2", 0x15000, 0x2000, false},
	}
	check := func(t *testing.T, driver string) info {
		i := decode[info](t, run(t, g, 0, "ivshctl", "info", "--json"))
		if i.ID == nil || i.MaxPeers == nil {
			t.Fatalf("ID or Maximum Peers not seen: %+v", i)
		}
		if i.Address != "0000:00:0e.0" || *i.ID != 0 || *i.MaxPeers != 3 || i.Protocol != 0x4002 || i.Vectors != 5 || i.OneShot || i.Driver != driver {
			t.Errorf("got %+v", i)
		}
		if !slices.Equal(i.Sections, sections) {
			t.Errorf("sections: got %+v, want %+v", i.Sections, sections)
		}
		if !slices.Equal(i.States, []uint32{0, 0, 0}) {
			t.Errorf("states: got %v", i.States)
		}
		return i
	}
	t.Run("no driver", func(t *testing.T) { check(t, "") })
	t.Run("list", func(t *testing.T) {
		if got := run(t, g, 0, "ivshctl", "list"); !strings.Contains(got, "0000:00:0e.0") || !strings.Contains(got, "user-defined 4002h") {
			t.Errorf("got %q", got)
		}
	})
	t.Run("ordinary user", func(t *testing.T) {
		run(t, g, 0, "sh", "-c", "echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd")
		got := run(t, g, 0, "su", "user", "-c", "ivshctl list --json")
		if l := decode[[]info](t, got); len(l) != 1 || l[0].Protocol != 0x4002 {
			t.Errorf("list: got %+v", l)
		}
		i := decode[info](t, run(t, g, 0, "su", "user", "-c", "ivshctl info --json"))
		if i.Protocol != 0x4002 || i.ID != nil || !strings.Contains(strings.Join(i.Missing, " "), "root") {
			t.Errorf("info: got %+v", i)
		}
	})
	t.Run("uio_pci_generic", func(t *testing.T) {
		bind(t, g, "0000:00:0e.0", "uio_pci_generic")
		check(t, "uio_pci_generic")
	})
	t.Run("vfio-pci", func(t *testing.T) {
		bind(t, g, "0000:00:0e.0", "vfio-pci")
		check(t, "vfio-pci")
		// Beside an owner.
		w := start(t, g, "ivshctl", "wait", "1", "--state", "9", "--count", "2")
		run(t, g, 0, "sh", "-c", "until ivshctl info --json | grep -q '\"command\": \"ivshctl\"'; do :; done")
		i := decode[info](t, run(t, g, 0, "ivshctl", "info", "--json"))
		if i.Owner == nil || i.Owner.Command != "ivshctl" || len(i.Missing) == 0 {
			t.Errorf("beside an owner: got %+v", i)
		}
		if got := run(t, g, 4, "ivshctl", "wait", "1"); !strings.Contains(got, "in use") || !strings.Contains(got, "ivshctl") {
			t.Errorf("a second owner: got %q", got)
		}
		if err := w.Signal(2); err != nil {
			t.Error(err)
		}
		w.end(0)
	})
	t.Run("wrong address", func(t *testing.T) {
		run(t, g, 3, "ivshctl", "info", "0000:00:13.0")
		run(t, g, 3, "ivshctl", "info", "00:00.0")
		run(t, g, 1, "ivshctl", "info", "nonsense")
	})
	t.Run("service gone", func(t *testing.T) {
		s.Close()
		if got := run(t, g, 0, "ivshctl", "info"); !strings.Contains(got, "gone") && !strings.Contains(got, "all ones") {
			t.Errorf("info: got %q", got)
		}
		run(t, g, 7, "ivshctl", "state", "get")
	})
}

// bind gives a device to a driver.
func bind(t *testing.T, g *vm.Guest, address, driver string) {
	t.Helper()
	run(t, g, 0, "sh", "-ec", `
		d=/sys/bus/pci/devices/`+address+`
		if [ -e $d/driver ]; then echo `+address+` >$d/driver/unbind; fi
		echo `+driver+` >$d/driver_override
		echo `+address+` >/sys/bus/pci/drivers_probe
		test -e $d/driver`)
}
