package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/stream"
	"github.com/ivshmem-go/ivshmem/test/vm"
)

// benchGuests is bench between two guests: the link beside everything else that
// QEMU joins the same two guests by. Under emulation figures say nothing about
// a processor; ratios compare what costs the same exits.
func benchGuests(ctx context.Context, r *Report) error {
	b := &guestBench{report: r}
	defer b.close()
	if err := b.start(ctx); err != nil {
		return err
	}
	if r.Sabotage { // which rings for each message of a round trip: the rest need not run
		i := slices.IndexFunc(guestJobs, func(j guestJob) bool { return j.name == busyJob })
		f, err := b.measure(ctx, guestJobs[i])
		if err == nil {
			r.atMost("doorbells per message of a round trip", f.Doorbells/2, busyBar(r))
		}
		return err
	}
	rounds := 0
	for begin := time.Now(); rounds < 1 || !r.Quick && (rounds < 3 || time.Since(begin) < r.Duration); rounds++ {
		r.say("round %d, %v", rounds+1, time.Since(begin).Round(time.Second))
		round := map[string]figures{}
		for _, j := range guestJobs {
			f, err := b.measure(ctx, j)
			if err != nil {
				return fmt.Errorf("%s: %w", j.name, err)
			}
			round[j.name] = f
		}
		for _, row := range guestRows {
			r.sample(row.what, row.value(round[row.own]))
			for i, name := range row.beside {
				if strings.HasPrefix(name, otherDevice) {
					r.sample(row.what+" / "+besides[i], row.value(round[row.own])/row.value(round[name]))
				}
			}
		}
		for _, bar := range guestBars {
			v, _ := bar.of(round)
			r.sample(bar.what, v)
		}
	}
	idle, err := b.measure(ctx, guestJob{name: "idle", link: "--over messages --mode adaptive --measure idle", times: 4})
	if err != nil {
		return err
	}
	r.Config["rounds"], r.Config["machine"] = rounds, cpuModel()
	b.judge()
	// To begin and to end takes some milliseconds.
	percent := idle.CPU / idle.Seconds * 100
	r.count("adaptive, idle: percent of a CPU, both programs", percent, "<= 1", percent <= 1 || r.Quick)
	return nil
}

// busyJob is the round trip of two that are busy with each other.
const busyJob = "messages adaptive"

// busyBar is how many doorbells it may ring for each message. In a fraction of a
// second, beside whatever else the machine does, some of its time is spent in
// finding out again that the peer is busy.
func busyBar(r *Report) float64 {
	if r.Quick {
		return 0.5
	}
	return 0.05
}

// guestJob is a measurement that runs in both guests.
type guestJob struct {
	name string
	// link are options of ivsh-pingpong, other those of guestprog bench.
	link, other string
	crowd       bool    // host processes have all other peer IDs
	times       float64 // as long as the others; 0 is 1
}

// guestBench is the link, and both guests.
type guestBench struct {
	report  *Report
	service *vm.Service
	guests  []*vm.Guest
	dir     string
}

const benchPeers = 64

func (b *guestBench) close() {
	for _, g := range b.guests {
		g.Close()
	}
	if b.service != nil {
		b.service.Close()
	}
	os.RemoveAll(b.dir)
}

const (
	benchDevice = "0000:00:08.0"
	benchV1     = "0000:00:10.0"
)

func (b *guestBench) start(ctx context.Context) (err error) {
	if b.dir, err = os.MkdirTemp("", "ivshmem-campaign-"); err != nil {
		return err
	}
	program, err := buildGuestProgram(ctx, b.dir, vm.AMD64)
	if err != nil {
		return err
	}
	// Each output section has room for 1,000 connections; memory that nobody
	// touches costs nothing.
	b.service, err = vm.Serve(ctx, nil, "--peers", fmt.Sprint(benchPeers), "--vectors", "3", "--rw", "4K", "--output", "8M", "--quiet")
	if err != nil {
		return err
	}
	v1 := filepath.Join(b.dir, "v1.sock")
	server, err := serveV1(v1, 1<<20, 2)
	if err != nil {
		return err
	}
	defer server.close() // QEMU needs it to start
	var configs []vm.Config
	for i := range 2 {
		role := "server=on"
		wait := ",wait=off"
		if i == 1 {
			role, wait = "server=off", ""
		}
		configs = append(configs, vm.Config{
			Name: fmt.Sprintf("guest%d", i), Driver: "vfio-pci",
			// Of its own processors a program may take one to look. With a single
			// one QEMU emulates atomic instructions by ordinary ones, which are
			// none to the other guest.
			CPUs:    2,
			Devices: []vm.Device{{Socket: b.service.Socket, Address: "0x8"}},
			Files:   map[string]string{"/bin/guestprog": program},
			Modules: []string{"virtio_net"},
			QEMU: []string{
				"-chardev", "socket,id=v1,path=" + v1, "-device", "ivshmem-doorbell,chardev=v1,vectors=2,addr=0x10",
				"-device", "virtio-serial-pci,id=pair,addr=0x11",
				"-chardev", "socket,id=pair,path=" + filepath.Join(b.dir, "serial.sock") + "," + role + wait,
				"-device", "virtserialport,bus=pair.0,chardev=pair,name=pair",
				"-netdev", "stream,id=net,addr.type=unix,addr.path=" + filepath.Join(b.dir, "net.sock") + "," + role,
				"-device", fmt.Sprintf("virtio-net-pci,netdev=net,addr=0x12,romfile=,mac=52:54:00:00:00:%02x", i+1),
			},
		})
	}
	b.report.say("booting 2 guests")
	if b.guests, err = vm.StartAll(ctx, configs); err != nil {
		return err
	}
	for i, g := range b.guests {
		setUp := fmt.Sprintf("ip addr add %s/24 dev eth0 && ip link set eth0 up", benchAddress(i))
		if _, err := b.run(ctx, g, "sh", "-ec", setUp); err != nil {
			return err
		}
	}
	return nil
}

func benchAddress(guest int) string { return fmt.Sprintf("10.0.0.%d", guest+1) }

// run runs a command in a guest, which has to succeed.
func (b *guestBench) run(ctx context.Context, g *vm.Guest, argv ...string) ([]byte, error) {
	res, err := g.Run(ctx, argv...)
	if err == nil && res.ExitCode() != 0 {
		err = fmt.Errorf("%s: %q: %v: %s", g.Name(), argv, res.Status, res.Stderr)
	}
	return res.Stdout, err
}

// measure runs a measurement in both guests; the first one leads.
func (b *guestBench) measure(ctx context.Context, j guestJob) (f figures, err error) {
	if j.crowd {
		crowd, err := b.crowd()
		defer func() {
			for _, d := range crowd {
				d.Close()
			}
		}()
		if err != nil {
			return f, err
		}
	}
	long := time.Second
	if b.report.Quick {
		long = 150 * time.Millisecond
	}
	limit := time.Duration(float64(long) * max(1, j.times))
	if j.name == "idle" && !b.report.Quick {
		limit = time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, limit+2*patience)
	defer cancel()
	before, err := b.cpu()
	if err != nil {
		return f, err
	}
	type end struct {
		out []byte
		err error
	}
	ends := make(chan end, 1)
	go func() {
		out, err := b.run(ctx, b.guests[1], b.argv(j, 1, limit)...)
		if err != nil {
			cancel() // the other one would wait in vain
		}
		ends <- end{out, err}
	}()
	out, err := b.run(ctx, b.guests[0], b.argv(j, 0, limit)...)
	if err != nil {
		cancel()
	}
	if other := <-ends; other.err != nil || err != nil {
		return f, errors.Join(err, other.err)
	}
	after, err := b.cpu()
	if err != nil {
		return f, err
	}
	if err := json.Unmarshal(out, &f); err != nil {
		return f, fmt.Errorf("%w: %q", err, out)
	}
	f.CPUPerGB = (after - before) / (f.BytesPerS * f.Seconds / 1e9)
	return f, nil
}

func (b *guestBench) argv(j guestJob, guest int, limit time.Duration) []string {
	if j.link == "" {
		argv := append([]string{"guestprog", "bench", "-duration", limit.String(), "-v1", benchV1, "-serial", "pair"}, strings.Fields(j.other)...)
		if guest == 0 {
			argv = append(argv, "-other", benchAddress(1))
		}
		return argv
	}
	argv := append([]string{"ivsh-pingpong", "--json", "--device", benchDevice, "--peer", strconv.Itoa(1 - guest), "--duration", limit.String()}, strings.Fields(j.link)...)
	if b.report.Sabotage {
		for i, a := range argv {
			if a == "adaptive" {
				argv[i] = "interrupt" // each message rings
			}
		}
	}
	return argv
}

// crowd takes all other peer IDs, each with an endpoint that does nothing.
func (b *guestBench) crowd() (all []*ivshmem.Device, err error) {
	for range benchPeers - len(b.guests) {
		d, err := ivshmem.Open(b.service.Socket, ivshmem.WithSleep(ivshmem.SleepPoller))
		if err != nil {
			return all, err
		}
		all = append(all, d)
		if _, err := stream.New(d, stream.Config{Mode: stream.Sleep, Ring: 4 << 10}); err != nil {
			return all, err
		}
	}
	return all, nil
}

// cpu is what the guests' QEMUs, in which the guests run, and the service have
// used so far, in seconds (kernel documentation, "proc": stat, utime and
// stime, in hundredths).
func (b *guestBench) cpu() (seconds float64, err error) {
	for _, pid := range []int{b.guests[0].Pid(), b.guests[1].Pid(), b.service.Pid()} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		// The name, in brackets, may have anything in it.
		f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		const utime, stime = 14 - 3, 15 - 3
		for _, i := range []int{utime, stime} {
			n, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				return 0, err
			}
			seconds += n / 100
		}
	}
	return seconds, nil
}

// withUnit prints a figure with three digits.
func withUnit(v float64, unit string) string {
	prefixes := []string{"", "k", "M", "G"}
	if unit == "ns" {
		prefixes, unit = []string{"n", "µ", "m", ""}, "s"
	}
	for v >= 1000 && len(prefixes) > 1 {
		v, prefixes = v/1000, prefixes[1:]
	}
	return fmt.Sprintf("%.3g %s%s", v, prefixes[0], unit)
}

// judge prints the tables.
func (b *guestBench) judge() {
	r := b.report
	of := func(v []float64) string {
		return fmt.Sprintf("**%.3g** (%.3g – %.3g)", median(v), slices.Min(v), slices.Max(v))
	}
	missing := func(what string, v []float64) bool {
		bad := len(v) == 0 || slices.ContainsFunc(v, func(f float64) bool { return math.IsNaN(f) || math.IsInf(f, 0) || f == 0 })
		if bad {
			r.Failures = append(r.Failures, what+": not measured")
		}
		return bad
	}
	t := Table{
		Title: fmt.Sprintf("Two guests of two CPUs each, emulated (%s), %v rounds, everything in turn: ratios to other devices of the same guests, median (lowest – highest)", r.Config["machine"], r.Config["rounds"]),
		Head:  []string{"what", "own figure, median", "/ ivshmem v1", "/ virtio-serial", "/ TCP over virtio-net"},
	}
	for _, row := range guestRows {
		if missing(row.what, r.Samples[row.what]) {
			continue
		}
		cells := []string{row.what, withUnit(median(r.Samples[row.what]), row.unit)}
		for i, name := range row.beside {
			ratio := r.Samples[row.what+" / "+besides[i]]
			switch {
			case !strings.HasPrefix(name, otherDevice):
				cells = append(cells, name)
			case missing(row.what+" / "+besides[i], ratio):
				cells = append(cells, "?")
			default:
				cells = append(cells, of(ratio))
			}
		}
		t.Rows = append(t.Rows, cells)
	}
	own := Table{Title: "The link by itself", Head: []string{"what", "median (lowest – highest)"}}
	for _, bar := range guestBars {
		v := r.Samples[bar.what]
		own.Rows = append(own.Rows, []string{bar.what, of(v)})
		if bar.own == busyJob && bar.want > 0 {
			bar.want = busyBar(r)
		}
		if bar.want > 0 {
			r.atMost(bar.what, median(v), bar.want)
		} else {
			missing(bar.what, v)
		}
	}
	r.Tables = append(r.Tables, t, own)
	if v := r.Samples[sleepingRow+" / TCP"]; len(v) > 0 {
		r.atMost(sleepingRow+" / TCP", median(v), sleepingBar)
	}
}
