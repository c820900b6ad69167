package suite

import (
	"bytes"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

type pingpong struct {
	Mode     string `json:"mode"`
	Role     string `json:"role"`
	Messages uint64 `json:"messages"`
	Errors   uint64 `json:"errors"`
	RTT      *struct {
		Min, P50, P90, P99, P999, Max int64
	} `json:"rtt_ns"`
	Interrupts map[string]uint64 `json:"interrupts"`
}

// checkPingPong checks the results of one peer, a line per mode.
func checkPingPong(t *testing.T, out, role string, messages uint64, modes ...string) {
	t.Helper()
	got := strings.Split(strings.TrimSpace(out), "\n")
	if len(got) != len(modes) {
		t.Fatalf("got %d results, want %d: %q", len(got), len(modes), out)
	}
	for i, mode := range modes {
		r := decode[pingpong](t, got[i])
		if r.Mode != mode || r.Role != role || r.Errors != 0 || r.Messages != messages {
			t.Errorf("%s %s: got %+v", mode, role, r)
		}
		if r.RTT == nil || r.RTT.Min <= 0 || r.RTT.Min > r.RTT.P50 || r.RTT.P50 > r.RTT.P90 || r.RTT.P90 > r.RTT.P99 || r.RTT.P99 > r.RTT.P999 || r.RTT.P999 > r.RTT.Max {
			t.Errorf("%s: round trips %+v", mode, r.RTT)
		}
		// Odd numbers ring vector 1, even ones vector 2.
		if mode == "interrupt" && (r.Interrupts["1"] < messages/2 || r.Interrupts["2"] < messages/2) {
			t.Errorf("interrupts by vector: %v, want at least %d on 1 and on 2", r.Interrupts, messages/2)
		}
	}
}

// TestPair runs two guests on a link.
func TestPair(t *testing.T) {
	s := serve(t, "--vectors", "3")
	g := guests(t, s, vm.Config{Name: "g0", Driver: "vfio-pci"}, vm.Config{Name: "g1", Driver: "vfio-pci"})

	both := func(argv ...string) (string, string) {
		p := start(t, g[1], argv...)
		out := run(t, g[0], 0, argv...)
		p.end(0)
		var other strings.Builder
		for len(p.out.c) > 0 {
			other.WriteString(<-p.out.c + "\n")
		}
		return out, other.String()
	}
	t.Run("pingpong", func(t *testing.T) {
		out, other := both("ivsh-pingpong", "--json", "--count", "1000", "--warmup", "100")
		checkPingPong(t, out, "ping", 1000, "poll", "interrupt")
		checkPingPong(t, other, "pong", 1000, "poll", "interrupt")
		t.Logf("two guests:\n%s", out)
	})
	t.Run("pingpong through the poller", func(t *testing.T) {
		out, _ := both("ivsh-pingpong", "--json", "--count", "300", "--warmup", "30", "--mode", "interrupt", "--sleep", "poller")
		checkPingPong(t, out, "ping", 300, "interrupt")
	})
	t.Run("modes differ", func(t *testing.T) {
		p := start(t, g[1], "ivsh-pingpong", "--mode", "poll")
		if got := run(t, g[0], 1, "ivsh-pingpong", "--mode", "interrupt"); !strings.Contains(got, "--mode") {
			t.Errorf("got %q", got)
		}
		p.end(1)
	})
	t.Run("states by interrupt", func(t *testing.T) {
		w := start(t, g[1], "ivshctl", "state", "watch", "--json")
		p := start(t, g[0], "ivshctl", "state", "set", "5")
		if got, want := w.line(), `{"peer":0,"state":5,"was":0}`; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if err := p.Signal(15); err != nil {
			t.Fatal(err)
		}
		p.end(0)
		if got, want := w.line(), `{"peer":0,"state":0,"was":5}`; got != want {
			t.Errorf("after the end: got %q, want %q", got, want)
		}
		run(t, g[0], 0, "ivshctl", "state", "set", "0x80000006", "--hold")
		if got, want := w.line(), `{"peer":0,"state":2147483654,"was":0}`; got != want {
			t.Errorf("held: got %q, want %q", got, want)
		}
		if got := w.stderr.String(); got != "" {
			t.Errorf("watching without interrupts? %q", got)
		}

		t.Run("killed", func(t *testing.T) {
			g[0].Kill()
			if got, want := w.line(), `{"peer":0,"state":0,"was":2147483654}`; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			if err := w.Signal(15); err != nil {
				t.Fatal(err)
			}
			w.end(0)
		})
	})
}

// TestGuestAndHost runs a guest and a host process on a link.
func TestGuestAndHost(t *testing.T) {
	s := serve(t, "--vectors", "3", "--output", "0")
	g := guests(t, s, vm.Config{Driver: "vfio-pci", Devices: []vm.Device{{Socket: s.Socket, RootPort: true}}})[0]
	args := []string{"--json", "--count", "2000", "--warmup", "100"}
	p := start(t, g, append([]string{"ivsh-pingpong"}, args...)...)
	host := onHost(t, "ivsh-pingpong", append(args, "--device", s.Socket)...)
	var stderr bytes.Buffer
	host.Stderr = &stderr
	out, err := host.Output()
	if err != nil {
		t.Fatalf("host: %v\n%s%s", err, out, stderr.String())
	}
	p.end(0)
	checkPingPong(t, string(out), "pong", 2000, "poll", "interrupt")
	checkPingPong(t, p.line()+"\n"+p.line(), "ping", 2000, "poll", "interrupt")
}
