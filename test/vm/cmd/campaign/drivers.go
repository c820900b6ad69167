package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// drivers tries every check on every way to the device, again and again until
// the time is up, and prints the table.
func drivers(ctx context.Context, r *Report) error {
	for begin := time.Now(); ; {
		t := &driverTable{report: r}
		err := t.round(ctx)
		t.close()
		r.Tables = t.tables
		if err != nil {
			return err
		}
		if time.Since(begin) >= r.Duration || len(r.Failures) > 0 {
			break
		}
	}
	passed, cannot := 0, 0
	for _, t := range r.Tables {
		for _, row := range t.Rows {
			for _, cell := range row[1:] {
				switch {
				case cell == cellPassed:
					passed++
				case strings.HasPrefix(cell, cellCannot):
					cannot++
				}
			}
		}
	}
	r.atLeast("cells that passed", float64(passed), 1)
	r.info("cells that cannot", float64(cannot))
	return nil
}

const (
	cellPassed = "passed"
	cellFailed = "FAILED"
	cellCannot = "not possible: "
)

// driverTable is one round of the campaign. The architectures take their turns
// at the same time.
type driverTable struct {
	mu       sync.Mutex // of report
	report   *Report
	bin      string // commands for this host
	guests   map[string]*vm.Guest
	services map[string]*vm.Service // by machine and device
	tables   []Table
}

func (t *driverTable) close() {
	for _, g := range t.guests {
		g.Close()
	}
	for _, s := range t.services {
		s.Close()
	}
	os.RemoveAll(t.bin)
}

func (t *driverTable) round(ctx context.Context) error {
	t.guests, t.services = map[string]*vm.Guest{}, map[string]*vm.Service{}
	if err := t.boot(ctx); err != nil {
		return err
	}
	if t.report.Sabotage {
		for _, s := range t.services {
			_ = s.Kill()
		}
	}
	arches := []string{vm.AMD64, vm.ARM64}
	t.tables = make([]Table, len(arches))
	var all sync.WaitGroup
	for i, arch := range arches {
		table := &t.tables[i]
		table.Title, table.Head = arch, []string{"back end"}
		for _, c := range checks.All {
			table.Head = append(table.Head, c.Name)
		}
		all.Go(func() {
			for _, row := range driverRows[arch] {
				table.Rows = append(table.Rows, append([]string{row.name}, t.row(ctx, arch, row)...))
			}
		})
	}
	all.Wait()
	return ctx.Err()
}

// boot starts all guests, and the services of their devices.
func (t *driverTable) boot(ctx context.Context) error {
	var err error
	if t.bin, err = os.MkdirTemp("", "ivshmem-campaign-"); err != nil {
		return err
	}
	if err := os.Chmod(t.bin, 0o755); err != nil {
		return err
	}
	programs := map[string]string{}
	for _, arch := range []string{vm.AMD64, vm.ARM64} {
		dir := filepath.Join(t.bin, arch)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if programs[arch], err = buildGuestProgram(ctx, dir, arch); err != nil {
			return err
		}
	}
	if err := t.hostCommands(ctx); err != nil {
		return err
	}
	if t.services[onHost], err = vm.Serve(ctx, nil, append(strings.Fields(threeVectors), "--quiet")...); err != nil {
		return err
	}
	var configs []vm.Config
	for _, m := range driverMachines {
		c := m.config
		c.Name, c.Progress = m.name, func(message string) { t.report.say("%s", message) }
		arch := c.Arch
		if arch == "" {
			arch = vm.AMD64
		}
		c.Files = map[string]string{"/bin/guestprog": programs[arch]}
		if m.igb {
			cache, err := fetch.Open(c.Progress)
			if err != nil {
				return err
			}
			if c.Files["/igb_uio.ko"], err = cache.IGBUIO(ctx, fetch.Trixie, arch); err != nil {
				return err
			}
		}
		if err := t.serve(ctx, m, &c); err != nil {
			return err
		}
		configs = append(configs, c)
	}
	t.report.say("booting %d guests", len(configs))
	guests, err := vm.StartAll(ctx, configs)
	if err != nil {
		return err
	}
	for i, m := range driverMachines {
		t.guests[m.name] = guests[i]
		if m.igb {
			if _, err := checks.Run(ctx, checks.Guest(guests[i]), "insmod", "/igb_uio.ko"); err != nil {
				return err
			}
		}
	}
	return nil
}

// serve starts the services of a machine, and adds their devices to it.
func (t *driverTable) serve(ctx context.Context, m driverMachine, c *vm.Config) error {
	links := m.links
	for _, other := range driverMachines {
		if other.name == m.peer {
			links = other.links
		}
	}
	for _, a := range slices.Sorted(maps.Keys(links)) {
		s := t.services[m.peer+a]
		if s == nil {
			var err error
			if s, err = vm.Serve(ctx, nil, append(strings.Fields(links[a]), "--quiet")...); err != nil {
				return err
			}
			t.services[m.name+a] = s
		}
		c.QEMU = slices.Concat(c.QEMU, s.QEMU)
		// 0000:00:0e.0 is 0e.0 in QEMU's words.
		c.Devices = append(c.Devices, vm.Device{Socket: s.Socket, Address: "0x" + strings.TrimPrefix(a, "0000:00:")})
	}
	return nil
}

// hostCommands puts what the host's processes run where ordinary users may
// run it, too.
func (t *driverTable) hostCommands(ctx context.Context) error {
	for _, name := range []string{"ivshctl", "ivsh-pingpong"} {
		from, err := vm.HostBinary(ctx, name)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(t.host(), name), content, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// host is the folder of this host's commands.
func (t *driverTable) host() string { return filepath.Join(t.bin, vm.AMD64) }

// row makes one row of the table. Failures are the report's.
func (t *driverTable) row(ctx context.Context, arch string, row driverRow) []string {
	cells := make([]string, len(checks.All))
	if row.absent != "" {
		for i := range cells {
			cells[i] = cellCannot + row.absent
		}
		return cells
	}
	t.report.say("%s, %s", row.name, arch)
	s, one, unusable := t.subjects(ctx, row)
	for i, c := range checks.All {
		subject := s
		if one != nil && (c.Name == "interrupt ping-pong" || c.Name == "one-shot") {
			subject = one
		}
		err := unusable
		if err == nil {
			cells[i], err = t.cell(ctx, c, subject, row)
		}
		if err != nil {
			t.mu.Lock()
			t.report.Failures = append(t.report.Failures, fmt.Sprintf("%s, %s, %s: %v", row.name, arch, c.Name, err))
			t.mu.Unlock()
			cells[i] = cellFailed
		}
	}
	return cells
}

// cell runs one check. What cannot work has to fail, and in the way that it
// is known to.
func (t *driverTable) cell(ctx context.Context, c checks.Check, s *checks.Subject, row driverRow) (string, error) {
	start := time.Now()
	err := c.Run(s, ctx)
	t.mu.Lock()
	t.report.sample(c.Name+"_s", time.Since(start).Seconds())
	t.mu.Unlock()
	no, known := row.cannot[c.Name]
	switch {
	case !known && err == nil:
		return cellPassed, nil
	case !known:
		return "", err
	case err == nil:
		return "", fmt.Errorf("it passed, although it cannot: %s", no.why)
	case !strings.Contains(err.Error(), no.says):
		return "", fmt.Errorf("expected it to fail with %q, found: %w", no.says, err)
	}
	return cellCannot + no.why, nil
}

// subjects binds the device of a row, and describes it; one is the device with
// one vector, nil if the row has none.
func (t *driverTable) subjects(ctx context.Context, row driverRow) (s, one *checks.Subject, err error) {
	if row.device == "" {
		s, err = t.process(ctx, row)
		return s, nil, err
	}
	if s, err = t.bound(ctx, row, row.device); err != nil || row.oneVector == "" {
		return s, nil, err
	}
	one, err = t.bound(ctx, row, row.oneVector)
	return s, one, err
}

func (t *driverTable) messages() int {
	if t.report.Quick {
		return 100
	}
	return 2000
}

// bound is a device in a guest.
func (t *driverTable) bound(ctx context.Context, row driverRow, device string) (*checks.Subject, error) {
	at := checks.Guest(t.guests[row.place])
	s := &checks.Subject{
		At: at, Device: device, Driver: row.driver, BackEnd: row.backEnd, Vectors: 3, Killed: row.killed,
		Peer: checks.Host(t.host()), PeerDevice: t.services[row.place+device].Socket, Messages: t.messages(),
	}
	if slices.Contains([]string{atOne, atINTx, atPin}, device) {
		s.Vectors = 1
	}
	s.InGuest(func(ctx context.Context, script string) error {
		_, err := checks.Run(ctx, at, "sh", "-ec", script)
		return err
	})
	bind := "ivshctl bind --driver " + row.driver + " " + device
	if row.driver == "" {
		// Back to none, whichever it had before.
		bind = "cd /sys/bus/pci/devices/" + device + "; [ ! -e driver ] || echo " + device + " >driver/unbind"
	}
	places := []checks.Place{at}
	if row.peer != "" {
		s.Peer, s.PeerDevice = checks.Guest(t.guests[row.peer]), device
		places = append(places, s.Peer)
	}
	for _, p := range places {
		if _, err := checks.Run(ctx, p, "sh", "-ec", bind); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// process is a process on a link's socket, on this host or in a guest.
func (t *driverTable) process(ctx context.Context, row driverRow) (*checks.Subject, error) {
	s := &checks.Subject{Driver: "vfio-user", BackEnd: row.backEnd, Vectors: 3, Messages: t.messages()}
	var end func()
	if row.place == onHost {
		service := t.services[onHost]
		s.At, s.Device, end = checks.Host(t.host()), service.Socket, func() { _ = service.Kill() }
		s.Prepare = func(context.Context) error {
			return errors.Join(os.Chmod(filepath.Dir(service.Socket), 0o755), os.Chmod(service.Socket, 0o666))
		}
		const nobody = 65534
		s.User = func(argv ...string) (checks.Place, []string) {
			if os.Geteuid() != 0 {
				return s.At, argv
			}
			return checks.HostUser(nobody, t.host()), argv
		}
	} else {
		s.At, s.Device = checks.Guest(t.guests[row.place]), "/tmp/link.sock"
		service, err := checks.Start(s.At, append([]string{"ivshctl", "serve", "--quiet", "--socket", s.Device}, strings.Fields(threeVectors)...)...)
		if err != nil {
			return nil, err
		}
		for line := ""; !strings.HasPrefix(line, "ready "); {
			if line, err = service.Line(ctx); err != nil {
				return nil, err
			}
		}
		end = service.Kill
		s.InGuest(func(ctx context.Context, script string) error {
			_, err := checks.Run(ctx, s.At, "sh", "-ec", script+"\nchmod 666 "+s.Device)
			return err
		})
	}
	if t.report.Sabotage {
		end()
	}
	s.Peer, s.PeerDevice = s.At, s.Device
	s.Removals = []checks.Removal{{Name: "service ended", Take: func(context.Context) error { end(); return nil }}}
	return s, nil
}
