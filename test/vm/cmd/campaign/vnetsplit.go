package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// splits are how the calls are made, in the order of offloads being 0 and 1.
var splits = []string{"each frame a call", "offloads"}

// split finds how much of the CPU time of a transfer goes into calls to the
// interfaces: the tests of package tap have ends that measure that.
//
// With offloads a call moves up to 64 KiB, and checksums are this side's work;
// without, each frame is a call, and they are the kernel's.
func (v *vnetBench) split(network string, mtu int, record func(string, float64)) error {
	for i, how := range splits {
		if err := v.splitOnce(network, mtu, i, func(what string, value float64) { record(how+", "+what, value) }); err != nil {
			return fmt.Errorf("%s: %w", how, err)
		}
	}
	return nil
}

func (v *vnetBench) splitOnce(network string, mtu, offloads int, record func(string, float64)) error {
	other := fmt.Sprintf("split%d", offloads)
	end := filepath.Join(v.dir, "tap.test")
	build := exec.CommandContext(v.ctx, "go", "test", "-c", "-o", end, "./vnet/tap")
	build.Dir = os.Getenv("IVSHMEM_SOURCE")
	if text, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the ends that measure: %w\n%s", err, text)
	}
	var found [2]*lineWatch
	stop, err := v.startEnds(func(i int, socket string) *exec.Cmd {
		cmd := exec.CommandContext(v.ctx, end)
		cmd.Env = append(os.Environ(), fmt.Sprintf("IVSHMEM_TAP_MEASURED=%s %d %s %d", other, mtu, socket, offloads))
		found[i] = newLineWatch("ready")
		cmd.Stdout = found[i]
		return cmd
	})
	if err != nil {
		return err
	}
	network = strings.Replace(network, "10.", fmt.Sprintf("10.%d", 1+offloads), 1)
	var transfer iperfEnd
	err = errors.Join(v.a.configure(other, network+"1/24", mtu), v.b.configure(other, network+"2/24", mtu))
	if err == nil {
		if err = v.reach(network + "2"); err == nil {
			transfer, err = v.iperf(network+"2", 3)
		}
	}
	stop()
	if err != nil {
		return err
	}
	var inTAP, total float64
	for _, f := range found {
		var end struct {
			TAP   float64 `json:"tap_ns"`
			Total float64 `json:"total_ns"`
		}
		_, text, _ := strings.Cut(string(f.got), "ready\n")
		if err := json.Unmarshal([]byte(text), &end); err != nil {
			return fmt.Errorf("what an end measured: %w: %q", err, f.got)
		}
		inTAP, total = inTAP+end.TAP, total+end.Total
	}
	record("tap_percent", 100*inTAP/total)
	record("rest_percent", 100*(1-inTAP/total))
	record("ms_per_gb", total/1e6/(transfer.Received.Bytes/1e9))
	return nil
}

// tables shows the medians and their spread.
func (v *vnetBench) tables(mtus []int) {
	spread := func(mtu int, way, what, format string) string {
		s := v.r.Samples[sampleName(mtu, way, what)]
		if len(s) == 0 {
			return ""
		}
		low, high := s[0], s[0]
		for _, x := range s {
			low, high = min(low, x), max(high, x)
		}
		return fmt.Sprintf(format+" ("+format+"–"+format+")", median(s), low, high)
	}
	for _, mtu := range mtus {
		t := Table{
			Title: fmt.Sprintf("Two name spaces of one host, MTU %d: median (range)", mtu),
			Head:  []string{"way", "TCP, Gbit/s", "64-byte datagrams, 1000/s", "ping, µs"},
		}
		for _, way := range ways {
			t.Rows = append(t.Rows, []string{way, spread(mtu, way, "tcp_gbit", "%.2f"), spread(mtu, way, "small_kpps", "%.0f"), spread(mtu, way, "ping_us", "%.0f")})
		}
		split := Table{
			Title: fmt.Sprintf("CPU time of both ends of vnet, TCP, MTU %d", mtu),
			Head:  []string{"how", "ms for a GB", "TAP system calls, %", "everything else, %"},
		}
		for _, how := range splits {
			get := func(what string) string { return spread(mtu, wayVnet, how+", "+what, "%.1f") }
			split.Rows = append(split.Rows, []string{how, get("ms_per_gb"), get("tap_percent"), get("rest_percent")})
		}
		v.r.Tables = append(v.r.Tables, t, split)

	}
}

// ratio checks the median of the ratios within rounds.
func (v *vnetBench) ratio(mtu int, way string, least float64) {
	ours, theirs := v.r.Samples[sampleName(mtu, wayVnet, "tcp_gbit")], v.r.Samples[sampleName(mtu, way, "tcp_gbit")]
	var ratios []float64
	for i := range min(len(ours), len(theirs)) {
		ratios = append(ratios, ours[i]/theirs[i])
	}
	v.r.atLeast(fmt.Sprintf("MTU %d: TCP, of %s", mtu, way), median(ratios), least)
}

// lineWatch waits for a text in what a program prints.
type lineWatch struct {
	text []byte
	seen chan struct{}

	mu  sync.Mutex
	got []byte
}

func newLineWatch(text string) *lineWatch {
	return &lineWatch{text: []byte(text), seen: make(chan struct{})}
}

func (w *lineWatch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.got = append(w.got, p...)
	if w.text != nil && bytes.Contains(w.got, w.text) {
		w.text = nil
		close(w.seen)
	}
	return len(p), nil
}
