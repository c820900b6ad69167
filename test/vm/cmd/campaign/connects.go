package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// connects lets clients of both sockets, and QEMUs, come and go and be killed
// at random, all at one service. Then it lets many be there at the same time.
func connects(ctx context.Context, r *Report) error {
	want := map[string]int{"connects": 10000, "qemus": 50, "crowd_vfio_user": 1000, "crowd_ivshmem2": 200}
	if r.Quick {
		want = map[string]int{"connects": 400, "qemus": 2, "crowd_vfio_user": 60, "crowd_ivshmem2": 20}
	}
	for k, v := range want {
		r.Config[k] = v
	}
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if _, err := buildGuestProgram(ctx, dir, vm.AMD64); err != nil {
		return err
	}
	c := &connecting{report: r, host: checks.Host(dir), ivshmem2: filepath.Join(dir, "ivshmem2.sock")}
	if err := c.run(ctx, want); err != nil {
		return err
	}
	if r.Sabotage {
		return nil
	}
	for _, kind := range []struct {
		name     string
		ivshmem2 bool
		perChild int
	}{{"vfio-user", false, 25}, {"ivshmem2", true, 20}} {
		n := want["crowd_"+strings.ReplaceAll(kind.name, "-", "_")]
		if err := c.crowd(ctx, kind.name, kind.ivshmem2, n, kind.perChild); err != nil {
			return fmt.Errorf("%d peers on the %s socket: %w", n, kind.name, err)
		}
	}
	return nil
}

// connecting is the clients of one service.
type connecting struct {
	report   *Report
	host     checks.Place
	service  *vm.Service
	ivshmem2 string
	log      serviceLog
}

const (
	connectPeers   = 64
	connectVectors = 2
)

func (c *connecting) run(ctx context.Context, want map[string]int) error {
	r := c.report
	var err error
	c.service, err = vm.Serve(ctx, &c.log, "--peers", fmt.Sprint(connectPeers), "--vectors", fmt.Sprint(connectVectors), "--output", "0", "--ivshmem2-socket", c.ivshmem2)
	if err != nil {
		return err
	}
	defer c.service.Close()
	// What is made once, and kept, is made before: the doorbells of all IDs.
	var all []*ivshmemtest.Ivshmem2
	for range connectPeers {
		client, err := ivshmemtest.DialIvshmem2(c.ivshmem2)
		if err != nil {
			return err
		}
		client.OwnOnly = true
		all = append(all, client)
	}
	for _, client := range all {
		client.Close()
	}
	if _, err := c.churn(ctx, 100, 1, 0); err != nil {
		return err
	}
	before, err := c.settled(ctx, func(serviceUse) bool { return true })
	if err != nil {
		return err
	}

	survivors, err := checks.Start(c.host, "guestprog", "survive", "-device", c.service.Socket, "-ivshmem2", c.ivshmem2, "-peers", fmt.Sprint(connectPeers))
	if err != nil {
		return err
	}
	defer survivors.Kill()
	if _, err := survivors.Line(ctx); err != nil {
		return err
	}
	qemus, failed := 0, make(chan error, 1)
	go func() {
		var err error
		for ; qemus < want["qemus"] && err == nil; qemus++ {
			err = c.qemu(ctx, time.Duration(qemus%10)*20*time.Millisecond)
		}
		failed <- err
	}()
	total, begin := churned{}, time.Now()
	for total.connects < want["connects"] || time.Since(begin) < r.Duration {
		n, err := c.churn(ctx, 1+int(r.rand.Uint32N(60)), 4, r.rand.Uint64())
		total.add(n)
		if err != nil {
			return err
		}
		select {
		case <-survivors.Done():
			return fmt.Errorf("survivors: %w", survivors.End(ctx, 0))
		default:
		}
	}
	if err := <-failed; err != nil {
		return err
	}
	took := time.Since(begin)
	// Those who stay see the last ones go, by interrupt.
	last, err := c.startChurn(r.rand.Uint64())
	if err != nil {
		return err
	}
	defer last.Kill()
	if _, err := lines(ctx, last, 20); err != nil {
		return err
	}
	if err := survivors.Signal(syscall.SIGINT); err != nil {
		return err
	}
	if _, err := survivors.Line(ctx); err != nil {
		return err
	}
	if r.Sabotage {
		if err := survivors.Signal(syscall.SIGKILL); err != nil {
			return err
		}
	} else {
		last.Kill()
		var res struct{ Changes, Seen float64 }
		if err := survivors.Result(ctx, &res); err != nil {
			return err
		}
		r.atLeast("state changes of survivors", res.Changes, 10)
		r.atMost("changes that a survivor missed", 5*res.Changes-res.Seen, 0)
	}
	after, err := c.settled(ctx, func(u serviceUse) bool {
		return u.Peers == 0 && u.Goroutines == before.Goroutines && u.Descriptors == before.Descriptors && u.Threads <= before.Threads+8
	})
	if err != nil {
		return err
	}
	r.atLeast("connects", float64(total.connects), float64(want["connects"]))
	r.atLeast("processes killed", float64(total.killed), 2)
	r.atLeast("QEMU processes killed", float64(qemus), float64(want["qemus"]))
	r.info("connects a second", float64(total.connects)/took.Seconds())
	r.atMost("peers left", float64(after.Peers), 0)
	r.atMost("goroutines more", float64(after.Goroutines-before.Goroutines), 0)
	r.atMost("descriptors more", float64(after.Descriptors-before.Descriptors), 0)
	// Go's runtime keeps some; those of the connections are gone.
	r.atMost("threads more", float64(after.Threads-before.Threads), 8)
	r.atMost("heap more, KiB", float64(after.Heap-before.Heap)/1024, 512)
	r.atMost("resident memory more, KiB", float64(after.Resident-before.Resident)/1024, 8<<10)
	t := Table{Title: "the service", Head: []string{"", "peers", "goroutines", "descriptors", "threads", "heap, KiB", "resident, KiB"}}
	for _, u := range []struct {
		name string
		serviceUse
	}{{"before", before}, {fmt.Sprintf("after %d connects, %d kills, %d QEMUs", total.connects, total.killed, qemus), after}} {
		t.Rows = append(t.Rows, append([]string{u.name}, u.cells()...))
	}
	r.Tables = append(r.Tables, t)
	return nil
}

// serviceUse is what a service uses.
type serviceUse struct {
	Peers, Goroutines, Descriptors, Threads int
	Heap, Resident                          int64 // bytes
}

func (u serviceUse) cells() []string {
	return []string{fmt.Sprint(u.Peers), fmt.Sprint(u.Goroutines), fmt.Sprint(u.Descriptors), fmt.Sprint(u.Threads), fmt.Sprint(u.Heap / 1024), fmt.Sprint(u.Resident / 1024)}
}

// settled waits until the usage is the same twice, and as expected; if that
// does not happen, it is the last.
func (c *connecting) settled(ctx context.Context, ok func(serviceUse) bool) (u serviceUse, err error) {
	limit := patience
	if c.report.Sabotage {
		limit /= 6
	}
	var last serviceUse
	for end := time.Now().Add(limit); time.Now().Before(end); last = u {
		if u, err = c.usage(ctx); err != nil {
			return u, err
		}
		if ok(u) && u.Peers == last.Peers && u.Goroutines == last.Goroutines && u.Descriptors == last.Descriptors && u.Threads == last.Threads {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return u, ctx.Err()
}

func (c *connecting) usage(ctx context.Context) (u serviceUse, err error) {
	reports := c.log.expect()
	c.service.Signal(syscall.SIGUSR1)
	select {
	case u = <-reports:
	case <-c.service.Done():
		return u, errors.New("the service has ended")
	case <-ctx.Done():
		return u, ctx.Err()
	case <-time.After(patience):
		return u, errors.New("the service does not say what it uses")
	}
	proc := fmt.Sprintf("/proc/%d/", c.service.Pid())
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		return u, err
	}
	u.Descriptors = len(fds)
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(status)) {
		switch f := strings.Fields(line); f[0] {
		case "VmRSS:":
			u.Resident, err = strconv.ParseInt(f[1], 10, 64)
			u.Resident *= 1024
		case "Threads:":
			u.Threads, err = strconv.Atoi(f[1])
		}
		if err != nil {
			return u, err
		}
	}
	return u, nil
}

// serviceLog takes from a service's log what it uses, and who has connected.
type serviceLog struct {
	mu        sync.Mutex
	rest      []byte
	connected map[string]bool // by process ID
	reports   chan serviceUse
}

var (
	inUse     = regexp.MustCompile(`msg="in use" peers=(\d+) goroutines=(\d+) heap=(\d+)`)
	connected = regexp.MustCompile(`msg="peer connected" .*process\.pid=(\d+)`)
)

// expect returns where the next report goes.
func (l *serviceLog) expect() <-chan serviceUse {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reports = make(chan serviceUse, 16)
	return l.reports
}

func (l *serviceLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, p...)
	for {
		i := bytes.IndexByte(l.rest, '\n')
		if i < 0 {
			return len(p), nil
		}
		line := l.rest[:i]
		if m := inUse.FindSubmatch(line); m != nil {
			var u serviceUse
			if _, err := fmt.Sscan(string(bytes.Join(m[1:], []byte(" "))), &u.Peers, &u.Goroutines, &u.Heap); err == nil {
				l.reports <- u
			}
		} else if m := connected.FindSubmatch(line); m != nil {
			if l.connected == nil {
				l.connected = map[string]bool{}
			}
			l.connected[string(m[1])] = true
		}
		l.rest = append([]byte(nil), l.rest[i+1:]...)
	}
}

func (l *serviceLog) hasConnected(pid int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.connected[fmt.Sprint(pid)]
}

// churned counts what came and went.
type churned struct{ connects, killed int }

func (n *churned) add(m churned) { n.connects, n.killed = n.connects+m.connects, n.killed+m.killed }

// churn runs processes that connect and leave at random, and kills each when
// it has connected so often.
func (c *connecting) churn(ctx context.Context, connects, processes int, seed uint64) (churned, error) {
	var n churned
	results := make(chan error)
	var mu sync.Mutex
	for i := range processes {
		go func() {
			results <- func() error {
				p, err := c.startChurn(seed + uint64(i))
				if err != nil {
					return err
				}
				defer p.Kill()
				made, err := lines(ctx, p, connects)
				mu.Lock()
				n.add(churned{made, 1})
				mu.Unlock()
				return err
			}()
		}()
	}
	var err error
	for range processes {
		err = errors.Join(err, <-results)
	}
	return n, err
}

func (c *connecting) startChurn(seed uint64) (*checks.Process, error) {
	return checks.Start(c.host, "guestprog", "churn", "-device", c.service.Socket, "-ivshmem2", c.ivshmem2, "-seed", fmt.Sprint(seed))
}

// lines waits for so many lines, one for each connection, and returns how many
// there were.
func lines(ctx context.Context, p *checks.Process, n int) (int, error) {
	for i := range n {
		if _, err := p.Line(ctx); err != nil {
			return i, err
		}
	}
	return n, nil
}

// qemu starts a QEMU with the device and its firmware, and kills it some time
// after it has connected.
func (c *connecting) qemu(ctx context.Context, after time.Duration) error {
	cache, err := fetch.Open(nil)
	if err != nil {
		return err
	}
	argv, err := cache.QEMU(ctx, vm.AMD64)
	if err != nil {
		return err
	}
	device, err := json.Marshal(map[string]any{"driver": "vfio-user-pci", "socket": map[string]string{"type": "unix", "path": c.service.Socket}})
	if err != nil {
		return err
	}
	argv = append(argv[:len(argv):len(argv)], "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
		"-M", "q35", "-accel", "tcg", "-m", "32M", "-device", string(device))
	cmd := exec.Command(argv[0], argv[1:]...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	child, err := vm.StartChild(cmd)
	if err != nil {
		return err
	}
	defer child.Kill()
	for end := time.Now().Add(patience); !c.log.hasConnected(child.Pid()); time.Sleep(5 * time.Millisecond) {
		select {
		case <-child.Done():
			return fmt.Errorf("QEMU: %w: %s", child.Kill(), stderr.String())
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
		if time.Now().After(end) {
			return errors.New("QEMU did not connect")
		}
	}
	time.Sleep(after) // anywhere in the firmware's work
	return nil
}

// crowd lets n peers be there at the same time, some in each process; each has
// to see the state of each.
func (c *connecting) crowd(ctx context.Context, name string, ivshmem2 bool, n, perChild int) error {
	r := c.report
	options := []string{"--peers", fmt.Sprint(n), "--vectors", "1", "--output", "0"}
	if ivshmem2 {
		options = append(options, "--ivshmem2-socket", c.ivshmem2)
	}
	c.log = serviceLog{}
	var err error
	if c.service, err = vm.Serve(ctx, &c.log, options...); err != nil {
		return err
	}
	defer c.service.Close()
	before, err := c.settled(ctx, func(serviceUse) bool { return true })
	if err != nil {
		return err
	}
	r.say("%d peers on the %s socket", n, name)
	begin := time.Now()
	argv := []string{"guestprog", "crowd", "-peers", fmt.Sprint(n), "-device", c.service.Socket}
	if ivshmem2 {
		argv = append(argv[:len(argv)-1], c.ivshmem2, "-ivshmem2")
	}
	var children []*checks.Process
	for left := n; left > 0; left -= perChild {
		p, err := checks.Start(c.host, append(argv[:len(argv):len(argv)], "-count", fmt.Sprint(min(left, perChild)))...)
		if err != nil {
			return err
		}
		defer p.Kill()
		children = append(children, p)
	}
	limited, cancel := context.WithTimeout(ctx, 8*time.Minute)
	defer cancel()
	// If one ends the others wait for ever, for the states of its peers.
	type answer struct {
		line string
		err  error
	}
	answers := make(chan answer, len(children))
	for _, p := range children {
		go func() {
			line, err := p.Line(limited)
			for errors.Is(err, context.DeadlineExceeded) && limited.Err() == nil {
				line, err = p.Line(limited)
			}
			answers <- answer{line, err}
		}()
	}
	seen := 0
	for range children {
		a := <-answers
		if a.err != nil {
			return a.err
		}
		k, err := strconv.Atoi(a.line)
		if err != nil {
			return err
		}
		seen += k
	}
	took := time.Since(begin)
	there, err := c.settled(ctx, func(u serviceUse) bool { return u.Peers == n })
	if err != nil {
		return err
	}
	for _, p := range children {
		p.Kill()
	}
	gone, err := c.settled(ctx, func(u serviceUse) bool {
		return u.Peers == 0 && u.Goroutines <= before.Goroutines+1 && u.Threads <= before.Threads+16
	})
	if err != nil {
		return err
	}
	r.atLeast(name+": peers that saw the state of each", float64(seen), float64(n))
	r.info(name+": seconds until all had seen all", took.Seconds())
	// The one that reads the link's doorbells is there from the first peer on.
	r.atMost(name+": goroutines more, when they are gone", float64(gone.Goroutines-before.Goroutines), 1)
	r.atMost(name+": threads more, when they are gone", float64(gone.Threads-before.Threads), 16)
	t := Table{Title: fmt.Sprintf("%d peers on the %s socket", n, name), Head: []string{"the service", "peers", "goroutines", "descriptors", "threads", "heap, KiB", "resident, KiB"}}
	for _, u := range []struct {
		name string
		serviceUse
	}{{"before", before}, {"with all", there}, {"killed", gone}} {
		t.Rows = append(t.Rows, append([]string{u.name}, u.cells()...))
	}
	r.Tables = append(r.Tables, t)
	return nil
}
