package suite

import (
	"fmt"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
)

// TestStrict runs two guests and a host process on a strict link.
func TestStrict(t *testing.T) {
	const (
		address = "0000:00:0e.0"
		// Where the sections are: 4 KiB, 1 MiB, and 64 KiB for each peer.
		readWrite, output0, output1, output2 = 0x1000, 0x101000, 0x111000, 0x121000
	)
	s := serve(t, "--mode", "strict", "--peers", "3", "--vectors", "3", "--output", "64K")
	config := vm.Config{
		Driver: "vfio-pci", Devices: []vm.Device{{Socket: s.Socket, Address: "0xe"}},
		Files: map[string]string{"/bin/guestprog": buildFor(t, vm.AMD64, "build", module+"/test/vm/guestprog", "guestprog")},
	}
	g := guests(t, s, config, config)
	host, err := ivshmem.Open(s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()

	t.Run("shown", func(t *testing.T) {
		says(t, g[0], 0, []string{"mode", "strict"}, "ivshctl", "info")
		says(t, g[0], 0, []string{`"inputs_trap": true`}, "ivshctl", "info", "--json")
		says(t, g[0], 0, []string{"strict: the output sections of others are reached by messages"}, "ivshctl", "doctor")
		// It is in what a user without privileges sees.
		run(t, g[0], 0, "sh", "-c", "echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd")
		says(t, g[0], 0, []string{"0x4107"}, "su", "user", "-c", "cat /sys/bus/pci/devices/"+address+"/subsystem_device")
		if !host.InputsTrap() {
			t.Error("the host process is not told")
		}
	})
	t.Run("pingpong", func(t *testing.T) {
		playForm(t, g, "poll", "interrupt")
		// It went through the section that is fast in both directions.
		for id := range uint64(2) {
			in, err := host.Sections().Input(uint32(id))
			if err != nil {
				t.Fatal(err)
			}
			lane, err := host.Sections().ReadWrite.Load64(64 * id)
			other, err2 := in.Load64(0)
			if lane == 0 || other != 0 || err != nil || err2 != nil {
				t.Errorf("peer %d: %#x in its share of the R/W section, %#x in its output section, %v %v", id, lane, other, err, err2)
			}
		}
	})
	t.Run("states", func(t *testing.T) {
		run(t, g[0], 0, "ivshctl", "state", "set", "0x55", "--hold")
		if out := run(t, g[1], 0, "ivshctl", "state", "get", "0"); out != "85\n" {
			t.Errorf("the other guest sees state %q", out)
		}
		if v, err := host.State(0); v != 0x55 || err != nil {
			t.Errorf("the host process sees state %#x, %v", v, err)
		}
	})

	// What a guest can write, and what it costs to look.
	if err := host.Sections().Output.Store32(0, 0x99); err != nil {
		t.Fatal(err)
	}
	type word struct {
		Offset                uint64
		Before, Stored, After uint32
		Swapped               bool
		ReadNS                float64 `json:"read_ns"`
	}
	run(t, g[0], 0, "ivshctl", "unbind", address)
	argv := []string{"guestprog", "bar2", address}
	rows := []struct {
		name     string
		offset   uint64
		before   uint32
		writable bool
	}{
		{"State Table, own entry", 0, 0x55, false},
		{"State Table, foreign entry", 4, 0, false},
		{"R/W section", readWrite + 0x800, 0, true},
		{"own output section", output0 + 0x800, 0, true},
		{"foreign output section", output1 + 0x800, 0, false},
		{"host process's output section", output2, 0x99, false},
	}
	for _, r := range rows {
		argv = append(argv, fmt.Sprintf("%#x", r.offset))
	}
	words := decode[[]word](t, run(t, g[0], 0, argv...))
	slowest, fastest := 0.0, 1e9 // of the mapped, of the trapped
	for i, r := range rows {
		w := words[i]
		if w.Before != r.before {
			t.Errorf("%s: read %#x, want %#x", r.name, w.Before, r.before)
		}
		if r.writable != (w.After == w.Stored) || !r.writable && w.After != w.Before {
			t.Errorf("%s: %#x was written, %#x is there, was %#x", r.name, w.Stored, w.After, w.Before)
		}
		if !w.Swapped {
			t.Errorf("%s: a compare-and-swap says that it failed", r.name)
		}
		if r.writable {
			slowest = max(slowest, w.ReadNS)
		} else {
			fastest = min(fastest, w.ReadNS)
		}
		t.Logf("%-30s %.1f ns a read", r.name, w.ReadNS)
	}
	if fastest < 10*slowest {
		t.Errorf("a trapped read takes %.0f ns, a mapped one %.0f: expected one to be a message", fastest, slowest)
	}
	t.Logf("a trapped read takes %.0f times as long as a mapped one", fastest/slowest)
	// The others see nothing of what was tried.
	for peer, want := range []uint32{words[3].After + 1, 0} {
		in, err := host.Sections().Input(uint32(peer))
		if err != nil {
			t.Fatal(err)
		}
		if v, err := in.Load32(0x800); v != want || err != nil {
			t.Errorf("output section %d: the host process reads %#x, %v, want %#x", peer, v, err, want)
		}
	}
	if v, err := host.Sections().Output.Load32(0); v != 0x99 || err != nil {
		t.Errorf("the host process's own output section: %#x, %v", v, err)
	}
	if v, err := host.State(0); v != 0x55 || err != nil {
		t.Errorf("state %#x, %v after a write to the State Table", v, err)
	}
	checkKernelLog(t, g[0])
}
