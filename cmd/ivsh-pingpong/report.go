package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/pingpong"
)

// embeddedPeer is set for the processes that the embedded run starts: their
// outputs are one, so only the leading one measures and prints.
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

func (r *report) add(res *pingpong.Result) error {
	if res.RTT == nil && r.quiet {
		return nil
	}
	var d *rtt
	if h := res.RTT; h != nil && res.Messages > 0 {
		d = &rtt{h.Min(), h.ValueAtQuantile(50), h.ValueAtQuantile(90), h.ValueAtQuantile(99), h.ValueAtQuantile(99.9), h.Max()}
	}
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
