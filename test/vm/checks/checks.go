package checks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// Subject is a device, held in some way, with the other peer of its link of
// two. The program guestprog has to be in the PATH of both places.
type Subject struct {
	At     Place  // where the device is
	Device string // its name there
	Driver string // the kernel driver that it is bound to, "" if none
	// BackEnd is what has to carry it.
	BackEnd string
	Vectors int
	// Poll says that only polling is tried, where a check has both.
	Poll bool

	Peer       Place  // where the other peer is
	PeerDevice string // its device's name there

	// User is At as an ordinary user. Prepare gives it the rights to the
	// device files.
	User    func(argv ...string) (Place, []string)
	Prepare func(ctx context.Context) error
	// Removals are the ways to take the device away from a program that
	// waits. What is undone can be tried again.
	Removals []Removal
	// Killed is the state that the peer sees after a program was killed that
	// had set 5.
	Killed uint32

	// Messages is the number of round trips of a ping-pong, and of doorbells.
	Messages int
}

// Removal takes a device away, and brings it back.
type Removal struct {
	Name       string
	Take, Back func(ctx context.Context) error // Back may be nil
}

// Info looks at the device with `ivshctl info`.
func (s *Subject) Info(ctx context.Context) error {
	out, err := Run(ctx, s.At, "ivshctl", "info", "--json", "--device", s.Device)
	if err != nil {
		return err
	}
	var i struct {
		Driver   string            `json:"driver"`
		BackEnd  string            `json:"back_end"`
		ID       *uint32           `json:"id"`
		MaxPeers *uint32           `json:"max_peers"`
		Vectors  *int              `json:"vectors"`
		Sections []json.RawMessage `json:"sections"`
		States   []uint32          `json:"states"`
		Missing  []string          `json:"missing"`
	}
	if err := json.Unmarshal([]byte(out), &i); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	// Between two programs, some drivers have nothing open: then it is looked
	// at through sysfs.
	if i.Driver != s.Driver || i.ID == nil || *i.ID > 1 || i.MaxPeers == nil || *i.MaxPeers != 2 || i.Vectors == nil || *i.Vectors != s.Vectors ||
		len(i.Sections) != 4 || len(i.States) != 2 || len(i.Missing) != 0 {
		return fmt.Errorf("expected driver %q, 2 peers, %d vectors, 4 sections and 2 states, found %s", s.Driver, s.Vectors, out)
	}
	return nil
}

// Polled plays ping-pong by polling.
func (s *Subject) Polled(ctx context.Context) error {
	return s.pingPong(ctx, s.At, "poll")
}

// Interrupt plays ping-pong by interrupts.
func (s *Subject) Interrupt(ctx context.Context) error {
	return s.pingPong(ctx, s.At, "interrupt")
}

// OrdinaryUser plays ping-pong as one, without the right to lock memory.
func (s *Subject) OrdinaryUser(ctx context.Context) error {
	if err := s.Prepare(ctx); err != nil {
		return err
	}
	mode := "both"
	if s.Poll {
		mode = "poll"
	}
	return s.pingPong(ctx, nil, mode)
}

// pingPong plays in a place, nil: as the ordinary user.
func (s *Subject) pingPong(ctx context.Context, at Place, mode string) error {
	argv := func(device string) []string {
		return []string{"ivsh-pingpong", "--json", "--mode", mode, "--count", fmt.Sprint(s.Messages), "--warmup", fmt.Sprint(s.Messages / 10),
			"--silence", "60s", "--device", device} // so slow may a machine be that does everything at once
	}
	own := argv(s.Device)
	if at == nil {
		at, own = s.User(own...)
	}
	p, err := Start(at, own...)
	if err != nil {
		return err
	}
	defer p.Kill()
	peer, err := Start(s.Peer, argv(s.PeerDevice)...)
	if err != nil {
		return err
	}
	defer peer.Kill()
	// Whoever fails first has the reason.
	select {
	case <-p.Done():
	case <-peer.Done():
	case <-ctx.Done():
	}
	modes := []string{mode}
	if mode == "both" {
		modes = []string{"poll", "interrupt"}
	}
	for _, side := range []*Process{p, peer} {
		if err := side.End(ctx, 0); err != nil {
			return err
		}
		for _, mode := range modes {
			if err := s.messages(ctx, side, mode); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Subject) messages(ctx context.Context, p *Process, mode string) error {
	line, err := p.Line(ctx)
	if err != nil {
		return err
	}
	var r struct {
		Mode     string           `json:"mode"`
		Messages int              `json:"messages"`
		Errors   int              `json:"errors"`
		RTT      *json.RawMessage `json:"rtt_ns"`
	}
	if err := json.Unmarshal([]byte(line), &r); err != nil {
		return fmt.Errorf("%s: %w: %s", p.name, err, line)
	}
	if r.Mode != mode || r.Messages != s.Messages || r.Errors != 0 || r.RTT == nil {
		return fmt.Errorf("%s: expected %d messages in mode %s, found %s", p.name, s.Messages, mode, line)
	}
	return nil
}

// waiting starts a command on the device that sets a state, and returns when
// the peer has seen that, with the device's peer ID.
func (s *Subject) waiting(ctx context.Context, state uint32, argv ...string) (p *Process, id string, err error) {
	own, err := Start(s.At, argv...)
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			own.Kill()
		}
	}()
	watch, err := Start(s.Peer, "ivshctl", "state", "watch", "--json", "--device", s.PeerDevice)
	if err != nil {
		return nil, "", err
	}
	defer watch.Kill()
	limited, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // without it the watch sees nothing
		select {
		case <-own.Done():
		case <-limited.Done():
		}
		cancel()
	}()
	for {
		line, err := watch.Line(limited)
		if err != nil {
			return nil, "", errors.Join(err, own.failure(ctx))
		}
		var seen struct {
			Peer  int    `json:"peer"`
			State uint32 `json:"state"`
		}
		if err := json.Unmarshal([]byte(line), &seen); err != nil {
			return nil, "", err
		}
		// The state of a program that was killed may still be there.
		if seen.State == state {
			return own, fmt.Sprint(seen.Peer), nil
		}
	}
}

// failure is why a command has ended, nil if it has not, or all is well.
func (p *Process) failure(ctx context.Context) error {
	select {
	case <-p.Done():
		return p.End(ctx, 0)
	default:
		return nil
	}
}

// VectorsApart rings two vectors, and looks on which they arrive.
func (s *Subject) VectorsApart(ctx context.Context) error {
	p, id, err := s.waiting(ctx, 1, "ivshctl", "wait", "--json", "--count", "4", "--state", "1", "--device", s.Device)
	if err != nil {
		return err
	}
	defer p.Kill()
	totals := map[int]int{}
	for _, vector := range []int{1, 2, 2, 1} {
		if _, err := Run(ctx, s.Peer, "ivshctl", "ring", id, fmt.Sprint(vector), "--device", s.PeerDevice); err != nil {
			return err
		}
		totals[vector]++
		line, err := p.Line(ctx)
		if err != nil {
			return err
		}
		if want := fmt.Sprintf(`{"vector":%d,"total":%d}`, vector, totals[vector]); line != want {
			return fmt.Errorf("a doorbell on vector %d arrived as %s, expected %s", vector, line, want)
		}
	}
	return p.End(ctx, 0)
}

// OneShot lets the peer ring at random, alone and in bursts, while the device
// is in one-shot mode: nothing may be lost, and there is at most one interrupt
// for each time that the device was armed.
func (s *Subject) OneShot(ctx context.Context) error {
	p, err := Start(s.At, "guestprog", "oneshot", "-device", s.Device)
	if err != nil {
		return err
	}
	defer p.Kill()
	ring, err := Start(s.Peer, "guestprog", "ring", "-device", s.PeerDevice, "-doorbells", fmt.Sprint(s.Messages))
	if err != nil {
		return err
	}
	defer ring.Kill()
	var rang struct{ Rung, Lost uint64 }
	select {
	case <-p.Done():
	case <-ring.Done():
		if err := ring.Result(ctx, &rang); err != nil {
			return err
		}
		if rang.Lost > 0 {
			return fmt.Errorf("a wake-up was lost, after %d doorbells", rang.Rung)
		}
	case <-ctx.Done():
	}
	var res struct{ Arms, Interrupts, Slept, Excess uint64 }
	if err := p.Result(ctx, &res); err != nil {
		return err
	}
	if rang.Rung == 0 {
		if err := ring.Result(ctx, &rang); err != nil {
			return err
		}
	}
	switch {
	case rang.Lost > 0:
		return fmt.Errorf("a wake-up was lost, after %d doorbells", rang.Rung)
	case res.Slept == 0 || res.Interrupts == 0:
		return fmt.Errorf("%d doorbells, but %d interrupts, and %d waits that slept", rang.Rung, res.Interrupts, res.Slept)
	case res.Excess > 0 || res.Arms > res.Interrupts+1:
		return fmt.Errorf("%d interrupts for %d times that the device was armed", res.Interrupts, res.Arms)
	}
	return nil
}

// Copies copies at every alignment and many lengths.
func (s *Subject) Copies(ctx context.Context) error {
	out, err := Run(ctx, s.At, "guestprog", "copies", s.Device)
	if err != nil {
		return err
	}
	var r struct {
		BackEnd string `json:"back_end"`
		Copies  int    `json:"copies"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if r.BackEnd != s.BackEnd || r.Copies < 10000 {
		return fmt.Errorf("expected at least 10000 copies through %s, found %s", s.BackEnd, out)
	}
	return nil
}

// Exit statuses of ivshctl.
const (
	exitTimeout = 5
	exitGone    = 7
)

// Removal kills a program that holds the device, and looks at what the peer
// sees of it; then it takes the device away from programs that wait for an
// interrupt, whose wait has to end.
func (s *Subject) Removal(ctx context.Context) error {
	p, err := Start(s.At, "ivshctl", "wait", "0", "--timeout", "1ms", "--device", s.Device)
	if err == nil {
		err = p.End(ctx, exitTimeout) // else it cannot wait at all
	}
	if err != nil {
		return err
	}
	p, id, err := s.waiting(ctx, 5, "ivshctl", "wait", "0", "--state", "5", "--device", s.Device)
	if err != nil {
		return err
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	if err := p.End(ctx, 128+int(syscall.SIGKILL)); err != nil {
		return err
	}
	// The process is gone only when its files are closed.
	out, err := Run(ctx, s.Peer, "ivshctl", "state", "get", id, "--device", s.PeerDevice)
	if err != nil {
		return err
	}
	if want := fmt.Sprintln(s.Killed); out != want {
		return fmt.Errorf("state after the program was killed: expected %q, found %q", want, out)
	}
	for _, r := range s.Removals {
		if err := s.remove(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
	}
	return nil
}

func (s *Subject) remove(ctx context.Context, r Removal) error {
	p, _, err := s.waiting(ctx, 3, "ivshctl", "wait", "0", "--state", "3", "--device", s.Device)
	if err != nil {
		return err
	}
	defer p.Kill()
	if err := r.Take(ctx); err != nil {
		return err
	}
	if err := p.End(ctx, exitGone); err != nil {
		return err
	}
	if r.Back == nil {
		return nil
	}
	if err := r.Back(ctx); err != nil {
		return err
	}
	return s.Info(ctx)
}

// Check is one thing that a way to the device may be able to do.
type Check struct {
	Name string
	Run  func(*Subject, context.Context) error
}

// All is the checks; the last one may leave nothing to check.
var All = []Check{
	{"info", (*Subject).Info},
	{"all copy alignments", (*Subject).Copies}, // first: from the first INTx on, the memory is slow
	{"polled ping-pong", (*Subject).Polled},
	{"interrupt ping-pong", (*Subject).Interrupt},
	{"two vectors apart", (*Subject).VectorsApart},
	{"one-shot", (*Subject).OneShot},
	{"as ordinary user", (*Subject).OrdinaryUser},
	{"removal", (*Subject).Removal},
}

// InGuest fills in what is the same for all devices that are bound to a
// driver in a guest, with a peer on the host.
func (s *Subject) InGuest(run func(ctx context.Context, script string) error) {
	bind := "ivshctl bind --driver " + s.Driver + " " + s.Device
	script := func(lines ...string) func(ctx context.Context) error {
		return func(ctx context.Context) error { return run(ctx, strings.Join(lines, "\n")) }
	}
	s.Prepare = script(
		"grep -q ^user: /etc/passwd || echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd",
		"for f in /dev/uio[0-9]* /dev/iommu /dev/vfio/vfio /dev/vfio/*[0-9] /dev/vfio/devices/*; do [ ! -e $f ] || chmod 666 $f; done",
	)
	s.User = func(argv ...string) (Place, []string) {
		return s.At, []string{"su", "user", "-c", "ulimit -l 0; exec " + strings.Join(argv, " ")}
	}
	if s.Driver == "" {
		return
	}
	pci := "/sys/bus/pci/devices/" + s.Device
	s.Removals = []Removal{
		{"driver unbound", script("echo " + s.Device + " >" + pci + "/driver/unbind"), script(bind)},
		{"device removed", script("echo 1 >" + pci + "/remove"), script("echo 1 >/sys/bus/pci/rescan", bind)},
	}
}
