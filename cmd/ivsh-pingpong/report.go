package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/compare"
	"github.com/ivshmem-go/ivshmem/internal/pingpong"
)

// report prints records: a table, an object or a line of CSV for each.
type report struct {
	out       io.Writer
	json, csv bool
	hdr       string // name of a file, or none

	measure pingpong.Measure
	rate    float64
	compare bool
	rounds  int
	text    string
	header  bool
	file    *hdrFile
	lines   *csv.Writer
	rows    []*row // of the table, if it comes at the end
}

// row is all rounds of a measurement.
type row struct{ rounds []*record }

func (r *report) open(s *settings) error {
	r.measure, r.rate, r.compare, r.rounds = s.task.Measure, s.task.Rate, s.compare, s.rounds
	r.lines = csv.NewWriter(r.out)
	if r.hdr == "" {
		return nil
	}
	n := len(s.jobs())
	if s.compare {
		n += len(s.contestants(s.jobs()))
	}
	if strings.HasSuffix(r.hdr, percentiles) && n*s.rounds > 1 {
		return usageError{errOneHistogram}
	}
	var err error
	r.file, err = createHDR(r.hdr, machine())
	return err
}

// title is printed in front of the table.
func (r *report) title(s string) { r.text = s }

// add prints a record, or keeps it for the table. The round counts from 0; no
// record is fine.
func (r *report) add(rec *record, round int) error {
	if rec == nil {
		return nil
	}
	rec.Round, rec.Machine = round+1, machine()
	if r.file != nil {
		if err := r.file.add(rec); err != nil {
			return err
		}
	}
	switch {
	case r.json:
		return json.NewEncoder(r.out).Encode(rec)
	case r.csv:
		return r.line(rec)
	case r.rounds > 1 || r.compare:
		for _, w := range r.rows {
			if f := w.rounds[0]; f.Over == rec.Over && f.Mode == rec.Mode && f.Size == rec.Size {
				w.rounds = append(w.rounds, rec)
				return nil
			}
		}
		r.rows = append(r.rows, &row{[]*record{rec}})
		return nil
	}
	return r.row(&row{[]*record{rec}})
}

// close prints the table that had to wait for all rounds.
func (r *report) close() error {
	slices.SortStableFunc(r.rows, func(a, b *row) int { return a.rounds[0].Size - b.rounds[0].Size })
	for i, w := range r.rows {
		if i > 0 && w.rounds[0].Size != r.rows[i-1].rounds[0].Size {
			fmt.Fprintln(r.out)
		}
		if err := r.row(w); err != nil {
			return err
		}
	}
	if r.file != nil {
		return r.file.close()
	}
	return nil
}

var csvHeader = []string{"over", "mode", "measure", "size", "round", "messages", "errors", "elapsed_s",
	"min_ns", "mean_ns", "p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns",
	"rate_per_second", "messages_per_second", "bytes_per_s", "cpu_s", "doorbells_per_message"}

func (r *report) line(rec *record) error {
	if !r.header {
		r.header = true
		r.lines.Write(csvHeader)
	}
	number := func(f float64) string {
		if f == 0 {
			return ""
		}
		return strconv.FormatFloat(f, 'g', 10, 64)
	}
	optional := func(f *float64) string {
		if f == nil {
			return ""
		}
		return strconv.FormatFloat(*f, 'g', 10, 64)
	}
	fields := []string{rec.Over, rec.Mode, string(rec.Measure), strconv.Itoa(rec.Size), strconv.Itoa(rec.Round),
		strconv.FormatUint(rec.Messages, 10), strconv.FormatUint(rec.Errors, 10), number(rec.Seconds)}
	if d := rec.RTT; d != nil {
		for _, v := range []float64{float64(d.Min), d.Mean, float64(d.P50), float64(d.P90), float64(d.P99), float64(d.P999), float64(d.Max)} {
			fields = append(fields, number(v))
		}
	} else {
		fields = append(fields, make([]string, 7)...)
	}
	fields = append(fields, number(rec.Wanted), number(rec.PerSecond), number(rec.BytesPerS), optional(rec.CPU), optional(rec.Doorbells))
	r.lines.Write(fields)
	r.lines.Flush()
	return r.lines.Error()
}

// of is a figure of all rounds.
func (w *row) of(figure func(*record) float64) (all []float64) {
	for _, rec := range w.rounds {
		all = append(all, figure(rec))
	}
	return all
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// A floor is the contestant that a row is compared with: what the machine can
// do for one who waits like that.
func floor(w *row, measure pingpong.Measure) string {
	mode := w.rounds[0].Mode
	looks := mode == compare.Poll || mode == "adaptive" || measure != pingpong.Latency
	switch {
	case looks && measure == pingpong.Latency && w.rounds[0].Size == 8:
		return "line"
	case looks:
		return "memory"
	}
	return "eventfd"
}

// ratios is the figure of each round over the floor's of the same round.
func (r *report) ratios(w *row, figure func(*record) float64) (all []float64) {
	name := floor(w, r.measure)
	for _, f := range r.rows {
		if f.rounds[0].Over != name || f.rounds[0].Size != w.rounds[0].Size {
			continue
		}
		for i, rec := range w.rounds {
			if i < len(f.rounds) && figure(f.rounds[i]) > 0 {
				all = append(all, figure(rec)/figure(f.rounds[i]))
			}
		}
	}
	return all
}

func (r *report) heading() string {
	text := map[pingpong.Measure]string{
		pingpong.Latency:    "round trips",
		pingpong.Throughput: "one way, a call for each message",
		pingpong.Rate:       "one way, 64 messages at a time (a call for each where there is no call for many)",
		pingpong.Idle:       "idle connections",
	}[r.measure]
	if r.rate > 0 {
		text += fmt.Sprintf(", %g a second, from when each should have been sent", r.rate)
	}
	if r.rounds > 1 {
		text += fmt.Sprintf("; medians of %d rounds, SPREAD is the lowest and the highest", r.rounds)
	}
	if r.compare {
		text += "\nRATIO is to what the machine can do: "
		if r.measure == pingpong.Latency {
			text += "line or memory for those who look, eventfd for those who sleep"
		} else {
			text += "memory"
		}
	}
	return text
}

// row prints a line of the table.
func (r *report) row(w *row) error {
	rec := w.rounds[0]
	if r.measure == pingpong.Idle {
		return r.idle(w)
	}
	if rec.Errors > 0 {
		_, err := fmt.Fprintf(r.out, "%-10s %-9s %8d: message %d was lost or wrong\n", rec.Over, rec.Mode, rec.Size, rec.Messages+1)
		return err
	}
	if !r.header {
		r.header = true
		fmt.Fprintf(r.out, "%s\n%s\n\n%-10s %-9s %8s %10s", r.text, r.heading(), "OVER", "MODE", "SIZE", "MESSAGES")
		if r.measure == pingpong.Latency {
			fmt.Fprintf(r.out, " %9s %9s %9s %9s %9s %9s", "MIN", "P50", "P90", "P99", "P99.9", "MAX")
		}
		fmt.Fprintf(r.out, " %11s", "MESSAGES/S")
		if r.measure != pingpong.Latency {
			fmt.Fprintf(r.out, " %8s %9s %9s", "GB/S", "CPU s/GB", "DOORBELLS")
		}
		if r.rounds > 1 {
			fmt.Fprintf(r.out, "  %-19s", "SPREAD")
		}
		if r.compare {
			fmt.Fprintf(r.out, "  %s", "RATIO")
		}
		fmt.Fprintln(r.out)
	}
	var messages uint64
	for _, rec := range w.rounds {
		messages += rec.Messages
	}
	fmt.Fprintf(r.out, "%-10s %-9s %8d %10d", rec.Over, rec.Mode, rec.Size, messages)
	figure := func(rec *record) float64 { return rec.BytesPerS }
	show := func(v float64) string { return fmt.Sprintf("%.3f", v/1e9) }
	if r.measure == pingpong.Latency {
		if rec.RTT == nil {
			_, err := fmt.Fprintln(r.out, "   (no round trip was counted)")
			return err
		}
		for _, f := range []func(*rtt) int64{
			func(d *rtt) int64 { return d.Min }, func(d *rtt) int64 { return d.P50 }, func(d *rtt) int64 { return d.P90 },
			func(d *rtt) int64 { return d.P99 }, func(d *rtt) int64 { return d.P999 }, func(d *rtt) int64 { return d.Max },
		} {
			fmt.Fprintf(r.out, " %9s", short(median(w.of(func(rec *record) float64 { return float64(f(rec.RTT)) }))))
		}
		figure = func(rec *record) float64 { return float64(rec.RTT.P50) }
		show = short
	}
	fmt.Fprintf(r.out, " %11.0f", median(w.of(func(rec *record) float64 { return rec.PerSecond })))
	if r.measure != pingpong.Latency {
		doorbells := "-"
		if rec.Doorbells != nil && slices.Contains([]string{string(pingpong.Messages), string(pingpong.Conn)}, rec.Over) {
			doorbells = fmt.Sprintf("%.4f", median(w.of(func(rec *record) float64 { return *rec.Doorbells })))
		}
		fmt.Fprintf(r.out, " %8s %9.3f %9s", show(median(w.of(figure))), median(w.of(func(rec *record) float64 { return rec.CPUPerGB })), doorbells)
	}
	if r.rounds > 1 {
		all := w.of(figure)
		fmt.Fprintf(r.out, "  %-19s", show(slices.Min(all))+" - "+show(slices.Max(all)))
	}
	if r.compare {
		if all := r.ratios(w, figure); len(all) > 0 {
			fmt.Fprintf(r.out, "  %s", times(median(all)))
			if len(all) > 1 {
				fmt.Fprintf(r.out, " (%s - %s)", times(slices.Min(all)), times(slices.Max(all)))
			}
		}
	}
	_, err := fmt.Fprintln(r.out)
	return err
}

func (r *report) idle(w *row) error {
	rec := w.rounds[0]
	if !r.header {
		r.header = true
		fmt.Fprintln(r.out, r.text)
	}
	cpu := median(w.of(func(rec *record) float64 { return *rec.CPU }))
	elapsed := time.Duration(rec.Seconds * 1e9).Round(time.Millisecond)
	_, err := fmt.Fprintf(r.out, "%-10s %-9s idle for %v: %.2f ms of CPU time, %.3f %%\n", rec.Over, rec.Mode, elapsed, cpu*1e3, cpu/rec.Seconds*100)
	return err
}

// times prints a ratio with three significant digits.
func times(r float64) string {
	switch {
	case r < 10:
		return fmt.Sprintf("%.2f", r)
	case r < 100:
		return fmt.Sprintf("%.1f", r)
	}
	return fmt.Sprintf("%.0f", r)
}

// short prints a time in nanoseconds with three significant digits.
func short(ns float64) string {
	switch {
	case ns < 1e3:
		return fmt.Sprintf("%.0fns", ns)
	case ns < 1e4:
		return fmt.Sprintf("%.2fus", ns/1e3)
	case ns < 1e6:
		return fmt.Sprintf("%.1fus", ns/1e3)
	case ns < 1e9:
		return fmt.Sprintf("%.2fms", ns/1e6)
	}
	return fmt.Sprintf("%.2fs", ns/1e9)
}

// progress says on a terminal what is being measured.
type progress struct{ out io.Writer }

func newProgress(w io.Writer) progress {
	if f, ok := w.(interface{ Fd() uintptr }); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			return progress{w}
		}
	}
	return progress{io.Discard}
}

func (p progress) show(s string) { fmt.Fprintf(p.out, "\r\033[K%s", s) }

func (p progress) done() { fmt.Fprint(p.out, "\r\033[K") }
