package suite

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// TestVFIOWays runs every check through the ways to a device of vfio-pci that
// Debian's kernels lack.
func TestVFIOWays(t *testing.T) {
	for _, c := range []struct {
		name, backEnd string
		config        vm.Config
		cannot        map[string]string // check to what it says
		doctor        []string
	}{
		{
			"iommufd", "vfio-pci (iommufd)", vm.Config{}, nil,
			[]string{"ok    IOMMU group", "reached by /dev/iommu, /dev/vfio/devices/vfio0 (iommufd)", "through vfio-pci (iommufd)", "arrives on each of 3 vectors"},
		},
		{
			"no-IOMMU", "vfio-pci (no-IOMMU)", vm.Config{NoIOMMU: true, Append: []string{"vfio.enable_unsafe_noiommu_mode=1"}},
			map[string]string{"as ordinary user": "CAP_SYS_RAWIO, whatever the rights to the file: run as root"},
			[]string{"warn  IOMMU group", "/dev/vfio/noiommu-0 (no-IOMMU)", "through vfio-pci (no-IOMMU)", "arrives on each of 3 vectors"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, "--vectors", "3")
			c.config.Kernel = fetch.Small
			c.config.Devices = []vm.Device{{Socket: s.Socket, Address: "0xe"}}
			c.config.Files = map[string]string{"/bin/guestprog": buildFor(t, vm.AMD64, "build", module+"/test/vm/guestprog", "guestprog")}
			g := guests(t, s, c.config)[0]
			run(t, g, 0, "ivshctl", "bind") // vfio-pci is what it takes
			bound(t, g, "vfio-pci")
			subject := &checks.Subject{
				At: checks.Guest(g), Device: bindAddress, Driver: "vfio-pci", BackEnd: c.backEnd, Vectors: 3, Killed: 5,
				Peer: checks.Host(hostFolder(t), filepath.Dir(c.config.Files["/bin/guestprog"])), PeerDevice: s.Socket, Messages: 200,
			}
			subject.InGuest(func(_ context.Context, script string) error {
				run(t, g, 0, "sh", "-ec", script)
				return nil
			})
			for _, check := range checks.All {
				err := check.Run(subject, t.Context())
				if says := c.cannot[check.Name]; says != "" {
					if err == nil || !strings.Contains(err.Error(), says) {
						t.Errorf("%s: got %v, want %q", check.Name, err, says)
					}
				} else if err != nil {
					t.Errorf("%s: %v", check.Name, err)
				}
			}
			says(t, g, 0, c.doctor, "ivshctl", "doctor")
			// Nobody else gets it meanwhile.
			p := start(t, g, "ivshctl", "wait", "1")
			run(t, g, 0, "sh", "-c", "until ivshctl info --json | grep -q '\"command\": \"ivshctl\"'; do :; done")
			says(t, g, 4, []string{"(ivshctl)"}, "ivshctl", "unbind")
			run(t, g, 4, "ivshctl", "state", "get")
			if err := p.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			p.end(0)
		})
	}
}

// TestVFIOUnsafeInterrupts has an IOMMU that does not remap interrupts, which
// the kernel refuses to give out a device behind, unless it is told to.
func TestVFIOUnsafeInterrupts(t *testing.T) {
	s := serve(t)
	g := guests(t, s, vm.Config{Kernel: fetch.Small, Driver: "vfio-pci", Append: []string{"intremap=off"}})[0]
	for _, module := range []string{"iommufd", "vfio_iommu_type1"} {
		parameter := "/sys/module/" + module + "/parameters/allow_unsafe_interrupts"
		says(t, g, 1, []string{"does not remap interrupts", "echo Y >" + parameter}, "ivshctl", "state", "get")
		run(t, g, 0, "sh", "-c", "echo Y >"+parameter)
		run(t, g, 0, "ivshctl", "state", "get")
		run(t, g, 0, "rm", "-f", "/dev/vfio/devices/vfio0") // from here on by the group
	}
}

// TestStateAfterEnd ends programs in every way there is, and looks at the
// state that their peer sees then. Behind a root port the kernel resets the
// device when its file is closed, so it is 0 whatever the program did. On the
// root bus it cannot, and State 0 is what the program itself does: in Close,
// which deferred calls run at a return and at a panic of their own goroutine,
// not at a panic of another one or at SIGKILL.
func TestStateAfterEnd(t *testing.T) {
	port, bus := serve(t, "--vectors", "3"), serve(t, "--vectors", "3")
	g := guests(t, port, vm.Config{
		Kernel: fetch.Small, Driver: "vfio-pci",
		Devices: []vm.Device{{Socket: port.Socket, RootPort: true}, {Socket: bus.Socket, Address: "0xe"}},
		Files:   map[string]string{"/bin/guestprog": buildFor(t, vm.AMD64, "build", module+"/test/vm/guestprog", "guestprog")},
	})[0]
	var onPort string
	for line := range strings.Lines(run(t, g, 0, "ivshctl", "list")) {
		if f := strings.Fields(line); strings.HasPrefix(f[0], "0000:") && f[0] != bindAddress {
			onPort = f[0]
		}
	}
	const panicked = 2 // the exit status of Go's runtime
	const killed = 128 + int(syscall.SIGKILL)
	for i, end := range []struct {
		name   string
		argv   string         // STATE is one that is not used twice, DEVICE the device
		signal syscall.Signal // 0: it ends by itself
		status int
		stays  bool // the state, on the root bus
	}{
		{"return", "ivshctl state set STATE --timeout 2s --device DEVICE", 0, 0, false},
		{"SIGTERM", "ivshctl state set STATE --device DEVICE", syscall.SIGTERM, 0, false},
		{"SIGINT", "ivshctl wait 1 --state STATE --device DEVICE", syscall.SIGINT, 0, false},
		{"SIGTERM in mode poll", "ivsh-pingpong --mode poll --device DEVICE", syscall.SIGTERM, 1, false},
		{"SIGINT in mode interrupt", "ivsh-pingpong --mode interrupt --device DEVICE", syscall.SIGINT, 1, false},
		{"panic", "guestprog crash own STATE DEVICE", syscall.SIGUSR1, panicked, false},
		{"panic of another goroutine", "guestprog crash other STATE DEVICE", syscall.SIGUSR1, panicked, true},
		{"SIGKILL", "ivshctl state set STATE --device DEVICE", syscall.SIGKILL, killed, true},
	} {
		state := fmt.Sprint(10 + i)
		for _, c := range []struct {
			place, address, socket string
			stays                  bool
		}{
			{"root port", onPort, port.Socket, false},
			{"root bus", bindAddress, bus.Socket, end.stays},
		} {
			t.Run(end.name+", "+c.place, func(t *testing.T) {
				p := start(t, g, strings.Fields(strings.NewReplacer("STATE", state, "DEVICE", c.address).Replace(end.argv))...)
				waitState(t, c.socket, func(s uint32) bool {
					// That of ivsh-pingpong is above.
					return fmt.Sprint(s) == state || s > 255
				})
				if end.signal != 0 {
					if err := p.Signal(end.signal); err != nil {
						t.Fatal(err)
					}
				}
				p.end(end.status)
				want := "0\n"
				if c.stays {
					want = state + "\n"
				}
				out, err := onHost(t, "ivshctl", "state", "get", "0", "--device", c.socket).Output()
				if err != nil || string(out) != want {
					t.Errorf("got %q, %v; want %q", out, err, want)
				}
			})
		}
	}
}

// waitState waits on the host until peer 0 has a state.
func waitState(t *testing.T, socket string, ready func(state uint32) bool) {
	t.Helper()
	watch, err := checks.Start(checks.Host(hostFolder(t)), "ivshctl", "state", "watch", "--json", "--device", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Kill()
	for {
		line, err := watch.Line(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if c := decode[struct{ Peer, State uint32 }](t, line); c.Peer == 0 && ready(c.State) {
			return
		}
	}
}

// hostFolder is the folder of the commands for this host.
func hostFolder(t *testing.T) string {
	t.Helper()
	path, err := vm.HostBinary(t.Context(), "ivshctl")
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(path)
}

// TestVFIORules lets an ordinary user in the group of `ivshctl udev` use the
// device's own file, with a host process as its peer.
func TestVFIORules(t *testing.T) {
	s := serve(t, "--vectors", "3")
	g := guests(t, s, vm.Config{Kernel: fetch.Small, Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}, Packages: []string{"udev"}})[0]
	run(t, g, 0, "sh", "-ec", `
		echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd
		echo ivshmem:x:500:user >>/etc/group
		mkdir -p /etc/udev/rules.d
		ivshctl udev >/etc/udev/rules.d/71-ivshmem.rules
		udevadm verify /etc/udev/rules.d/71-ivshmem.rules
		/usr/lib/systemd/systemd-udevd --daemon >/dev/null 2>&1
		udevadm trigger --settle --action=add
		ivshctl bind
		udevadm settle`)
	says(t, g, 0, []string{"vfio-pci (iommufd)"}, "su", "user", "-c", "ivshctl info")
	args := []string{"--json", "--count", "200", "--warmup", "20"}
	p := start(t, g, "su", "user", "-c", "ulimit -l 0; exec ivsh-pingpong "+strings.Join(args, " "))
	if out, err := onHost(t, "ivsh-pingpong", append(args, "--device", s.Socket)...).CombinedOutput(); err != nil {
		t.Fatalf("host: %v\n%s", err, out)
	}
	p.end(0)
	checkPingPong(t, p.line()+"\n"+p.line(), "ping", 200, "poll", "interrupt")
	run(t, g, 0, "sh", "-c", "echo other:x:1001:1001::/tmp:/bin/sh >>/etc/passwd")
	says(t, g, 1, []string{"permission denied", "ivshctl udev"}, "su", "other", "-c", "ivshctl state get")
}
