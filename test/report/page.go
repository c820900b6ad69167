package main

import (
	_ "embed"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/template"
)

//go:embed page.md
var text string

// write writes the page. The template asks for tables and figures by name.
func (p *page) write(w io.Writer) error {
	t, err := template.New("page").Funcs(template.FuncMap{
		"machine":    func() string { return p.latency[0].rounds[0].Machine },
		"rounds":     func() string { return plural(len(p.latency[0].rounds), "round") },
		"rate":       func() string { return fmt.Sprintf("%g", p.open[0].rounds[0].Wanted) },
		"polled":     p.polledTable,
		"sleeping":   p.sleepingTable,
		"throughput": p.throughputTable,
		"batched":    p.batchedTable,
		"open":       p.openTable,
		"hops":       p.hopsTable,
		"idle":       p.idleTime,
		"disturbed":  p.disturbed,
	}).Parse(text)
	if err != nil {
		return err
	}
	return t.Execute(w, nil)
}

// notes are what the names of the contestants stand for.
var notes = map[string]string{
	"section": "a word in a section", "messages": "`stream`, messages", "conn": "`stream`, net.Conn",
	"line": "*a word in a cache line*", "memory": "*copy through shared memory*",
	"eventfd": "*shared memory, eventfd*", "futex": "*shared memory, futex*", "eventfd-go": "*shared memory, eventfd in Go's poller*",
	"pipe": "*pipe*", "unix": "*Unix stream socket*", "unix-go": "*net.UnixConn*", "seqpacket": "*Unix seqpacket socket*",
	"tcp": "*TCP, loopback*", "tcp-go": "*net.TCPConn, loopback*",
}

type table struct{ strings.Builder }

func (t *table) row(cells ...string) { fmt.Fprintf(t, "| %s |\n", strings.Join(cells, " | ")) }

func (t *table) head(cells ...string) {
	t.row(cells...)
	t.row(slices.Repeat([]string{"---"}, len(cells))...)
}

// within is a median with its spread.
func within(all []float64, show func(float64) string) string {
	if len(all) == 0 {
		return "–"
	}
	return fmt.Sprintf("%s (%s – %s)", show(median(all)), show(slices.Min(all)), show(slices.Max(all)))
}

func p50(r record) float64 { return r.RTT.P50 }

// latencyTable compares round trips with a floor of the same size.
func (p *page) latencyTable(r run, floors map[int]string, floorMode string, modes ...string) (string, error) {
	var t table
	t.head("bytes", "over", "mode", "P50", "P50 / floor's", "of the best rounds", "P99 / floor's")
	for size, name := range sorted(floors) {
		floor := r.find(name, floorMode, size)
		for _, s := range r {
			if s.Size != size || !slices.Contains(modes, s.Mode) {
				continue
			}
			ratio := s.over(floor, p50)
			if len(ratio) == 0 {
				return "", fmt.Errorf("latencies: nothing over %s, mode %s, %d bytes", name, floorMode, size)
			}
			t.row(fmt.Sprint(size), notes[s.Over], s.Mode, within(s.of(p50), duration),
				"**"+digits(median(ratio))+"** "+spreadOf(ratio), digits(slices.Min(s.of(p50))/slices.Min(floor.of(p50))),
				within(s.over(floor, func(r record) float64 { return r.RTT.P99 }), digits))
		}
	}
	return t.String(), nil
}

func spreadOf(all []float64) string {
	return fmt.Sprintf("(%s – %s)", digits(slices.Min(all)), digits(slices.Max(all)))
}

func sorted(m map[int]string) func(func(int, string) bool) {
	return func(yield func(int, string) bool) {
		var keys []int
		for k := range m {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

func (p *page) polledTable() (string, error) {
	return p.latencyTable(p.latency, map[int]string{8: "line", picturedSize: "memory"}, "poll", "poll", "adaptive")
}

func (p *page) sleepingTable() (string, error) {
	return p.latencyTable(p.latency, map[int]string{8: "eventfd", picturedSize: "eventfd"}, "thread", "interrupt", "thread", "poller")
}

func (p *page) throughputTable() string {
	var sizes []int
	for _, s := range p.throughput {
		if !slices.Contains(sizes, s.Size) {
			sizes = append(sizes, s.Size)
		}
	}
	slices.Sort(sizes)
	head := []string{"over", "mode"}
	for _, size := range sizes {
		head = append(head, bytesOf(size))
	}
	var t table
	t.head(head...)
	var seen []string
	for _, s := range p.throughput {
		if key := s.Over + s.Mode; !slices.Contains(seen, key) {
			seen = append(seen, key)
			cells := []string{notes[s.Over], s.Mode}
			for _, size := range sizes {
				c := p.throughput.find(s.Over, s.Mode, size)
				if c == nil {
					cells = append(cells, "–")
					continue
				}
				cell := digits(median(c.of(gigabytes)))
				if ratio := c.over(p.throughput.find("memory", "poll", size), gigabytes); len(ratio) > 0 {
					cell += fmt.Sprintf(" · **%s** %s", digits(median(ratio)), spreadOf(ratio))
				}
				cells = append(cells, cell)
			}
			t.row(cells...)
		}
	}
	return t.String()
}

func (p *page) batchedTable() string {
	var t table
	t.head("over", "mode", "million messages / s", "ratio to the memory")
	for _, s := range p.rate {
		t.row(notes[s.Over], s.Mode, within(s.of(func(r record) float64 { return r.PerSecond / 1e6 }), digits),
			within(s.over(p.rate.find("memory", "poll", s.Size), func(r record) float64 { return r.PerSecond }), digits))
	}
	return t.String()
}

func (p *page) openTable() string {
	var t table
	t.head("over", "mode", "achieved / s", "P50", "P99", "P99.9")
	for _, s := range p.open {
		t.row(notes[s.Over], s.Mode, fmt.Sprintf("%.0f", median(s.of(func(r record) float64 { return r.PerSecond }))),
			within(s.of(p50), duration), within(s.of(func(r record) float64 { return r.RTT.P99 }), duration),
			within(s.of(func(r record) float64 { return r.RTT.P999 }), duration))
	}
	return t.String()
}

// hopsTable is the CPU time of one round trip, of both processes together, by hop.
func (p *page) hopsTable() (string, error) {
	poll, sleep := p.profiles["poll"], p.profiles["interrupt"]
	if poll == nil || sleep == nil {
		return "", fmt.Errorf("profiles: expected those of modes poll and interrupt")
	}
	var t table
	t.head("hop", "poll, a round trip", "share", "interrupt, a round trip", "share")
	cells := func(s *shares, mode, what string) []string {
		n := p.trips(mode)
		if s.seconds[what] == 0 {
			return []string{"–", "–"}
		}
		return []string{duration(s.seconds[what] / n * 1e9), fmt.Sprintf("%.0f %%", 100*s.seconds[what]/s.total)}
	}
	for _, name := range names(poll, sleep) {
		t.row(slices.Concat([]string{name}, cells(poll, "poll", name), cells(sleep, "interrupt", name))...)
	}
	t.row("**CPU time of both processes**", duration(poll.total/p.trips("poll")*1e9), "", duration(sleep.total/p.trips("interrupt")*1e9), "")
	return t.String(), nil
}

func (p *page) trips(mode string) float64 {
	for _, s := range p.profiled {
		if s.Mode == mode {
			return s.rounds[0].Messages
		}
	}
	return 0
}

// idleTime is the part of a sleeping round trip during which neither process
// was on a CPU.
func (p *page) idleTime() (string, error) {
	for _, s := range p.profiled {
		if r := s.rounds[0]; r.Mode == "interrupt" {
			wall, cpu := r.Seconds/r.Messages*1e9, r.CPU/r.Messages*1e9
			if cpu > wall {
				return fmt.Sprintf("A sleeping round trip took %s on average while both processes were charged %s of CPU time: "+
					"waking one up overlaps with the other's going to sleep.", duration(wall), duration(cpu)), nil
			}
			return fmt.Sprintf("A sleeping round trip took %s on average, of which the two processes were on a CPU for %s: "+
				"for the other %s neither ran, and the round trip waited for the machine to wake a CPU up, or to take it from somebody else.",
				duration(wall), duration(cpu), duration(wall-cpu)), nil
		}
	}
	return "", fmt.Errorf("profiles: nothing of mode interrupt")
}

// disturbed says how much of their CPUs those of a run got who look all the
// time, and so would have used all of it.
func (p *page) disturbed(name string) (string, error) {
	var got []float64
	for _, s := range map[string]run{"latency": p.latency, "open": p.open, "throughput": p.throughput, "profiled": p.profiled}[name] {
		if s.Mode == "poll" && s.Size >= picturedSize {
			got = append(got, s.of(func(r record) float64 { return 100 * r.CPU / (2 * r.Seconds) })...)
		}
	}
	if len(got) == 0 {
		return "", fmt.Errorf("%s: nothing in mode poll", name)
	}
	percent := func(v float64) string { return fmt.Sprintf("%.0f %%", v) }
	text := fmt.Sprintf("Processes that look all the time use all of two CPUs, if they get them. Here they got %s", within(got, percent))
	if median(got) < 95 {
		return text + ": **other work disturbed these measurements.** It hits those who look the hardest, as each of the two " +
			"waits in vain while the other is off its CPU.", nil
	}
	return text + ".", nil
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
