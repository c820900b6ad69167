package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/google/pprof/profile"
)

// measurements writes what scripts/performance would have measured, in two
// rounds: each figure of the second is twice that of the first.
func measurements(t *testing.T) string {
	dir := t.TempDir()
	files := map[string]*strings.Builder{}
	add := func(name, over, mode string, size int, p50 float64) {
		if files[name] == nil {
			files[name] = &strings.Builder{}
		}
		for round := 1; round <= 2; round++ {
			fmt.Fprintf(files[name], `{"over":%q,"mode":%q,"size":%d,"round":%d,"messages":1000,"elapsed_s":1,"cpu_s":1.5,"machine":"test machine",`+
				`"rate_per_second":2000,"messages_per_second":%g,"bytes_per_s":%g,"rtt_ns":{"p50":%g,"p99":%g,"p999":%g}}`+"\n",
				over, mode, size, round, 1e6*p50, 1e6*p50, p50*float64(round), 2*p50*float64(round), 3*p50*float64(round))
		}
	}
	others := []struct{ over, mode string }{{"memory", "poll"}, {"eventfd", "thread"}, {"pipe", "thread"}, {"unix", "thread"}, {"seqpacket", "thread"}, {"tcp", "thread"}, {"tcp-go", "poller"}}
	log := &strings.Builder{}
	w := hdrhistogram.NewHistogramLogWriter(log)
	for _, mode := range []string{"poll", "adaptive", "interrupt"} {
		add("latency", "messages", mode, 64, 300)
		add("open", "messages", mode, 64, 300)
		add("rate", "messages", mode, 64, 300)
		add("throughput", "conn", mode, 64, 300)
		add("throughput", "conn", mode, 64<<10, 600)
	}
	add("latency", "section", "poll", 8, 200)
	add("latency", "line", "poll", 8, 100)
	add("latency", "eventfd", "thread", 8, 5000)
	for _, o := range others {
		add("latency", o.over, o.mode, 64, 200)
		add("throughput", o.over, o.mode, 64, 100)
		add("rate", o.over, o.mode, 64, 100)
	}
	for _, s := range append(others, []struct{ over, mode string }{{"messages", "poll"}, {"messages", "adaptive"}, {"messages", "interrupt"}}...) {
		for round := range 2 {
			h := hdrhistogram.New(1, int64(time.Hour), 3)
			for v := int64(1); v <= 1000; v++ {
				h.RecordValue(v * 100)
			}
			h.SetTag(fmt.Sprintf("%s-%s-64-round%d", s.over, s.mode, round+1))
			if err := w.OutputIntervalHistogram(h); err != nil {
				t.Fatal(err)
			}
		}
	}
	profiles(t, dir)
	for _, mode := range []string{"poll", "interrupt"} {
		add("profiled", "messages", mode, 64, 300)
	}
	for name, text := range files {
		write(t, filepath.Join(dir, name+".json"), text.String())
	}
	write(t, filepath.Join(dir, "latency.hlog"), log.String())
	return dir
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// profiles writes real profiles, of this program.
func profiles(t *testing.T, dir string) {
	if err := os.Mkdir(filepath.Join(dir, "profiles"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"messages-poll-64-leads", "messages-poll-64-answers", "messages-interrupt-64-leads", "messages-interrupt-64-answers"} {
		f, err := os.Create(filepath.Join(dir, "profiles", name+".pprof"))
		if err != nil {
			t.Fatal(err)
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); {
			runtime.GC() // something of the Go runtime
		}
		pprof.StopCPUProfile()
		f.Close()
	}
}

func TestReport(t *testing.T) {
	data, docs := measurements(t), t.TempDir()
	if err := report(data, docs, "svg"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(docs, "performance.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"on one machine: test machine.",
		"the median of 2 rounds, with",
		"Here they got 75 % (75 % – 75 %): **other work disturbed these measurements.**",
		"| 8 | a word in a section | poll | 300 ns (200 ns – 400 ns) | **2.00** (2.00 – 2.00) | 2.00 | 2.00 (2.00 – 2.00) |",
		"| 64 | `stream`, messages | poll | 450 ns (300 ns – 600 ns) | **1.50** (1.50 – 1.50) | 1.50 | 1.50 (1.50 – 1.50) |",
		"| 64 | *shared memory, eventfd* | thread | 300 ns (200 ns – 400 ns) | **1.00** (1.00 – 1.00) | 1.00 | 1.00 (1.00 – 1.00) |",
		"| `stream`, net.Conn | poll | 0.30 · **3.00** (3.00 – 3.00) | 0.60 |",
		"| `stream`, messages | poll | 300 (300 – 300) | 3.00 (3.00 – 3.00) |",
		"| Go runtime | ",
		"A sleeping round trip took 1.00 ms on average while both processes were charged 1.50 ms",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", text)
	}
	number := regexp.MustCompile(`NaN|Inf|<no value>|%!`)
	if bad := number.Find(text); bad != nil {
		t.Errorf("the page has %q", bad)
	}
	for name, labels := range map[string][]string{
		"latency":    {"percentile of the round trips", "round trip time", "99.9 %", "µs", "messages, poll", "Unix socket", "net.TCPConn, loopback"},
		"throughput": {"size of a message", "throughput, GB/s", "64 KiB", "conn, interrupt", "memcpy, shared memory", "TCP, loopback"},
	} {
		svg, err := os.ReadFile(filepath.Join(docs, "performance", name+".svg"))
		if err != nil {
			t.Fatal(err)
		}
		for _, label := range labels {
			if !strings.Contains(string(svg), ">"+label+"<") && !strings.Contains(string(svg), " "+label+"<") {
				t.Errorf("%s.svg lacks the label %q", name, label)
			}
		}
		if bad := number.Find(svg); bad != nil {
			t.Errorf("%s.svg has %q", name, bad)
		}
	}
}

// TestIncomplete takes a file away in turn: a page without it is not written.
func TestIncomplete(t *testing.T) {
	for _, name := range []string{"latency.json", "latency.hlog", "open.json", "throughput.json", "rate.json", "profiled.json", "profiles/messages-poll-64-leads.pprof"} {
		data, docs := measurements(t), t.TempDir()
		if err := os.Remove(filepath.Join(data, name)); err != nil {
			t.Fatal(err)
		}
		if err := report(data, docs, "svg"); err == nil {
			t.Errorf("without %s: got no error", name)
		}
		if _, err := os.Stat(filepath.Join(docs, "performance.md")); err == nil {
			t.Errorf("without %s: a page was written", name)
		}
	}
}

// TestHop gives the stacks of each hop, from the leaf on.
func TestHop(t *testing.T) {
	const module = "github.com/ivshmem-go/ivshmem"
	for _, test := range []struct {
		want  string
		stack []string
	}{
		{"kernel: ringing", []string{"internal/runtime/syscall/linux.Syscall6", "syscall.Syscall", module + "/internal/evfd.Signal", module + ".(*Device).Ring", module + "/stream.(*Endpoint).notify"}},
		{"kernel: going to sleep", []string{"internal/runtime/syscall/linux.Syscall6", module + "/internal/evfd.waitBriefly", module + ".(*waiters).lead", module + "/stream.(*Endpoint).lead"}},
		{"kernel: taking", []string{"syscall.Syscall6", module + "/internal/evfd.Take", module + ".(*waiters).count"}},
		{"device: arming", []string{"sync/atomic.(*Uint32).Load", module + ".(*waiters).look"}},
		{"looking", []string{module + "/shmem.Pause", module + "/stream.(*receiver).glances"}},
		{"copying", []string{"runtime.memmove", module + "/shmem.copyTo", module + "/stream.(*Conn).put"}},
		{"stream", []string{"sync.(*Mutex).Lock", module + "/stream.(*Endpoint).sleep", module + "/internal/pingpong.(*lead).trips"}},
		{"the measurement", []string{"github.com/HdrHistogram/hdrhistogram-go.(*Histogram).RecordValue", module + "/internal/pingpong.(*lead).trips"}},
		{"Go runtime", []string{"runtime.exitsyscall", "syscall.Syscall", module + "/internal/evfd.Signal"}},
		{"other", []string{"net.Dial"}},
	} {
		sample := &profile.Sample{}
		for _, name := range test.stack {
			sample.Location = append(sample.Location, &profile.Location{Line: []profile.Line{{Function: &profile.Function{Name: name}}}})
		}
		if got := hop(sample); !strings.HasPrefix(got, test.want) {
			t.Errorf("%s: got %q, want %q", test.stack[0], got, test.want)
		}
	}
}
