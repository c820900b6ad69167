package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// figures is what the floors and ivsh-pingpong print.
type figures struct {
	RTT *struct {
		P50 float64 `json:"p50"`
	} `json:"rtt_ns"`
	MeanNS      float64 `json:"mean_ns"`
	PerSecond   float64 `json:"messages_per_second"`
	BytesPerS   float64 `json:"bytes_per_s"`
	CPU         float64 `json:"cpu_s"`
	Seconds     float64 `json:"elapsed_s"`
	CPUPerGB    float64 `json:"cpu_s_per_gb"`
	Doorbells   float64 `json:"doorbells_per_message"`
	Allocations float64 `json:"allocations_per_message"`
}

func (f figures) rtt() float64 {
	if f.RTT == nil {
		return math.NaN()
	}
	return f.RTT.P50
}

// rate is messages per second, which the floors give as their mean time.
func (f figures) rate() float64 {
	if f.PerSecond > 0 {
		return f.PerSecond
	}
	return 1e9 / f.MeanNS
}

func (f figures) throughput() float64 { return f.BytesPerS }

func (f figures) cpuPerGB() float64 { return f.CPUPerGB }

// contestant is one program of a round.
type contestant struct {
	name string
	argv []string
}

// bar is a ratio, or a figure, and what it has to be.
type bar struct {
	what      string
	value     func(f figures) float64
	own       string
	against   []string // the best of them; none: the figure itself
	lowest    bool     // the best is the lowest
	unit      string
	want      float64
	atLeast   bool
	noiseless bool // holds however busy the machine is
}

// bench compares streams with what the machine can do and with what people use
// instead: two processes on two CPUs, everything in turn, so that what the
// machine does meanwhile hits all.
func bench(ctx context.Context, r *Report) error {
	floor, ours, done, err := buildBench(ctx)
	if err != nil {
		return err
	}
	defer done()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	contestants := benchContestants(r, floor, ours, self)
	rounds := 0
	for begin := time.Now(); rounds < 2 || !r.Quick && (rounds < 7 || time.Since(begin) < r.Duration); rounds++ {
		round := map[string]figures{}
		for _, c := range contestants {
			var f figures
			if err := runJSON(ctx, 2*patience, &f, c.argv[0], c.argv[1:]...); err != nil {
				return err
			}
			round[c.name] = f
		}
		for _, b := range benchBars {
			v, figure := b.of(round)
			r.sample(b.what, v)
			r.sample(b.what+", own figure", figure)
		}
	}
	idle := 60 * time.Second
	if r.Quick {
		idle = 3 * time.Second
	}
	var f figures
	if err := runJSON(ctx, idle+patience, &f, ours, "--json", "--cpus", "0,1", "--mode", "adaptive", "--measure", "idle", "--duration", idle.String()); err != nil {
		return err
	}
	r.Config["rounds"], r.Config["cpus"], r.Config["idle_s"] = rounds, runtime.NumCPU(), idle.Seconds()
	r.Config["machine"] = cpuModel()
	r.judge()
	percent := f.CPU / f.Seconds * 100
	r.count("adaptive, idle: percent of a CPU, both sides", percent, "<= 0.1", percent <= 0.1 || r.Quick)
	return nil
}

func benchContestants(r *Report, floor, ours, self string) []contestant {
	few, many, messages, blocks := "2000", "100000", "2000000", "20000"
	if r.Quick {
		few, many, messages, blocks = "300", "5000", "200000", "1000"
	}
	floors := func(name, count string) contestant {
		return contestant{"floor " + name, []string{floor, name, count, "500", "0", "1"}}
	}
	own := func(name, options string) contestant {
		args := append([]string{ours, "--json", "--cpus", "0,1"}, strings.Fields(options)...)
		if r.Sabotage {
			args = append(args, "--size", "4") // less than a message can be
		}
		return contestant{name, args}
	}
	// What is compared with each other runs one right after the other: where the
	// host puts two virtual CPUs changes by the second, and with it all times.
	return []contestant{
		floors("poll", many),
		own("section poll", "--over section --mode poll --batch 16 --count "+many),
		own("messages poll", "--over messages --mode poll --batch 16 --count "+many),
		floors("poll64", many),
		own("conn poll", "--over conn --mode poll --batch 16 --count "+many),
		own("messages adaptive", "--over messages --mode adaptive --batch 16 --count "+many),
		own("messages 64 peers", "--over messages --mode poll --batch 16 --peers 62 --count "+many),
		own("messages 1 conn", "--over messages --mode poll --batch 16 --conns 1 --count "+many),
		own("messages 1000 conns", "--over messages --mode poll --batch 16 --conns 1000 --count "+many),
		floors("eventfd", few),
		own("section thread", "--over section --mode interrupt --count "+few),
		own("section poller", "--over section --mode interrupt --sleep poller --count "+few),
		{"floor poller", []string{self, floorPoller, few}},
		floors("memcpy", blocks),
		own("conn throughput", "--over conn --mode adaptive --measure throughput --size 64K --warmup 500 --count "+blocks),
		floors("stream", blocks), floors("pipe", blocks), floors("tcp", blocks),
		floors("seqpacket", many),
		own("messages rate", "--over messages --mode adaptive --measure rate --count "+messages),
		own("asleep 1 conn", "--over messages --mode interrupt --conns 1 --count "+few),
		own("asleep 1000 conns", "--over messages --mode interrupt --conns 1000 --count "+few),
	}
}

var benchBars = []bar{
	{what: "polled round trip, 8 bytes, section / cache line", value: figures.rtt, own: "section poll", against: []string{"floor poll"}, unit: "ns", want: 1.10},
	{what: "polled round trip, 64 bytes, messages / cache lines", value: figures.rtt, own: "messages poll", against: []string{"floor poll64"}, unit: "ns", want: 1.5},
	{what: "polled round trip, 64 bytes, net.Conn / cache lines", value: figures.rtt, own: "conn poll", against: []string{"floor poll64"}, unit: "ns", want: 3},
	{what: "sleeping round trip, dedicated thread / eventfds", value: figures.rtt, own: "section thread", against: []string{"floor eventfd"}, unit: "ns", want: 1.1},
	{what: "sleeping round trip, Go's poller / eventfds through it", value: figures.rtt, own: "section poller", against: []string{"floor poller"}, unit: "ns", want: 1.1},
	{what: "adaptive round trip, peer busy / polled", value: figures.rtt, own: "messages adaptive", against: []string{"messages poll"}, unit: "ns", want: 1.2},
	{what: "throughput, 64 KiB writes, net.Conn / Unix stream", value: figures.throughput, own: "conn throughput", against: []string{"floor stream"}, unit: "B/s", want: 3, atLeast: true},
	{what: "throughput, 64 KiB writes, net.Conn / memcpy twice", value: figures.throughput, own: "conn throughput", against: []string{"floor memcpy"}, unit: "B/s", want: 0.6, atLeast: true},
	{what: "message rate, 64 bytes, 64 at a time / Unix seqpacket", value: figures.rate, own: "messages rate", against: []string{"floor seqpacket"}, unit: "/s", want: 20, atLeast: true},
	{what: "CPU seconds per GB, adaptive / best of pipe, Unix stream, TCP", value: figures.cpuPerGB, own: "conn throughput", against: []string{"floor pipe", "floor stream", "floor tcp"}, lowest: true, unit: "s/GB", want: 1},
	{what: "round trip, 64 peers / 2", value: figures.rtt, own: "messages 64 peers", against: []string{"messages poll"}, unit: "ns", want: 1.1},
	{what: "round trip, 1000 idle connections / 1", value: figures.rtt, own: "messages 1000 conns", against: []string{"messages 1 conn"}, unit: "ns", want: 1.1},
	{what: "sleeping round trip, 1000 idle connections / 1", value: figures.rtt, own: "asleep 1000 conns", against: []string{"asleep 1 conn"}, unit: "ns", want: 1.1},
	{what: "doorbells per message, both busy", value: func(f figures) float64 { return f.Doorbells }, own: "messages rate", want: 0.05},
	{what: "doorbells per round trip, both busy", value: func(f figures) float64 { return f.Doorbells / 2 }, own: "messages adaptive", want: 0.05},
	{what: "allocations per message", value: func(f figures) float64 { return f.Allocations }, own: "messages rate", want: 0.001, noiseless: true},
	{what: "allocations per round trip", value: func(f figures) float64 { return f.Allocations }, own: "conn poll", want: 0.05, noiseless: true},
}

// of is the ratio of a round, and the figure above the line.
func (b bar) of(round map[string]figures) (ratio, figure float64) {
	figure = b.value(round[b.own])
	if len(b.against) == 0 {
		return figure, figure
	}
	best := math.NaN()
	for _, name := range b.against {
		v := b.value(round[name])
		if math.IsNaN(best) || v < best == b.lowest {
			best = v
		}
	}
	return figure / best, figure
}

// judge prints the table. In a few seconds, and beside whatever else the
// machine does, ratios say little: a quick run shows them, and fails only for
// what does not depend on that.
func (r *Report) judge() {
	t := Table{Title: fmt.Sprintf("Two processes on two CPUs (%s), %v rounds, everything in turn", r.Config["machine"], r.Config["rounds"]),
		Head: []string{"what", "median", "lowest", "highest", "own figure, median", "bar", ""}}
	for _, b := range benchBars {
		v := r.Samples[b.what]
		m := median(v)
		sign := "<="
		if b.atLeast {
			sign = ">="
		}
		holds := m <= b.want
		if b.atLeast {
			holds = m >= b.want
		}
		mark := "holds"
		if !holds {
			mark = "does not hold"
		}
		if math.IsNaN(m) || !holds && (!r.Quick || b.noiseless) {
			r.Failures = append(r.Failures, fmt.Sprintf("%s: median %.3g, expected %s %g", b.what, m, sign, b.want))
		}
		own := fmt.Sprintf("%.4g %s", median(r.Samples[b.what+", own figure"]), b.unit)
		t.Rows = append(t.Rows, []string{b.what, fmt.Sprintf("%.3g", m), fmt.Sprintf("%.3g", slices.Min(v)), fmt.Sprintf("%.3g", slices.Max(v)), own, fmt.Sprintf("%s %g", sign, b.want), mark})
	}
	r.Tables = append(r.Tables, t)
}

func cpuModel() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(text)) {
			if name, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				return strings.TrimSpace(v)
			}
		}
	}
	return "unknown CPU"
}
