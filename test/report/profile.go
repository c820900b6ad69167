package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/google/pprof/profile"
)

// hops is where time goes, told by the function that is nearest to the leaf of
// the stack and matches.
var hops = []struct {
	what string
	re   *regexp.Regexp
}{
	{"looking for the message, and pausing between two looks", regexp.MustCompile(`shmem\.Pause|\(\*receiver\)\.glances|\(\*waiter\)\.(look|glances)$`)},
	{"copying in and out", regexp.MustCompile(`shmem\.(copyTo|copyFrom)|\(\*ReadWords\)\.Copy|\(\*Words\)\.Write$|^runtime\.memmove`)},
	{"kernel: ringing the doorbell (write to the eventfd)", regexp.MustCompile(`internal/evfd\.Signal$|ivshmem\.\(\*Device\)\.Ring$`)},
	{"kernel: going to sleep, waking up (epoll)", regexp.MustCompile(`internal/evfd\.(\(\*Set\)\.|Wait$|waitBriefly$)`)},
	{"kernel: taking the interrupt (read from the eventfd)", regexp.MustCompile(`internal/evfd\.Take$`)},
	{"device: arming, choosing who sleeps", regexp.MustCompile(`ivshmem\.\(\*(waiters|Device)\)`)},
	{"stream: records, positions, events", regexp.MustCompile(`/stream\.`)},
	{"the measurement: clock, histogram, checks", regexp.MustCompile(`hdrhistogram|/pingpong\.|^time\.|^main\.`)},
	{"Go runtime", regexp.MustCompile(`^runtime\.`)},
}

const other = "other"

// shares is the CPU time of both processes together, by hop.
type shares struct {
	total   float64 // seconds
	seconds map[string]float64
}

func loadShares(dir string, files []string) (*shares, error) {
	s := &shares{seconds: map[string]float64{}}
	for _, name := range files {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		p, err := profile.Parse(f)
		f.Close()
		if err != nil {
			return nil, err
		}
		for _, sample := range p.Sample {
			t := float64(sample.Value[len(sample.Value)-1]) / 1e9
			s.total += t
			s.seconds[hop(sample)] += t
		}
	}
	return s, nil
}

func hop(sample *profile.Sample) string {
	for _, location := range sample.Location { // from the leaf on
		for _, line := range location.Line {
			for _, h := range hops {
				if line.Function != nil && h.re.MatchString(line.Function.Name) {
					return h.what
				}
			}
		}
	}
	return other
}

// names is the hops that any of the profiles has, in their order.
func names(all ...*shares) (out []string) {
	for _, h := range hops {
		if slices.ContainsFunc(all, func(s *shares) bool { return s.seconds[h.what] > 0 }) {
			out = append(out, h.what)
		}
	}
	if slices.ContainsFunc(all, func(s *shares) bool { return s.seconds[other] > 0 }) {
		out = append(out, other)
	}
	return out
}
