package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// The words by which a peer is told what to do, and the commands: guestprog has
// the same numbers.
const (
	costStride = 512

	costSeq    = 8 * 0
	costOp     = 8 * 1
	costArg    = 8 * 2
	costAck    = 8 * 3
	costAsleep = 8 * 4
	costFirst  = 8 * 5
	costSecond = 8 * 6
	costV1ID   = 8 * 7
	costPing   = 8 * 8
	costPong   = 8 * 16
	costClock  = 8 * 17

	costSync   = 1
	costWait   = 2
	costRing   = 3
	costWaitV1 = 4
	costRingV1 = 5
	costLoad   = 6

	costWaitBare = 7
)

// doorbellCost takes the way of a doorbell apart, between guests and host
// processes, beside QEMU's own ivshmem-doorbell between the same two guests.
// The service runs in this process, so that it can look at the clock when a
// doorbell comes in and when it has gone out. The clocks of all are compared
// through shared memory, around each sample.
func doorbellCost(ctx context.Context, r *Report) error {
	samples := 300
	if r.Quick {
		samples = 40
	}
	r.Config["samples"] = samples
	c := &costRun{report: r}
	defer c.close()
	if err := c.start(ctx); err != nil {
		return err
	}
	paths := []costPath{
		{name: "guest to guest, ivshmem v1 of QEMU", from: c.guests[0], to: c.guests[1], v1: true},
		{name: "guest to guest", from: c.guests[0], to: c.guests[1], service: true},
		{name: "the same, the receiver in poll(2)", from: c.guests[0], to: c.guests[1], service: true, bare: true},
		{name: "guest to host process", from: c.guests[0], to: c.hosts[0], service: true},
		{name: "host process to guest, eventfd that the service reads", from: c.hosts[0], to: c.guests[0]},
		{name: "host process to guest, message", from: c.plain, to: c.guests[0], service: true},
		{name: "host process to host process, eventfd", from: c.hosts[0], to: c.hosts[1]},
		{name: "host process to host process, message", from: c.plain, to: c.hosts[1], service: true},
	}
	hops := make([]costHops, len(paths))
	loads := map[string][]float64{}
	for begin, n := time.Now(), 0; n < samples || time.Since(begin) < r.Duration; n++ {
		for i, p := range paths {
			if err := c.sample(ctx, p, &hops[i]); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
		for name, p := range map[string]*costPeer{"guest": c.guests[0], "host process": c.plain} {
			a, b, err := p.command(ctx, costLoad, 0)
			if err != nil {
				return err
			}
			loads[name] = append(loads[name], float64(b-a)/1e3)
		}
	}
	c.evaluate(paths, hops, loads)
	return nil
}

// costPath is a way of a doorbell.
type costPath struct {
	name     string
	from, to *costPeer
	v1       bool
	bare     bool // not by Device.Wait
	service  bool // it comes to the service as a message
}

// costHops are the samples of a path, in microseconds. Arrive and wake are one
// after the other; the sender and the service may be busy for longer.
type costHops struct {
	sender, arrive, service, wake, total []float64
}

// costRun is the link, and its peers.
type costRun struct {
	report *Report
	link   *link.Link
	memory *shmem.ReadWrite
	guests [2]*costPeer
	hosts  [2]*costPeer
	plain  *costPeer // a host process that has no doorbell eventfds
	start0 time.Time
	pings  uint64

	mu      sync.Mutex
	in, out time.Time // of the last doorbell, at the service
	delay   time.Duration

	end []func()
}

func (c *costRun) close() {
	for _, f := range slices.Backward(c.end) {
		f()
	}
}

// timedFunction is a peer's device that looks at the clock.
type timedFunction struct {
	*pcidev.Function
	run   *costRun
	plain bool // it keeps the doorbell eventfds
}

func (f timedFunction) WriteRegion(index uint32, offset uint64, p []byte) error {
	if index != vfiouser.RegionBAR0 || offset != uint64(regs.DoorbellRegister) {
		return f.Function.WriteRegion(index, offset, p)
	}
	in := time.Now()
	time.Sleep(f.run.delay)
	err := f.Function.WriteRegion(index, offset, p)
	out := time.Now()
	f.run.mu.Lock()
	f.run.in, f.run.out = in, out
	f.run.mu.Unlock()
	return err
}

func (f timedFunction) IOFDs(index uint32, limit int) []vfiouser.IOFD {
	if f.plain {
		return nil
	}
	return f.Function.IOFDs(index, limit)
}

// listen serves clients of a socket, whose paths it returns.
func (c *costRun) listen(dir, name string, plain bool) (path string, err error) {
	path = filepath.Join(dir, name)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return "", err
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := listener.AcceptUnix()
			if err != nil {
				return
			}
			all.Go(func() {
				f, err := pcidev.New(c.link, pcidev.Options{})
				if err != nil {
					conn.Close()
					return
				}
				defer f.Close()
				_ = vfiouser.Serve(conn, timedFunction{f, c, plain}, vfiouser.ServerOptions{}) // until the peer ends
			})
		}
	})
	c.end = append(c.end, func() { listener.Close(); all.Wait() })
	return path, nil
}

func (c *costRun) start(ctx context.Context) error {
	c.start0 = time.Now()
	if c.report.Sabotage {
		c.delay = 5 * time.Millisecond
	}
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err != nil {
		return err
	}
	c.end = append(c.end, func() { os.RemoveAll(dir) })
	program, err := buildGuestProgram(ctx, dir, vm.AMD64)
	if err != nil {
		return err
	}
	if c.link, err = link.New(link.Config{Peers: 8, Vectors: 2, ReadWrite: 64 << 10}); err != nil {
		return err
	}
	c.end = append(c.end, func() { c.link.Close() })
	l := c.link.Layout()
	if c.memory, err = c.link.Memory().ReadWrite("R/W section", l.ReadWriteOffset(), l.ReadWrite); err != nil {
		return err
	}
	socket, err := c.listen(dir, "link.sock", false)
	if err != nil {
		return err
	}
	plain, err := c.listen(dir, "plain.sock", true)
	if err != nil {
		return err
	}
	v1 := filepath.Join(dir, "v1.sock")
	server, err := serveV1(v1, 1<<20, 2)
	if err != nil {
		return err
	}
	c.end = append(c.end, server.close)
	const v1Address = "0000:00:10.0"
	var configs []vm.Config
	for i := range c.guests {
		configs = append(configs, vm.Config{
			Name: fmt.Sprintf("guest%d", i), Driver: "vfio-pci", Devices: []vm.Device{{Socket: socket}},
			Files: map[string]string{"/bin/guestprog": program},
			QEMU:  []string{"-chardev", "socket,id=v1,path=" + v1, "-device", "ivshmem-doorbell,chardev=v1,vectors=2,addr=0x10"},
		})
	}
	c.report.say("booting %d guests", len(configs))
	guests, err := vm.StartAll(ctx, configs)
	if err != nil {
		return err
	}
	for i, g := range guests {
		c.end = append(c.end, g.Close)
		if c.guests[i], err = c.peer(ctx, checks.Guest(g), "-v1", v1Address); err != nil {
			return fmt.Errorf("guest %d: %w", i, err)
		}
	}
	for i := range c.hosts {
		if c.hosts[i], err = c.peer(ctx, checks.Host(dir), "-device", socket); err != nil {
			return err
		}
	}
	c.plain, err = c.peer(ctx, checks.Host(dir), "-device", plain)
	return err
}

// costPeer is a peer that does what it is told.
type costPeer struct {
	run     *costRun
	process *checks.Process
	id      uint32
	words   *shmem.ReadWrite
	seq     uint64
}

func (c *costRun) peer(ctx context.Context, at checks.Place, options ...string) (*costPeer, error) {
	p := &costPeer{run: c}
	var err error
	if p.process, err = checks.Start(at, append([]string{"guestprog", "cost"}, options...)...); err != nil {
		return nil, err
	}
	c.end = append(c.end, p.process.Kill)
	line, err := p.process.Line(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Sscanf(line, "ready %d", &p.id); err != nil {
		return nil, fmt.Errorf("%q: %w", line, err)
	}
	p.words, err = c.memory.View(costStride*uint64(p.id), costStride)
	return p, err
}

func (p *costPeer) load(at uint64) uint64 { v, _ := p.words.Load64(at); return v }

func (p *costPeer) store(at, v uint64) { _ = p.words.Store64(at, v) }

// tell starts a command.
func (p *costPeer) tell(op, arg uint64) {
	p.seq++
	p.store(costOp, op)
	p.store(costArg, arg)
	p.store(costSeq, p.seq)
}

// await waits until a word has the number of the last command.
func (p *costPeer) await(ctx context.Context, word uint64) error {
	for end := time.Now().Add(patience); p.load(word) != p.seq; time.Sleep(50 * time.Microsecond) {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(end):
			return fmt.Errorf("peer %d does not do what it is told: %s", p.id, p.process.Stderr())
		}
	}
	return nil
}

func (p *costPeer) command(ctx context.Context, op, arg uint64) (first, second int64, err error) {
	p.tell(op, arg)
	err = p.await(ctx, costAck)
	return int64(p.load(costFirst)), int64(p.load(costSecond)), err
}

// offset is how far the peer's clock is ahead of the own one: that of the
// shortest of several exchanges. Both sides have to run at the same time for
// that, so there are more until they do not get shorter.
func (p *costPeer) offset(ctx context.Context) (int64, error) {
	const rounds = 20
	best, offset := int64(1<<63-1), int64(0)
	for range rounds {
		took, ahead, err := p.exchange(ctx)
		if err != nil {
			return 0, err
		}
		if took >= best {
			break
		}
		best, offset = took, ahead
	}
	return offset, nil
}

// exchange asks for the peer's clock some times, and returns the shortest
// exchange, and how far the peer was ahead in that.
func (p *costPeer) exchange(ctx context.Context) (best, ahead int64, err error) {
	const exchanges = 40
	p.tell(costSync, exchanges)
	best = 1<<63 - 1
	for range exchanges {
		p.run.pings++
		sent := p.run.clock()
		p.store(costPing, p.run.pings)
		for n := 1; p.load(costPong) != p.run.pings; n++ {
			if n&0xffff == 0 && (ctx.Err() != nil || p.run.clock()-sent > int64(patience)) {
				return 0, 0, errors.Join(ctx.Err(), fmt.Errorf("peer %d does not answer: %s", p.id, p.process.Stderr()))
			}
		}
		back := p.run.clock()
		if back-sent < best {
			best, ahead = back-sent, int64(p.load(costClock))-(sent+back)/2
		}
	}
	return best, ahead, p.await(ctx, costAck)
}

func (c *costRun) clock() int64 { return int64(time.Since(c.start0)) }

// asleepAfter is for a peer that has said that it is about to sleep.
const asleepAfter = 3 * time.Millisecond

// sample rings once.
func (c *costRun) sample(ctx context.Context, p costPath, h *costHops) error {
	from, err := p.from.offset(ctx)
	if err != nil {
		return err
	}
	wait, ring, target := uint64(costWait), uint64(costRing), uint64(p.to.id)
	if p.v1 {
		wait, ring, target = costWaitV1, costRingV1, p.to.load(costV1ID)-1
	}
	if p.bare {
		wait = costWaitBare
	}
	p.to.tell(wait, 0)
	if err := p.to.await(ctx, costAsleep); err != nil {
		return err
	}
	time.Sleep(asleepAfter)
	before, after, err := p.from.command(ctx, ring, target)
	if err != nil {
		return err
	}
	if err := p.to.await(ctx, costAck); err != nil {
		return err
	}
	woke := int64(p.to.load(costFirst))
	to, err := p.to.offset(ctx)
	if err != nil {
		return err
	}
	rang, woke := before-from, woke-to
	add := func(hop *[]float64, ns int64) { *hop = append(*hop, float64(ns)/1e3) }
	add(&h.sender, after-before)
	add(&h.total, woke-rang)
	if p.service {
		c.mu.Lock()
		in, out := int64(c.in.Sub(c.start0)), int64(c.out.Sub(c.start0))
		c.mu.Unlock()
		add(&h.arrive, in-rang)
		add(&h.service, out-in)
		add(&h.wake, woke-in)
	}
	return nil
}

// evaluate makes the table.
func (c *costRun) evaluate(paths []costPath, hops []costHops, loads map[string][]float64) {
	r := c.report
	unit := quantile(hops[0].total, 0.5)
	times := func(v float64) string { return fmt.Sprintf("%.2f", v/unit) }
	cell := func(hop []float64) string {
		if len(hop) == 0 {
			return ""
		}
		return fmt.Sprintf("%.0f (%s)", quantile(hop, 0.5), times(quantile(hop, 0.5)))
	}
	t := Table{
		Title: "medians in microseconds (and as multiples of the whole way of v1); spread: 10th and 90th percentile by the median",
		Head:  []string{"from, to", "until the service has it", "from there until the receiver runs", "in all", "spread", "sender busy", "service busy"},
	}
	backwards, n := 0, 0
	for i, p := range paths {
		h := hops[i]
		m := quantile(h.total, 0.5)
		t.Rows = append(t.Rows, []string{p.name, cell(h.arrive), cell(h.wake), cell(h.total),
			fmt.Sprintf("%.2f to %.2f", quantile(h.total, 0.1)/m, quantile(h.total, 0.9)/m), cell(h.sender), cell(h.service)})
		r.sample(p.name+", us", h.total...)
		for _, hop := range [][]float64{h.arrive, h.wake, h.total} {
			n += len(hop)
			for _, v := range hop {
				if v <= 0 {
					backwards++
				}
			}
		}
	}
	for _, name := range []string{"guest", "host process"} {
		t.Rows = append(t.Rows, []string{name + " reads a register (message and answer)", "", "", "", "", cell(loads[name]), ""})
	}
	r.Tables = append(r.Tables, t)
	r.atLeast("samples of each", float64(len(hops[0].total)), 10)
	r.atMost("share of hops that end before they begin", float64(backwards)/float64(n), 0.02)
	r.atMost("guest to guest, times v1", quantile(hops[1].total, 0.5)/unit, 4)
	r.atMost("host process to host process, times v1", quantile(hops[6].total, 0.5)/unit, 1)
}

// quantile of values, which it sorts.
func quantile(v []float64, q float64) float64 {
	slices.Sort(v)
	return v[min(len(v)-1, int(q*float64(len(v))))]
}
