package suite

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// buildFor builds a package of this source, or the test of one, for an
// architecture.
func buildFor(t *testing.T, arch, verb, pkg, name string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), name)
	args := []string{"build", "-o", out, pkg}
	if verb == "test" {
		args = []string{"test", "-c", "-o", out, pkg}
	}
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
	return out
}

const module = "github.com/ivshmem-go/ivshmem"

// TestCopies copies at every alignment and length through the back ends of a
// stock guest, on both architectures.
func TestCopies(t *testing.T) {
	for _, arch := range []string{vm.AMD64, vm.ARM64} {
		t.Run(arch, func(t *testing.T) {
			s := serve(t)
			g := guests(t, s, vm.Config{
				Arch: arch, Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}},
				Files: map[string]string{
					"/bin/guestprog":  buildFor(t, arch, "build", module+"/test/vm/guestprog", "guestprog"),
					"/bin/shmem.test": buildFor(t, arch, "test", module+"/shmem", "shmem.test"),
				},
			})[0]
			check := func(backEnd string) {
				t.Helper()
				r := decode[struct {
					BackEnd string `json:"back_end"`
					Copies  int    `json:"copies"`
				}](t, run(t, g, 0, "guestprog", "copies"))
				if r.BackEnd != backEnd || r.Copies < 10000 {
					t.Errorf("got %+v, want back end %s and at least 10000 copies", r, backEnd)
				}
			}
			check("sysfs")
			bind(t, g, "0000:00:0e.0", "vfio-pci")
			check("vfio-pci")
			run(t, g, 0, "shmem.test")
		})
	}
}

// TestMixed lets an x86-64 and an arm64 guest play with each other.
func TestMixed(t *testing.T) {
	s := serve(t, "--vectors", "3")
	g := guests(t, s, vm.Config{Name: "amd64", Driver: "vfio-pci"}, vm.Config{Name: "arm64", Arch: vm.ARM64, Driver: "vfio-pci"})
	argv := []string{"ivsh-pingpong", "--json", "--count", "500", "--warmup", "50"}
	p := start(t, g[1], argv...)
	out := run(t, g[0], 0, argv...)
	p.end(0)
	checkPingPong(t, out, "ping", 500, "poll", "interrupt")
	checkPingPong(t, p.line()+"\n"+p.line(), "pong", 500, "poll", "interrupt")
	t.Logf("x86-64 and arm64:\n%s", out)
}
