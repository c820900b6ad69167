package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/pingpong"
)

// record is what is printed of a measurement.
type record struct {
	Over      string           `json:"over"`
	Mode      string           `json:"mode"`
	Measure   pingpong.Measure `json:"measure"`
	Role      string           `json:"role,omitempty"` // over a section: ping leads
	Size      int              `json:"size"`           // bytes of a message
	Round     int              `json:"round"`          // from 1
	Messages  uint64           `json:"messages"`
	Errors    uint64           `json:"errors"`
	Seconds   float64          `json:"elapsed_s"`
	Wanted    float64          `json:"rate_per_second,omitempty"` // that --rate asked for
	RTT       *rtt             `json:"rtt_ns,omitempty"`
	PerSecond float64          `json:"messages_per_second,omitempty"`
	BytesPerS float64          `json:"bytes_per_s,omitempty"`
	// What both processes spent; over a section it is not counted.
	CPU         *float64       `json:"cpu_s,omitempty"`
	CPUPerGB    float64        `json:"cpu_s_per_gb,omitempty"`
	Doorbells   *float64       `json:"doorbells_per_message,omitempty"`
	Allocations *float64       `json:"allocations_per_message,omitempty"` // of the leading process
	Rung        map[int]uint64 `json:"interrupts,omitempty"`
	Machine     string         `json:"machine,omitempty"`

	// Histogram is hist, between processes only.
	Histogram []byte `json:"histogram,omitempty"`
	hist      *hdrhistogram.Histogram
}

// rtt is a distribution of round trips in nanoseconds.
type rtt struct {
	Min  int64   `json:"min"`
	Mean float64 `json:"mean"`
	P50  int64   `json:"p50"`
	P90  int64   `json:"p90"`
	P99  int64   `json:"p99"`
	P999 int64   `json:"p999"`
	Max  int64   `json:"max"`
}

func distribution(h *hdrhistogram.Histogram) *rtt {
	if h == nil || h.TotalCount() == 0 {
		return nil
	}
	return &rtt{h.Min(), h.Mean(), h.ValueAtQuantile(50), h.ValueAtQuantile(90), h.ValueAtQuantile(99), h.ValueAtQuantile(99.9), h.Max()}
}

func sectionRecord(res *pingpong.Result, rate float64) *record {
	r := &record{
		Over: string(pingpong.Section), Mode: res.Mode.String(), Measure: pingpong.Latency, Role: res.Role, Size: 8,
		Messages: res.Messages, Errors: res.Errors, Seconds: res.Elapsed.Seconds(), Wanted: rate,
		RTT: distribution(res.RTT), Rung: res.Rung, hist: res.RTT,
	}
	if res.Elapsed > 0 {
		r.PerSecond = float64(res.Messages) / r.Seconds
	}
	return r
}

func taskRecord(res *pingpong.Outcome, over, mode string) *record {
	r := &record{
		Over: over, Mode: mode, Measure: res.Measure, Size: res.Size,
		Seconds: res.Elapsed.Seconds(), Wanted: res.Rate, RTT: distribution(res.RTT), CPU: &res.CPU, hist: res.RTT,
	}
	if res.Measure == pingpong.Idle || res.Messages == 0 {
		return r
	}
	messages := float64(res.Messages)
	bytes := messages * float64(res.Size)
	doorbells, allocations := float64(res.Doorbells)/messages, float64(res.Allocations)/messages
	r.Messages, r.PerSecond, r.BytesPerS, r.CPUPerGB = res.Messages, messages/r.Seconds, bytes/r.Seconds, res.CPU/(bytes/1e9)
	r.Doorbells, r.Allocations = &doorbells, &allocations
	return r
}

// encodeRecord writes a record for the process that decodes it.
func encodeRecord(w io.Writer, r *record) error {
	if r.hist != nil {
		var err error
		if r.Histogram, err = r.hist.Encode(hdrhistogram.V2CompressedEncodingCookieBase); err != nil {
			return err
		}
	}
	return json.NewEncoder(w).Encode(r)
}

func decodeRecord(text []byte) (*record, error) {
	r := &record{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%w: %q", err, text)
	}
	if r.Histogram != nil {
		var err error
		if r.hist, err = hdrhistogram.Decode(r.Histogram); err != nil {
			return nil, err
		}
		r.Histogram = nil
	}
	return r, nil
}

// machine describes the machine in a few words.
func machine() string {
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for l := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var u unix.Utsname
	release := ""
	if err := unix.Uname(&u); err == nil {
		release = " " + unix.ByteSliceToString(u.Release[:])
	}
	return fmt.Sprintf("%s, %d CPUs, Linux%s, %s", model, onlineCPUs(), release, runtime.Version())
}

// onlineCPUs is the number of CPUs of the machine, not of this process.
func onlineCPUs() int {
	dirs, err := os.ReadDir("/sys/devices/system/cpu")
	n := 0
	for _, d := range dirs {
		var i int
		if c, _ := fmt.Sscanf(d.Name(), "cpu%d", &i); c == 1 && d.Name() == fmt.Sprintf("cpu%d", i) {
			n++
		}
	}
	if err != nil || n == 0 {
		return runtime.NumCPU()
	}
	return n
}
