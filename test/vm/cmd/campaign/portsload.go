package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/test/vm/internal/portload"
)

// loadSize is how many bytes go through each port, each way: 64 MiB in 2
// minutes, 1 GiB from 30 minutes on.
func (r *Report) loadSize() int64 {
	switch {
	case r.Sabotage:
		return 256 << 10
	case r.Quick:
		return 1 << 20
	case r.Duration >= 30*time.Minute:
		return 1 << 30
	}
	return max(1, int64(64*r.Duration/(2*time.Minute))) << 20
}

// load has numbered words go through all ports at once, both ways, while other
// ports are added and removed.
func (p *portPair) load() error {
	size := p.r.loadSize()
	p.r.say("%d bytes through each port", size)
	p.wire = multiport
	if p.sides[0] == nil {
		p.both()
	} else { // the device is there
		p.serve(1)
	}
	_, names := p.options(0)
	var loads [2]*talker
	var seconds [2][]float64 // of each port
	for i := range loads {
		argv := []string{"guestprog", "port-load", "-dir", portsDir, "-end", fmt.Sprint(i), "-bytes", fmt.Sprint(size)}
		if p.r.Sabotage && i == 1 {
			argv = append(argv, "-corrupt")
		}
		loads[i] = p.talk(i, append(argv, names...)...)
	}
	hot := 0
	// Each starts programs, which takes emulated processors longer than the load.
	for ; hot < mostHot && p.err == nil && len(loads[0].out) == 0 && len(loads[1].out) == 0 && loads[0].running() && loads[1].running(); hot++ {
		p.hotPlug()
	}
	// Against hanging for ever only.
	limit := 2*patience + time.Duration(2*size*int64(len(names))/(100<<10))*time.Second
	for i, k := range loads {
		line := k.lineWithin(limit)
		if p.err == nil {
			p.fail(json.Unmarshal([]byte(line), &seconds[i]))
		}
	}
	for _, k := range loads {
		if p.err != nil {
			_ = k.Signal(unix.SIGKILL) // it waits for the other one
			continue
		}
		k.quit()
	}
	if p.err != nil {
		return fmt.Errorf("load: %w%s", p.err, p.said())
	}
	slowest := slices.Max(slices.Concat(seconds[0], seconds[1]))
	for i, name := range names {
		p.r.sample("seconds of the load, "+name, max(seconds[0][i], seconds[1][i]))
	}
	p.r.Config["bytes_per_port_each_way"] = size
	p.r.Tables = append(p.r.Tables, Table{
		Title: "Numbered words through all ports at once, both ways, each checked",
		Head:  []string{"ports", "MiB per port, each way", "MB/s, all together", "meanwhile added, used and removed", "s"},
		Rows: [][]string{{fmt.Sprintf("%d named, 2 consoles", len(portNames)), fmt.Sprint(size >> 20),
			fmt.Sprintf("%.1f", float64(2*size)*float64(len(names))/slowest/1e6), fmt.Sprintf("%d ports", hot), fmt.Sprintf("%.1f", slowest)}},
	})
	p.r.atLeast("ports with all words right", float64(len(names)), float64(len(portNames)+2))
	least := 5.0
	if p.r.Quick {
		least = 1
	}
	p.r.atLeast("ports added, used and removed under load", float64(hot), least)
	return nil
}

// mostHot is how many ports are added and removed under load.
const mostHot = 30

// hotPlug adds a port, uses it, and removes it while it is open.
func (p *portPair) hotPlug() {
	const name = "org.example.hot"
	p.sh(0, "ivshctl ports add "+name+",as=char --dir "+portsDir)
	p.open(name)
	p.hello()
	p.sh(0, "ivshctl ports remove "+name+" --dir "+portsDir)
	for _, k := range []*talker{p.dev, p.drv} {
		k.until("read 1", "ENODEV")
		k.calls("close", "close")
		k.until("open "+p.file(k.guest, name), "ENOENT")
	}
}

// Kinds of kills.
const (
	driverKept  = "driver's service, while the device's has unread data"
	driverBusy  = "driver's service, at any moment"
	deviceBusy  = "device's service, at any moment"
	leastUnread = 16 << 10
)

// kills kills services with SIGKILL under programs that exchange acknowledged
// records, and starts them again. What the contract keeps:
//
//   - What a device's service has received, on a port with cache, outlives the
//     driver's death, and the program's closing of its file: it is read first, all
//     of it, in its order and without a gap, and then there is the end of file, or
//     what the driver's next life sends.
//   - What is unread in a service that is killed, what programs wrote into it and
//     what is in the queues dies with it. What the device's service has not sent
//     when the driver goes is dropped, and the ports of the driver's side go, with
//     what is unread there, when the device goes. So a program has to have what it
//     wrote acknowledged by the program at the other end, and to say it again
//     otherwise.
//
// The records show the first to the byte, and the second so: all arrive, once and
// in their order; what a program reads between two lives of the other one has no
// gap; and nothing comes that was not sent.
func (p *portPair) kills() error {
	if p.err != nil && !p.r.Sabotage {
		return nil // it is told already
	}
	p.err = nil
	names := portNames[2:] // all have cache
	var ends [2]*talker
	for i := range ends {
		ends[i] = p.talk(i, append([]string{"guestprog", "port-records", "-dir", portsDir, "-end", fmt.Sprint(i)}, names...)...)
	}
	most := 100
	if p.r.Quick {
		most = 2
	}
	p.r.Config["kills_at_most"] = most
	kinds := []string{driverKept, deviceBusy, driverBusy}
	done, kept := map[string]int{}, map[string]uint64{}
	begin := time.Now()
	cycles := 0
	for ; cycles < most && p.err == nil && (cycles < 2 || time.Since(begin) < p.r.Duration || p.r.Duration >= 30*time.Minute); cycles++ {
		kind := kinds[cycles%len(kinds)]
		p.r.say("kill %d: %s", cycles, kind)
		p.progress(ends, names)
		if kind == driverKept {
			kept[kind] += p.killKept(ends[0], names)
		} else {
			victim := 0
			if kind == driverBusy {
				victim = 1
			}
			time.Sleep(time.Duration(p.r.rand.IntN(200)) * time.Millisecond) // at any moment
			p.end(victim, unix.SIGKILL)
			p.serve(victim)
		}
		done[kind]++
	}
	p.progress(ends, names)
	took := time.Since(begin).Seconds()
	for _, k := range ends {
		k.tell("finish")
	}
	ends[0].line()
	ends[1].line()
	a, b := ends[0].counts(), ends[1].counts()
	if p.err != nil {
		return fmt.Errorf("kills: %w%s", p.err, p.said())
	}
	var sum portload.Counts
	missing := 0
	for _, name := range names {
		x, y := a[name], b[name]
		if x.Acked != y.Received || y.Acked != x.Received {
			missing++
		}
		sum.Received += x.Received + y.Received
		sum.Repeated += x.Repeated + y.Repeated
		sum.Cut += x.Cut + y.Cut
		sum.Begun += x.Begun + y.Begun
	}
	for _, k := range ends {
		k.quit()
	}
	t := Table{
		Title: fmt.Sprintf("Services killed (SIGKILL) and started again under %d ports with cache, whose programs exchange acknowledged records of 1 KiB", len(names)),
		Head:  []string{"killed", "cycles", "found"},
	}
	for _, kind := range kinds {
		if done[kind] == 0 {
			continue
		}
		found := "all records once, in their order"
		if kind == driverKept {
			found = fmt.Sprintf("%d bytes kept and read, no byte less or more", kept[kind])
		}
		t.Rows = append(t.Rows, []string{kind, fmt.Sprint(done[kind]), found})
	}
	t.Rows = append(t.Rows, []string{"all", fmt.Sprint(cycles), fmt.Sprintf("%d records; said again %d, cut %d; files opened %d times; %.1f s", sum.Received, sum.Repeated, sum.Cut, sum.Begun, took)})
	p.r.Tables = append(p.r.Tables, t)
	want := 2
	if p.r.Duration >= 30*time.Minute {
		want = most
	}
	p.r.atLeast("kills and reattachments", float64(cycles), float64(want))
	p.r.atLeast("bytes kept and read", float64(kept[driverKept]), float64(leastUnread*len(names)*done[driverKept]))
	p.r.atLeast("records that arrived, once and in order", float64(sum.Received), float64(100*cycles))
	p.r.atMost("ports where records are missing", float64(missing), 0)
	for i := range p.sides {
		p.end(i, unix.SIGINT)
	}
	return p.err
}

// counts asks for them.
func (k *talker) counts() map[string]portload.Counts { return k.order("count") }

// order is call for programs that answer with counts.
func (k *talker) order(what string) map[string]portload.Counts {
	var counts map[string]portload.Counts
	line := k.call(what)
	if k.pair.err == nil {
		k.pair.fail(json.Unmarshal([]byte(line), &counts))
	}
	return counts
}

// progress waits until records go through all ports, both ways.
func (p *portPair) progress(ends [2]*talker, names []string) {
	ctx, cancel := p.wait()
	defer cancel()
	for _, k := range ends {
		first := k.counts()
		for done := false; !done && p.err == nil; {
			now := k.counts()
			done = true
			for _, name := range names {
				done = done && now[name].Received >= first[name].Received+8
			}
			if ctx.Err() != nil {
				k.failf("not all ports get records: %v, at first %v", now, first)
			}
		}
	}
}

// killKept kills the driver's service while the device's one has unread data and
// no program. It returns how many bytes of that were read then.
func (p *portPair) killKept(end *talker, names []string) (kept uint64) {
	end.order("pause")
	ctx, cancel := p.wait()
	defer cancel()
	var before map[string]portStatus
	for full := 0; full < len(names) && p.err == nil; {
		full, before = 0, p.list(0)
		for _, name := range names {
			if before[name].Unread >= leastUnread {
				full++
			}
		}
		if ctx.Err() != nil {
			p.fail(errors.New("no unread data"))
		}
	}
	end.order("close")
	p.end(1, unix.SIGKILL)
	after := p.list(0)
	for _, name := range names {
		if p.err == nil && after[name].Unread < before[name].Unread {
			p.failf("port %s: %d bytes were unread, and %d when the driver's service had been killed", name, before[name].Unread, after[name].Unread)
		}
	}
	come := p.r.rand.IntN(2) == 0
	if come { // before anybody reads
		p.serve(1)
	}
	counts := end.order("open")
	if !come {
		p.serve(1)
	}
	for _, name := range names {
		n := counts[name].Kept
		if p.err == nil && n != uint64(after[name].Unread) {
			p.failf("port %s: %d bytes were kept, and %d read", name, after[name].Unread, n)
		}
		kept += n
	}
	return kept
}
