package suite

import (
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// TestRemoval takes the device away from under a program that waits: the wait
// ends with the exit code of a device that is gone, and the kernel is not
// kept waiting for it.
func TestRemoval(t *testing.T) {
	s := serve(t)
	g := guests(t, s, vm.Config{Driver: "vfio-pci", Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}}})[0]
	const address = "0000:00:0e.0"
	waiting := func() *process {
		w := start(t, g, "ivshctl", "wait", "1", "--state", "3")
		run(t, g, 0, "sh", "-c", "until ivshctl info --json | grep -q '\"command\": \"ivshctl\"'; do :; done")
		return w
	}
	watch := start(t, g, "ivshctl", "list", "--watch")
	for range 2 { // the heading, and the device
		watch.line()
	}
	t.Run("driver unbound", func(t *testing.T) {
		w := waiting()
		run(t, g, 0, "sh", "-c", "echo "+address+" >/sys/bus/pci/drivers/vfio-pci/unbind")
		w.end(7)
		bind(t, g, address, "vfio-pci")
		run(t, g, 0, "ivshctl", "info")
	})
	t.Run("device removed", func(t *testing.T) {
		w := waiting()
		run(t, g, 0, "sh", "-c", "echo 1 >/sys/bus/pci/devices/"+address+"/remove")
		w.end(7)
		run(t, g, 3, "ivshctl", "info")
		run(t, g, 0, "sh", "-c", "echo 1 >/sys/bus/pci/rescan; cat /sys/bus/pci/devices/"+address+"/vendor")
		run(t, g, 0, "ivshctl", "info")
	})
	t.Run("watched", func(t *testing.T) {
		for _, want := range []string{
			address + " unbind vfio-pci", address + " bind vfio-pci", address + " unbind vfio-pci", address + " remove ", address + " add ",
		} {
			// The kernel names the driver of an unbind only in newer versions.
			if got := watch.line(); got != want && got != strings.TrimSuffix(want, "vfio-pci") {
				t.Errorf("got %q, want %q", got, want)
			}
		}
		if err := watch.Signal(15); err != nil {
			t.Fatal(err)
		}
		watch.end(0)
	})
}
