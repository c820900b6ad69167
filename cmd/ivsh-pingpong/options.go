package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/pingpong"
	"github.com/ivshmem-go/ivshmem/regs"
)

// plan is what to measure.
type plan struct {
	overs   []pingpong.Over
	modes   []string
	sizes   []int
	task    pingpong.Task // without Over and Size
	poller  bool
	silence time.Duration
	rounds  int
	profile string
}

func (s *settings) parse(c *cli.Context) error {
	for _, parse := range []func(*cli.Context) error{s.parseModes, s.parseMeasure, s.parseSizes, s.parseLimits, s.parsePlace} {
		if err := parse(c); err != nil {
			return err
		}
	}
	return nil
}

func (s *settings) parseModes(c *cli.Context) error {
	mode := c.String("mode")
	if mode == "both" {
		mode = "poll,interrupt"
	}
	s.modes = strings.Split(mode, ",")
	for _, m := range s.modes {
		if !slices.Contains([]string{"poll", "interrupt", "adaptive"}, m) {
			return fmt.Errorf("--mode %q: expected poll, interrupt, both or adaptive, or a list of them", mode)
		}
	}
	switch sleep := c.String("sleep"); sleep {
	case "thread":
	case "poller":
		s.poller = true
	default:
		return fmt.Errorf("--sleep %q: expected thread or poller", sleep)
	}
	return nil
}

func (s *settings) parseMeasure(c *cli.Context) error {
	over := c.String("over")
	if over == "" {
		over = string(pingpong.Section)
		if slices.Contains(s.modes, "adaptive") {
			over = string(pingpong.Messages)
		}
	}
	for o := range strings.SplitSeq(over, ",") {
		switch o := pingpong.Over(o); o {
		case pingpong.Section, pingpong.Messages, pingpong.Conn:
			s.overs = append(s.overs, o)
		default:
			return fmt.Errorf("--over %q: expected section, messages or conn, or a list of them", over)
		}
	}
	section := slices.Contains(s.overs, pingpong.Section)
	s.task.Measure = pingpong.Measure(c.String("measure"))
	switch s.task.Measure {
	case pingpong.Latency:
	case pingpong.Throughput, pingpong.Rate, pingpong.Idle:
		if section {
			return fmt.Errorf("--measure %s: expected --over messages or conn, a section has latency only", s.task.Measure)
		}
	default:
		return fmt.Errorf("--measure %q: expected latency, throughput, rate or idle", s.task.Measure)
	}
	if section && slices.Equal(s.modes, []string{"adaptive"}) {
		return errors.New("--mode adaptive: expected --over messages or conn")
	}
	switch {
	case s.task.Rate < 0:
		return errors.New("--rate: expected a number above 0")
	case s.task.Rate > 0 && s.task.Measure != pingpong.Latency:
		return fmt.Errorf("--rate: expected --measure latency, found %s", s.task.Measure)
	case s.task.Rate > 0 && s.task.Batch > 1:
		return errors.New("--rate: expected --batch 1, as each message has a time of its own")
	case s.compare && s.task.Measure == pingpong.Idle:
		return errors.New("--compare: expected --measure latency, throughput or rate")
	case s.compare && s.device != "":
		return errors.New("--compare: expected no --device, as it compares two processes of this machine")
	}
	return nil
}

func (s *settings) parseSizes(c *cli.Context) error {
	for size := range strings.SplitSeq(c.String("size"), ",") {
		digits, unit := strings.TrimRight(size, "KMkm"), uint64(1)
		switch strings.ToUpper(size[len(digits):]) {
		case "":
		case "K":
			unit = 1 << 10
		case "M":
			unit = 1 << 20
		default:
			digits = ""
		}
		n, err := strconv.ParseUint(digits, 10, 32)
		if err != nil || n*unit < 8 || n*unit > 64<<20 {
			return fmt.Errorf("--size %q: expected sizes such as 64 or 64K, from 8 to 64M", size)
		}
		s.sizes = append(s.sizes, int(n*unit))
	}
	return nil
}

func (s *settings) parseLimits(c *cli.Context) error {
	t := &s.task
	t.Messages, t.Duration = c.Uint64("count"), c.Duration("duration")
	switch {
	case c.IsSet("count") && t.Messages == 0:
		return errors.New("--count: expected at least 1")
	case c.IsSet("duration") && t.Duration <= 0:
		return errors.New("--duration: expected a time above 0")
	case t.Messages == 0 && t.Duration == 0:
		t.Messages = 20000
	}
	if t.Measure == pingpong.Idle && t.Duration == 0 {
		t.Duration = 10 * time.Second
	}
	if s.rounds < 1 {
		return errors.New("--repeat: expected at least 1")
	}
	if s.silence <= 0 {
		return errors.New("--silence: expected a time above 0")
	}
	if s.report.json && s.report.csv {
		return errors.New("--json, --csv: expected one of them")
	}
	if s.report.hdr != "" && t.Measure != pingpong.Latency {
		return fmt.Errorf("--hdr: expected --measure latency, found %s", t.Measure)
	}
	return nil
}

func (s *settings) parsePlace(c *cli.Context) error {
	if cpus := c.String("cpus"); cpus != "" {
		for f := range strings.SplitSeq(cpus, ",") {
			n, err := strconv.ParseUint(f, 10, 16)
			if err != nil {
				return fmt.Errorf("--cpus %q: expected two numbers such as 0,1", cpus)
			}
			s.cpus = append(s.cpus, int(n))
		}
		if len(s.cpus) != 2 {
			return fmt.Errorf("--cpus %q: expected two numbers such as 0,1", cpus)
		}
	} else if s.compare {
		// Alike for all of them.
		s.cpus = firstCPUs()
	}
	if s.peer < -1 || s.peer >= regs.PeersMax {
		return fmt.Errorf("--peer %d: expected an ID below %d", s.peer, regs.PeersMax)
	}
	if s.task.Conns < 0 || s.peers < 0 || s.peers > 1000 {
		return errors.New("--conns, --peers: expected a number from 0 on, and at most 1000 peers")
	}
	return nil
}

// firstCPUs is the first two CPUs that this process may use: the same one
// twice if there is no other.
func firstCPUs() []int {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil
	}
	var cpus []int
	for i := 0; i < 64*len(set) && len(cpus) < 2; i++ {
		if set.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	if len(cpus) == 1 {
		cpus = append(cpus, cpus[0])
	}
	return cpus
}

// job is one measurement on a link of the two processes that are started.
type job struct {
	Over pingpong.Over
	Mode string
	Size int
}

// jobs is all of a round over a link.
func (p *plan) jobs() (out []job) {
	for _, over := range p.overs {
		for _, mode := range p.modes {
			switch {
			case over != pingpong.Section:
				for _, size := range p.sizes {
					out = append(out, job{over, mode, size})
				}
			case mode != "adaptive":
				out = append(out, job{over, mode, 8})
			}
		}
	}
	return out
}
