package suite

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// goBuild builds something of the project for guests, and returns its path.
func goBuild(t *testing.T, arch string, args ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program")
	cmd := exec.CommandContext(deadline(t), "go", append(args[:len(args)-1:len(args)-1], "-o", out, args[len(args)-1])...)
	cmd.Dir = os.Getenv("IVSHMEM_SOURCE")
	if cmd.Dir == "" {
		cmd.Dir = "../../.."
	}
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return out
}

// TestHTTP runs the example: a server in one guest, its client in another, and
// on the host.
func TestHTTP(t *testing.T) {
	s := serve(t, "--peers", "3", "--vectors", "2", "--output", "256K")
	program := goBuild(t, vm.AMD64, "build", "./examples/http")
	files := map[string]string{"/bin/http": program}
	g := guests(t, s, vm.Config{Name: "server", Driver: "vfio-pci", Files: files}, vm.Config{Name: "client", Driver: "vfio-pci", Files: files})
	server := start(t, g[0], "/bin/http", "", "serve")
	if l := server.line(); l != "ready" {
		t.Fatal(l)
	}
	if out := run(t, g[1], 0, "/bin/http", "", "get", "http://0/hello"); !strings.Contains(out, "hello 1:") {
		t.Errorf("in the guest: %q", out)
	}
	out, err := exec.CommandContext(deadline(t), program, s.Socket, "get", "http://0/hello").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "hello 2:") {
		t.Errorf("on the host: %q, %v", out, err)
	}
}

// TestNetConn passes nettest in a guest: the program has both ends, so the guest
// has two devices of one link. QEMU 11.1 gives the vectors of both the same
// eventfds (interrupts of either arrive at the second), so one end is rung,
// through vfio-pci, and the other, bound to no driver, looks by itself; in turn.
// There are many peers, and the State Table traps: an end that looked at it
// whenever it looks would do nothing else.
func TestNetConn(t *testing.T) {
	s := serve(t, "--peers", "64", "--vectors", "2", "--output", "64K")
	const first, second = "0000:00:08.0", "0000:00:09.0"
	g := guests(t, s, vm.Config{
		Driver:  "vfio-pci",
		Devices: []vm.Device{{Socket: s.Socket, Address: "0x8"}, {Socket: s.Socket, Address: "0x9"}},
		Files:   map[string]string{"/bin/stream.test": goBuild(t, vm.AMD64, "test", "-c", "./stream")},
	})[0]
	for _, unbound := range []string{first, second} {
		t.Run(unbound+" without interrupts", func(t *testing.T) {
			run(t, g, 0, "ivshctl", "unbind", unbound)
			r := run(t, g, 0, "env", "IVSHMEM_TEST_DEVICES="+first+","+second,
				"stream.test", "-test.v", "-test.run", "^TestConnDevices$", "-test.timeout", "110s")
			t.Log(r)
			if n := strings.Count(r, "--- PASS: TestConnDevices/"); n < 11 || strings.Contains(r, "SKIP") {
				t.Errorf("%d tests of nettest passed, want all 11:\n%s", n, r)
			}
			run(t, g, 0, "ivshctl", "bind", unbound)
		})
	}
}
