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
