// Command campaign runs checks that take longer than a test. It is what
// scripts/campaign starts; see its --help.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

const usage = `Usage: scripts/campaign NAME [DURATION] [--json] [--sabotage] [--seed N]
       scripts/campaign list [--names]

Runs a long check for about DURATION ("quick", the default: seconds; or such
as 90s, 10m, 1h), prints its table, and exits 0 only if what it checks holds.
--json prints configuration, seed, counts and raw samples instead.
--sabotage breaks what is measured, and has to make the campaign fail.

Example: scripts/campaign oneshot 2m --json
`

// campaign is one check.
type campaign struct {
	name, what string
	// quick is the duration where none is given. 0: even so it takes too long for
	// scripts/test, which runs all others.
	quick time.Duration
	run   func(ctx context.Context, r *Report) error
}

var campaigns = []campaign{
	{"peers", "state changes and the death of one guest, seen by another by interrupt", 5 * time.Second, peers},
	{"oneshot", "one interrupt per arm, and no lost wake-up, in a guest with one-shot mode on", 5 * time.Second, oneShot},
	{"doorbells", "no lost wake-up through uio_ivshmem (kmod/) and vfio-pci, with bursts of doorbells", 6 * time.Second, doorbells},
	{"drivers", "every way to the device against everything it may be able to do, on both architectures", time.Second, drivers},
	{"doctor", "what `ivshctl doctor` says of set-ups that are broken on purpose", time.Second, doctor},
	{"connects", "clients of both sockets, and QEMUs, that come, go and are killed, at one service", time.Second, connects},
	{"mixed", "guests, host processes and ivshmem2 clients on one link: all ring all, and see their states", time.Second, mixed},
	{"doorbell-cost", "the way of a doorbell hop by hop, beside the ivshmem v1 of QEMU", time.Second, doorbellCost},
	{"pingpong", "round trips of two host processes against the floor of the machine", 10 * time.Second, pingPong},
	{"bench", "streams of two host processes against the floors of the machine, and against what is used instead", time.Second, bench},
	{"bench-guests", "the same between two guests, beside the other devices that QEMU joins them by", time.Second, benchGuests},
	{"streams", "a transfer over streams between two host processes that are killed at any moment", 6 * time.Second, streams},
	{"vnet", "virtual Ethernet between two guests, as people use a network", 10 * time.Second, ethernet},
	{"vnet-bench", "virtual Ethernet on the host against veth and against a forwarder, and what its time goes into", time.Second, ethernetBench},
	{"vnet-models", "virtual Ethernet against models of the drivers of Linux and Zephyr: every size, event and MTU, and a soak", 2 * time.Second, ethernetModels},
	{"virtio", "models of Linux's drivers on every type of device, bound, removed and killed", time.Second, virtioProcesses},
	{"block", "a file system on a virtio disk, through NBD: its device side, the guest, and the power fail at random moments", time.Second, blockDisk},
	{"virtio-bench", "ports between a guest and the host beside QEMU's virtio-serial, and disks beside NBD", time.Second, virtioBench},
	{"ports", "named ports between two guests: every row of docs/console.md, data through all at once, services that are killed", 0, namedPorts},
	{"fuzz", "all fuzzers, DURATION each", 3 * time.Second, fuzz},
}

// Report is what a campaign found.
type Report struct {
	Campaign string               `json:"campaign"`
	Duration time.Duration        `json:"-"`
	Seconds  float64              `json:"duration_s"`
	Quick    bool                 `json:"quick"`
	Sabotage bool                 `json:"sabotage"`
	Seed     uint64               `json:"seed"`
	Config   map[string]any       `json:"config"`
	Tables   []Table              `json:"tables,omitempty"`
	Counts   []Count              `json:"counts"`
	Samples  map[string][]float64 `json:"samples"`
	Failures []string             `json:"failures"`

	rand *rand.Rand
	// progress is where the campaign says what it is doing.
	progress io.Writer
}

// Table is printed as Markdown has it.
type Table struct {
	Title string     `json:"title"`
	Head  []string   `json:"head"`
	Rows  [][]string `json:"rows"`
}

func (t Table) print(out io.Writer) {
	line := func(cells []string) { fmt.Fprintf(out, "| %s |\n", strings.Join(cells, " | ")) }
	fmt.Fprintf(out, "\n%s\n\n", t.Title)
	line(t.Head)
	line(slices.Repeat([]string{"---"}, len(t.Head)))
	for _, r := range t.Rows {
		line(r)
	}
	fmt.Fprintln(out)
}

// Count is a number with the range that it has to be in.
type Count struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Want  string  `json:"want"`
	OK    bool    `json:"ok"`
}

// atLeast records a count that has to reach a minimum above 0: what was not
// done was not checked.
func (r *Report) atLeast(name string, value, minimum float64) {
	r.count(name, value, fmt.Sprintf(">= %g", minimum), value >= minimum && value > 0)
}

// atMost records a count, a ratio or the like with an upper bound.
func (r *Report) atMost(name string, value, maximum float64) {
	r.count(name, value, fmt.Sprintf("<= %g", maximum), value <= maximum)
}

// info records a number that is shown only.
func (r *Report) info(name string, value float64) { r.count(name, value, "", true) }

func (r *Report) count(name string, value float64, want string, ok bool) {
	r.Counts = append(r.Counts, Count{name, value, want, ok})
	if !ok {
		r.Failures = append(r.Failures, fmt.Sprintf("%s is %g, expected %s", name, value, want))
	}
}

func (r *Report) sample(name string, values ...float64) {
	r.Samples[name] = append(r.Samples[name], values...)
}

func (r *Report) say(format string, args ...any) {
	fmt.Fprintf(r.progress, format+"\n", args...)
}

func main() {
	if len(os.Args) > 2 {
		// What it starts itself for.
		if f := map[string]func([]string) error{floorPoller: poller, volatileDisk: serveVolatile}[os.Args[1]]; f != nil {
			if err := f(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string) int {
	r := &Report{
		Seed: rand.Uint64(), Quick: true, progress: os.Stderr,
		Config: map[string]any{}, Samples: map[string][]float64{}, Failures: []string{}, Counts: []Count{},
	}
	asJSON, names, help, err := r.parse(args)
	switch {
	case err != nil:
		fmt.Fprintf(os.Stderr, "campaign: %v; see --help\n", err)
		return 2
	case help:
		fmt.Print(usage)
		return 0
	case r.Campaign == "list":
		for _, c := range campaigns {
			switch {
			case !names:
				fmt.Printf("%-13s %s\n", c.name, c.what)
			case c.quick > 0: // for scripts/test
				fmt.Println(c.name)
			}
		}
		return 0
	}
	i := slices.IndexFunc(campaigns, func(c campaign) bool { return c.name == r.Campaign })
	if i < 0 {
		fmt.Fprintf(os.Stderr, "campaign: no campaign %q; `scripts/campaign list` shows them\n", r.Campaign)
		return 2
	}
	c := campaigns[i]
	if r.Quick {
		r.Duration = c.quick
	}
	r.Seconds = r.Duration.Seconds()
	r.rand = rand.New(rand.NewPCG(r.Seed, 0))
	if err := c.run(ctx, r); err != nil {
		r.Failures = append(r.Failures, err.Error())
	}
	if len(r.Counts) == 0 && len(r.Failures) == 0 {
		r.Failures = append(r.Failures, "nothing was counted")
	}
	if err := r.print(os.Stdout, asJSON); err != nil {
		fmt.Fprintln(os.Stderr, "campaign:", err)
		return 1
	}
	if len(r.Failures) > 0 {
		return 1
	}
	return 0
}

// parse reads the command line; options may stand anywhere.
func (r *Report) parse(args []string) (asJSON, names, help bool, err error) {
	var words []string
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "--json":
			asJSON = true
		case "--sabotage":
			r.Sabotage = true
		case "--names":
			names = true
		case "--help", "-h":
			help = true
		case "--seed":
			if i++; i == len(args) {
				return asJSON, names, help, errors.New("--seed needs a number")
			}
			if _, err := fmt.Sscan(args[i], &r.Seed); err != nil {
				return asJSON, names, help, fmt.Errorf("--seed %q: expected a number", args[i])
			}
		default:
			words = append(words, args[i])
		}
	}
	if help {
		return asJSON, names, help, nil
	}
	if len(words) == 0 || len(words) > 2 {
		return asJSON, names, help, errors.New("expected NAME [DURATION]")
	}
	r.Campaign = words[0]
	if len(words) == 2 && words[1] != "quick" {
		if r.Duration, err = time.ParseDuration(words[1]); err != nil || r.Duration <= 0 {
			return asJSON, names, help, fmt.Errorf("duration %q: expected quick, or such as 90s or 10m", words[1])
		}
		r.Quick = false
	}
	return asJSON, names, help, nil
}

func (r *Report) print(out io.Writer, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	fmt.Fprintf(out, "campaign %s, %v, seed %d\n", r.Campaign, r.Duration, r.Seed)
	for _, t := range r.Tables {
		t.print(out)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, c := range r.Counts {
		mark := ""
		if c.Want != "" {
			mark = "ok"
			if !c.OK {
				mark = "FAILED"
			}
		}
		fmt.Fprintf(w, "  %s\t%.6g\t%s\t%s\n", c.Name, c.Value, c.Want, mark)
	}
	w.Flush()
	for _, f := range r.Failures {
		fmt.Fprintf(out, "  failed: %s\n", strings.TrimSpace(f))
	}
	if len(r.Failures) > 0 {
		_, err := fmt.Fprintf(out, "campaign %s does not hold: %d failures\n", r.Campaign, len(r.Failures))
		return err
	}
	_, err := fmt.Fprintf(out, "campaign %s holds\n", r.Campaign)
	return err
}
