package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/ivshmem-go/ivshmem/internal/pingpong"
)

// embeddedPeer is set for the processes that the embedded run starts, to the
// lower of their peer IDs: their outputs are one, so only the leading one
// measures and prints.
const embeddedPeer = "IVSH_PINGPONG_EMBEDDED"

// report prints results as they come: a table, or an object per line.
type report struct {
	out    io.Writer
	json   bool
	quiet  bool
	header bool
	text   string
}

func newReport(out io.Writer, json bool) *report {
	return &report{out: out, json: json, quiet: os.Getenv(embeddedPeer) != ""}
}

// title is printed in front of the table.
func (r *report) title(s string) { r.text = s }

// rtt is a distribution of round trips in nanoseconds.
type rtt struct {
	Min  int64 `json:"min"`
	P50  int64 `json:"p50"`
	P90  int64 `json:"p90"`
	P99  int64 `json:"p99"`
	P999 int64 `json:"p999"`
	Max  int64 `json:"max"`
}

func distribution(h *hdrhistogram.Histogram) *rtt {
	if h == nil || h.TotalCount() == 0 {
		return nil
	}
	return &rtt{h.Min(), h.ValueAtQuantile(50), h.ValueAtQuantile(90), h.ValueAtQuantile(99), h.ValueAtQuantile(99.9), h.Max()}
}

// addStream prints a result over streams.
func (r *report) addStream(mode string, res *pingpong.StreamResult) error {
	seconds := res.Elapsed.Seconds()
	messages := float64(res.Messages)
	bytes := messages * float64(res.Size)
	out := struct {
		Over        pingpong.Over    `json:"over"`
		Mode        string           `json:"mode"`
		Measure     pingpong.Measure `json:"measure"`
		Size        int              `json:"size"`
		Messages    uint64           `json:"messages"`
		Seconds     float64          `json:"elapsed_s"`
		RTT         *rtt             `json:"rtt_ns,omitempty"`
		PerSecond   float64          `json:"messages_per_second,omitempty"`
		BytesPerS   float64          `json:"bytes_per_s,omitempty"`
		CPU         float64          `json:"cpu_s"`
		CPUPerGB    float64          `json:"cpu_s_per_gb,omitempty"`
		Doorbells   float64          `json:"doorbells_per_message"`
		Allocations float64          `json:"allocations_per_message"`
	}{
		res.Over, mode, res.Measure, res.Size, res.Messages, seconds, distribution(res.RTT), messages / seconds, bytes / seconds,
		res.CPU, res.CPU / (bytes / 1e9), float64(res.Doorbells) / messages, float64(res.Allocations) / messages,
	}
	if res.Measure == pingpong.Idle {
		out.Messages, out.PerSecond, out.BytesPerS, out.CPUPerGB, out.Doorbells, out.Allocations = 0, 0, 0, 0, 0, 0
	}
	if r.json {
		return json.NewEncoder(r.out).Encode(out)
	}
	if !r.header {
		r.header = true
		fmt.Fprintf(r.out, "%s\n%-10s %-9s %8s %9s %9s %9s %9s %11s %8s %9s %9s\n", r.text,
			"OVER", "MODE", "SIZE", "MESSAGES", "P50", "P99", "P99.9", "MESSAGES/S", "GB/S", "CPU s/GB", "DOORBELLS")
	}
	p := [3]string{"-", "-", "-"}
	if out.RTT != nil {
		p = [3]string{short(out.RTT.P50), short(out.RTT.P99), short(out.RTT.P999)}
	}
	if res.Measure == pingpong.Idle {
		_, err := fmt.Fprintf(r.out, "%-10s %-9s idle for %v: %.2f ms of CPU time, %.3f %%\n", res.Over, mode, res.Elapsed.Round(time.Millisecond), res.CPU*1e3, res.CPU/seconds*100)
		return err
	}
	_, err := fmt.Fprintf(r.out, "%-10s %-9s %8d %9d %9s %9s %9s %11.0f %8.3f %9.3f %9.4f\n", res.Over, mode, res.Size, res.Messages,
		p[0], p[1], p[2], out.PerSecond, out.BytesPerS/1e9, out.CPUPerGB, out.Doorbells)
	return err
}

func (r *report) add(res *pingpong.Result) error {
	if res.RTT == nil && r.quiet {
		return nil
	}
	d := distribution(res.RTT)
	perSecond := 0.0
	if res.Elapsed > 0 {
		perSecond = float64(res.Messages) / res.Elapsed.Seconds()
	}
	if r.json {
		return json.NewEncoder(r.out).Encode(struct {
			Mode      string         `json:"mode"`
			Role      string         `json:"role"`
			Messages  uint64         `json:"messages"`
			Errors    uint64         `json:"errors"`
			RTT       *rtt           `json:"rtt_ns,omitempty"`
			PerSecond float64        `json:"messages_per_second,omitempty"`
			Rung      map[int]uint64 `json:"interrupts,omitempty"`
		}{res.Mode.String(), res.Role, res.Messages, res.Errors, d, perSecond, res.Rung})
	}
	if !r.header {
		r.header = true
		fmt.Fprintf(r.out, "%s\n%-10s %9s %7s %9s %9s %9s %9s %9s %9s %11s\n", r.text,
			"MODE", "MESSAGES", "ERRORS", "MIN", "P50", "P90", "P99", "P99.9", "MAX", "MESSAGES/S")
	}
	fmt.Fprintf(r.out, "%-10s %9d %7d", res.Mode, res.Messages, res.Errors)
	if d == nil {
		_, err := fmt.Fprintln(r.out, "   (no round trip was counted)")
		return err
	}
	for _, v := range []int64{d.Min, d.P50, d.P90, d.P99, d.P999, d.Max} {
		fmt.Fprintf(r.out, " %9s", short(v))
	}
	_, err := fmt.Fprintf(r.out, " %11.0f\n", perSecond)
	return err
}

// short prints a time with three significant digits.
func short(ns int64) string {
	d := time.Duration(ns)
	switch {
	case d < time.Microsecond:
		return fmt.Sprintf("%dns", ns)
	case d < 10*time.Microsecond:
		return fmt.Sprintf("%.2fus", float64(ns)/1e3)
	case d < time.Millisecond:
		return fmt.Sprintf("%.1fus", float64(ns)/1e3)
	case d < time.Second:
		return fmt.Sprintf("%.2fms", float64(ns)/1e6)
	}
	return fmt.Sprintf("%.2fs", d.Seconds())
}
