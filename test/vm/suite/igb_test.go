package suite

import (
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// TestIGB runs the toolkit through igb_uio, which delivers vector 0 only.
func TestIGB(t *testing.T) {
	cache, err := fetch.Open(func(message string) { t.Log(message) })
	if err != nil {
		t.Fatal(err)
	}
	ko, err := cache.IGBUIO(t.Context(), fetch.Bookworm, vm.AMD64)
	if err != nil {
		t.Fatal(err)
	}
	one := serve(t, "--vectors", "1")
	many := serve(t, "--vectors", "3")
	config := vm.Config{
		Kernel: fetch.Bookworm, Files: map[string]string{"/igb_uio.ko": ko},
		Devices: []vm.Device{{Socket: one.Socket, Address: "0xe"}, {Socket: many.Socket, Address: "0xf"}},
	}
	g := guests(t, one, config, config)
	for _, g := range g {
		run(t, g, 0, "insmod", "/igb_uio.ko")
		bind(t, g, "0000:00:0e.0", "igb_uio")
		bind(t, g, "0000:00:0f.0", "igb_uio")
	}
	t.Run("pingpong on vector 0", func(t *testing.T) {
		argv := []string{"ivsh-pingpong", "--json", "--count", "300", "--warmup", "30", "--device", "0000:00:0e.0"}
		p := start(t, g[1], argv...)
		out := run(t, g[0], 0, argv...)
		p.end(0)
		for line := range strings.Lines(out) {
			if r := decode[pingpong](t, line); r.Errors != 0 || r.Messages != 300 {
				t.Errorf("got %+v", r)
			}
		}
	})
	t.Run("vectors", func(t *testing.T) {
		w := start(t, g[0], "ivshctl", "wait", "0", "--device", "uio1", "--state", "1")
		run(t, g[1], 0, "sh", "-c", "until ivshctl state get 0 -d 00:0f.0 | grep -q 1; do :; done; ivshctl ring 0 0 -d 00:0f.0")
		if got := w.line(); !strings.HasPrefix(got, "vector 0: ") {
			t.Errorf("got %q", got)
		}
		w.end(0)
		if got := run(t, g[0], 6, "ivshctl", "wait", "1", "--device", "00:0f.0"); !strings.Contains(got, "agree on these with the peers") {
			t.Errorf("vector 1: got %q", got)
		}
	})
	t.Run("doctor", func(t *testing.T) {
		if got := run(t, g[0], 0, "ivshctl", "doctor", "00:0f.0"); !strings.Contains(got, "only vector 0 arrives") {
			t.Errorf("got %q", got)
		}
	})
	t.Run("driver unbound", func(t *testing.T) {
		w := start(t, g[0], "ivshctl", "wait", "0", "--device", "00:0f.0", "--state", "1")
		run(t, g[1], 0, "sh", "-c", "until ivshctl state get 0 -d 00:0f.0 | grep -q 1; do :; done")
		run(t, g[0], 0, "sh", "-c", "echo 0000:00:0f.0 >/sys/bus/pci/drivers/igb_uio/unbind")
		w.end(7)
	})
}
