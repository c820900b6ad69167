package suite

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
)

// TestComing looks on from the host while a guest gets the device by hot-plug,
// is reset, and its QEMU is restarted.
func TestComing(t *testing.T) {
	s := serve(t, "--peers", "2", "--vectors", "2")
	host, err := ivshmem.Open(s.Socket) // peer 0
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	sees := func(what string, want uint32) {
		t.Helper()
		var got uint32
		err := host.Wait(deadline(t), nil, func() bool {
			got, err = host.State(1)
			return err != nil || got == want
		})
		if err != nil {
			t.Fatalf("%s: state of the guest is %d, want %d: %v", what, got, want, err)
		}
	}
	config := vm.Config{
		Name: "guest", Devices: []vm.Device{},
		QEMU: []string{"-device", "pcie-root-port,id=hot,chassis=9"},
	}
	plug := func(g *vm.Guest) {
		t.Helper()
		err := g.Monitor().Execute(deadline(t), "device_add", map[string]any{
			"driver": "vfio-user-pci", "id": "plugged", "bus": "hot",
			"socket": map[string]string{"type": "unix", "path": s.Socket},
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(limit); ; {
			if out := run(t, g, 0, "ivshctl", "list"); strings.Contains(out, "undefined") {
				return
			}
			if time.Now().After(end) {
				t.Fatal("the guest does not see the device")
			}
		}
	}
	use := func(g *vm.Guest, what string) {
		t.Helper()
		run(t, g, 0, "ivshctl", "bind", "--driver", "vfio-pci")
		p := start(t, g, "ivshctl", "wait", "1", "--state", "7")
		sees(what, 7)
		if err := host.Ring(1, 1); err != nil {
			t.Fatal(err)
		}
		p.end(0)
		sees(what+", its program has ended", 0)
	}
	g := guests(t, s, config)[0]
	plug(g)
	use(g, "plugged in")

	start(t, g, "ivshctl", "wait", "1", "--state", "8")
	sees("before the reset", 8)
	if err := g.Reset(deadline(t)); err != nil {
		t.Fatal(err)
	}
	sees("reset", 0)
	use(g, "after the reset")

	start(t, g, "ivshctl", "wait", "1", "--state", "9")
	sees("before the end of QEMU", 9)
	g.Kill()
	sees("QEMU has ended", 0)
	again := guests(t, s, config)[0]
	plug(again)
	use(again, "in another QEMU")
}

// TestMigration shows what docs/link.md says of migration: QEMU does not
// refuse to write a guest to a file, and says nothing of the device.
func TestMigration(t *testing.T) {
	s := serve(t)
	g := guests(t, s, vm.Config{Driver: "vfio-pci"})[0]
	file := filepath.Join(t.TempDir(), "guest")
	if err := g.Monitor().Execute(deadline(t), "migrate", map[string]any{"uri": "file:" + file}, nil); err != nil {
		t.Fatalf("QEMU refuses to migrate: what docs/link.md says is out of date: %v", err)
	}
	var state struct {
		Status string `json:"status"`
		Error  string `json:"error-desc"`
	}
	for ctx := deadline(t); state.Status != "completed"; {
		if err := g.Monitor().Execute(ctx, "query-migrate", nil, &state); err != nil {
			t.Fatal(err)
		}
		if state.Status == "failed" || state.Status == "cancelled" || ctx.Err() != nil {
			t.Fatalf("migration %s: %s: what docs/link.md says is out of date", state.Status, state.Error)
		}
	}
	if info, err := os.Stat(file); err != nil || info.Size() == 0 {
		t.Errorf("the file: %v, %v", info, err)
	}
}
