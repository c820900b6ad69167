package suite

import (
	"fmt"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// TestUIO runs the toolkit through uio_ivshmem, as root and as an ordinary
// user.
func TestUIO(t *testing.T) {
	const address = "0000:00:0e.0"
	s := serve(t, "--vectors", "3")
	config := vm.Config{
		Kernel: fetch.Bookworm, Driver: vm.OwnModule, Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}},
		Files: map[string]string{"/bin/guestprog": buildFor(t, vm.AMD64, "build", module+"/test/vm/guestprog", "guestprog")},
	}
	g := guests(t, s, config, config)
	pingPong := func(t *testing.T, prefix ...string) {
		t.Helper()
		argv := append(prefix, "ivsh-pingpong --json --count 300 --warmup 30")
		if prefix == nil {
			argv = strings.Fields(argv[0])
		}
		p := start(t, g[1], argv...)
		out := run(t, g[0], 0, argv...)
		p.end(0)
		for line := range strings.Lines(out) {
			// All vectors share a counter: only the messages are checked.
			r := decode[pingpong](t, line)
			if r.Errors != 0 || r.Messages != 300 || r.RTT == nil {
				t.Errorf("got %+v", r)
			}
		}
	}
	t.Run("info", func(t *testing.T) {
		i := decode[info](t, run(t, g[0], 0, "ivshctl", "info", "--json"))
		if i.Driver != "uio_ivshmem" || !i.OneShot || i.ID == nil || *i.ID != 0 || len(i.Sections) != 4 || i.Vectors != 3 {
			t.Errorf("got %+v", i)
		}
	})
	t.Run("pingpong", func(t *testing.T) { pingPong(t) })
	t.Run("copies", func(t *testing.T) {
		if got := run(t, g[0], 0, "guestprog", "copies", "uio0"); !strings.Contains(got, "uio_ivshmem") {
			t.Errorf("got %q", got)
		}
	})
	t.Run("states by interrupt", func(t *testing.T) {
		w := start(t, g[1], "ivshctl", "state", "watch", "--json")
		p := start(t, g[0], "ivshctl", "state", "set", "5")
		if got, want := w.line(), `{"peer":0,"state":5,"was":0}`; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		// The driver sees to it that the peers learn of the death.
		if err := p.Signal(9); err != nil {
			t.Fatal(err)
		}
		if got, want := w.line(), `{"peer":0,"state":0,"was":5}`; got != want {
			t.Errorf("after kill -9: got %q, want %q", got, want)
		}
		if err := w.Signal(15); err != nil {
			t.Fatal(err)
		}
		w.end(0)
	})
	t.Run("doctor", func(t *testing.T) {
		const file = "/sys/bus/pci/devices/" + address + "/config"
		for _, c := range []struct {
			name                 string
			offset, bad, good    int
			check, found, remedy string
		}{
			{"memory decoding off", 4, 4, 6, "Command register", "memory decoding is off", "bind"},
			{"bus master off", 4, 2, 6, "Command register", "bus master is off", "bind"},
			{"one-shot mode off", 0x43, 0, 1, "one-shot mode", "off", "bind"},
		} {
			set := func(v int) {
				run(t, g[0], 0, "sh", "-c", fmt.Sprintf(`printf '\%03o' | dd of=%s bs=1 seek=%d conv=notrunc 2>/dev/null`, v, file, c.offset))
			}
			set(c.bad)
			got := run(t, g[0], 1, "ivshctl", "doctor")
			set(c.good)
			if !strings.Contains(got, "fail  "+c.check) || !strings.Contains(got, c.found) || !strings.Contains(got, c.remedy) {
				t.Errorf("%s: got %s", c.name, got)
			}
		}
		run(t, g[0], 0, "ivshctl", "doctor")
	})
	t.Run("ordinary user", func(t *testing.T) {
		for _, g := range g {
			run(t, g, 0, "sh", "-c", "echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd; chmod 666 /dev/uio0")
		}
		pingPong(t, "su", "user", "-c")
		if got := run(t, g[0], 0, "su", "user", "-c", "ivshctl doctor"); !strings.Contains(got, "through uio_ivshmem") {
			t.Errorf("doctor: got %q", got)
		}
	})
	t.Run("driver unbound", func(t *testing.T) {
		w := start(t, g[0], "ivshctl", "wait", "1", "--state", "3")
		run(t, g[0], 0, "sh", "-c", "until ivshctl info --json | grep -q '\"command\": \"ivshctl\"'; do :; done")
		run(t, g[0], 0, "sh", "-c", "echo "+address+" >/sys/bus/pci/drivers/uio_ivshmem/unbind")
		w.end(7)
	})
}
