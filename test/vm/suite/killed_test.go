package suite

import (
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// TestKilledVFIO kills a program that holds its device through vfio-pci. Behind
// a root port the kernel resets the device when the file is closed; on the
// root bus it cannot, and the state stays until the next owner.
func TestKilledVFIO(t *testing.T) {
	port, bus := serve(t), serve(t)
	g := guests(t, port, vm.Config{Driver: "vfio-pci", Devices: []vm.Device{
		{Socket: port.Socket, RootPort: true}, {Socket: bus.Socket, Address: "0xe"},
	}})[0]
	const onBus = "0000:00:0e.0"
	var onPort string
	for line := range strings.Lines(run(t, g, 0, "ivshctl", "list")) {
		if f := strings.Fields(line); strings.HasPrefix(f[0], "0000:") && f[0] != onBus {
			onPort = f[0]
		}
	}
	for _, c := range []struct {
		name, address, socket string
		want                  string // the state afterwards
	}{
		{"root port", onPort, port.Socket, "0\n"},
		{"root bus", onBus, bus.Socket, "5\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := start(t, g, "ivshctl", "state", "set", "5", "--device", c.address)
			watch := onHost(t, "ivshctl", "state", "watch", "--count", "1", "--device", c.socket)
			if out, err := watch.Output(); err != nil || string(out) != "peer 0: state 5, was 0\n" {
				t.Fatalf("got %q, %v", out, err)
			}
			if err := p.Signal(9); err != nil {
				t.Fatal(err)
			}
			p.end(128 + 9)
			// The process is gone only when its files are closed.
			out, err := onHost(t, "ivshctl", "state", "get", "0", "--device", c.socket).Output()
			if err != nil || string(out) != c.want {
				t.Errorf("got %q, %v; want %q", out, err, c.want)
			}
			// The next owner starts from 0.
			run(t, g, 0, "ivshctl", "state", "set", "6", "--timeout", "1ms", "--device", c.address)
			if out, err = onHost(t, "ivshctl", "state", "get", "0", "--device", c.socket).Output(); err != nil || string(out) != "0\n" {
				t.Errorf("after the next owner: got %q, %v", out, err)
			}
		})
	}
}
