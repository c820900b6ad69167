// Report draws the pictures and writes the page of docs/performance.md, from
// what scripts/performance measured. Every number of the page comes from there.
//
//	report -data DIR -docs DIR
//
// It is a module of its own: what draws is of no use to anybody else.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/HdrHistogram/hdrhistogram-go"
)

func main() {
	data := flag.String("data", "", "`DIR` with the measurements")
	docs := flag.String("docs", "docs", "`DIR` for performance.md and performance/*.svg")
	format := flag.String("format", "svg", "of the pictures: svg, png or pdf")
	flag.Parse()
	if err := report(*data, *docs, *format); err != nil {
		fmt.Fprintf(os.Stderr, "report: %v\n", err)
		os.Exit(1)
	}
}

func report(data, docs, format string) error {
	p, err := load(data)
	if err != nil {
		return err
	}
	pictures := filepath.Join(docs, "performance")
	if err := os.MkdirAll(pictures, 0o755); err != nil {
		return err
	}
	if err := p.drawLatency(filepath.Join(pictures, "latency."+format)); err != nil {
		return err
	}
	if err := p.drawThroughput(filepath.Join(pictures, "throughput."+format)); err != nil {
		return err
	}
	var page bytes.Buffer
	if err := p.write(&page); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(docs, "performance.md"), page.Bytes(), 0o644)
}

// record is what ivsh-pingpong prints of a measurement, as far as it is used.
type record struct {
	Over      string  `json:"over"`
	Mode      string  `json:"mode"`
	Measure   string  `json:"measure"`
	Size      int     `json:"size"`
	Round     int     `json:"round"`
	Messages  float64 `json:"messages"`
	Seconds   float64 `json:"elapsed_s"`
	Wanted    float64 `json:"rate_per_second"`
	PerSecond float64 `json:"messages_per_second"`
	BytesPerS float64 `json:"bytes_per_s"`
	CPU       float64 `json:"cpu_s"`
	CPUPerGB  float64 `json:"cpu_s_per_gb"`
	Machine   string  `json:"machine"`
	RTT       struct {
		P50  float64 `json:"p50"`
		P99  float64 `json:"p99"`
		P999 float64 `json:"p999"`
	} `json:"rtt_ns"`
}

// series is all rounds of a measurement.
type series struct {
	Over, Mode string
	Size       int
	rounds     []record
}

// run is one call of ivsh-pingpong.
type run []*series

func (r run) find(over, mode string, size int) *series {
	for _, s := range r {
		if s.Over == over && s.Mode == mode && s.Size == size {
			return s
		}
	}
	return nil
}

// of is a figure of all rounds.
func (s *series) of(figure func(record) float64) (all []float64) {
	for _, r := range s.rounds {
		all = append(all, figure(r))
	}
	return all
}

// over is a figure of each round over that of another series in the same round.
func (s *series) over(other *series, figure func(record) float64) (all []float64) {
	if other == nil {
		return nil
	}
	for i, r := range s.rounds {
		if i < len(other.rounds) && figure(other.rounds[i]) > 0 {
			all = append(all, figure(r)/figure(other.rounds[i]))
		}
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

func loadRun(name string) (run, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out run
	for d := json.NewDecoder(bufio.NewReader(f)); ; {
		var r record
		if err := d.Decode(&r); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		s := out.find(r.Over, r.Mode, r.Size)
		if s == nil {
			s = &series{Over: r.Over, Mode: r.Mode, Size: r.Size}
			out = append(out, s)
		}
		s.rounds = append(s.rounds, r)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: no measurements", name)
	}
	return out, nil
}

// page is everything that was measured.
type page struct {
	latency, throughput, rate, open run
	profiled                        run // without rounds, under the profiler
	hists                           map[string]*hdrhistogram.Histogram
	profiles                        map[string]*shares // by mode
}

func load(dir string) (p *page, err error) {
	p = &page{hists: map[string]*hdrhistogram.Histogram{}, profiles: map[string]*shares{}}
	for name, to := range map[string]*run{
		"latency": &p.latency, "throughput": &p.throughput, "rate": &p.rate, "open": &p.open, "profiled": &p.profiled,
	} {
		if *to, err = loadRun(filepath.Join(dir, name+".json")); err != nil {
			return nil, err
		}
	}
	if err := p.loadHistograms(filepath.Join(dir, "latency.hlog")); err != nil {
		return nil, err
	}
	for _, s := range p.profiled {
		files, err := fs.Glob(os.DirFS(dir), fmt.Sprintf("profiles/%s-%s-%d-*.pprof", s.Over, s.Mode, s.Size))
		if err != nil {
			return nil, err
		}
		if len(files) != 2 {
			return nil, fmt.Errorf("profiles of mode %s: expected those of two processes, found %d", s.Mode, len(files))
		}
		if p.profiles[s.Mode], err = loadShares(dir, files); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// loadHistograms adds up the rounds of each measurement.
func (p *page) loadHistograms(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for r := hdrhistogram.NewHistogramLogReader(f); ; {
		h, err := r.NextIntervalHistogram()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if h == nil {
			break
		}
		tag, _, _ := strings.Cut(h.Tag(), "-round")
		if sum := p.hists[tag]; sum == nil {
			p.hists[tag] = h
		} else if dropped := sum.Merge(h); dropped > 0 {
			return fmt.Errorf("%s: %s: %d values do not fit together", name, tag, dropped)
		}
	}
	if len(p.hists) == 0 {
		return fmt.Errorf("%s: no histograms", name)
	}
	return nil
}
