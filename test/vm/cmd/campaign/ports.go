package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// Wires, as --wire has them.
const (
	multiport = "multiport"
	single    = "single"
	original  = "original"
)

const (
	portsDir = "/run/ports"
	// Ports by what they are for. All others keep unread data.
	plainPort   = "org.example.a" // drops unread data
	limitedPort = "org.example.b" // 8 KiB of unread data
	cachedPort  = "org.example.c"
	manyPorts   = 12 // there may be
	limitedSize = 8 << 10
)

// portNames are the 8 named ports.
var portNames = []string{plainPort, limitedPort, cachedPort, "org.example.d", "org.example.e", "org.example.f", "org.example.g", "org.example.h"}

// portPair is two guests on one link: guest 0 is the console's device, guest 1 its
// driver.
type portPair struct {
	ctx     context.Context
	r       *Report
	service *vm.Service
	guests  []*vm.Guest
	wire    string
	sides   [2]*talker // `ivshctl ports serve`, or a program that took its place

	dev, drv *talker // programs that make system calls
	err      error   // the first one; nothing is done after it
}

// namedPorts has two guests use the ports of a console between them: every row of
// the table in docs/console.md on every wire, data through all ports at once,
// and services that are killed.
func namedPorts(ctx context.Context, r *Report) error {
	begin := time.Now()
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	p, err := startPorts(ctx, r, dir)
	if err != nil {
		return err
	}
	defer p.close()
	r.info("seconds to build and boot", time.Since(begin).Seconds())
	var failed error
	if !r.Sabotage {
		failed = p.rows()
	}
	if failed == nil {
		failed = errors.Join(p.load(), p.kills())
	}
	if failed == nil {
		for i := range p.guests {
			p.sh(i, "! dmesg | grep -E 'WARNING:|BUG:|Oops|Call Trace|nobody cared'")
		}
		failed = p.err
	}
	r.info("seconds in all", time.Since(begin).Seconds())
	return failed
}

func startPorts(ctx context.Context, r *Report, dir string) (*portPair, error) {
	program, err := buildGuestProgram(ctx, dir, vm.AMD64)
	if err != nil {
		return nil, err
	}
	service, err := vm.Serve(ctx, nil, "--protocol", "0x8003", "--peers", "2", "--vectors", "3", "--rw", "4M", "--output", "0", "--quiet")
	if err != nil {
		return nil, err
	}
	config := vm.Config{
		// Behind a root port the kernel resets the device of a process that was
		// killed, so that the other side sees it go.
		Driver: "vfio-pci", Devices: []vm.Device{{Socket: service.Socket, RootPort: true}}, Modules: []string{"cuse"},
		Files: map[string]string{"/bin/guestprog": program}, Progress: func(s string) { r.say("%s", s) },
	}
	configs := []vm.Config{config, config}
	configs[0].Name, configs[1].Name = "guest0", "guest1"
	r.say("booting 2 guests")
	guests, err := vm.StartAll(ctx, configs)
	if err != nil {
		service.Close()
		return nil, err
	}
	return &portPair{ctx: ctx, r: r, service: service, guests: guests}, nil
}

func (p *portPair) close() {
	for _, g := range p.guests {
		g.Close()
	}
	p.service.Close()
}

// fail keeps the first error.
func (p *portPair) fail(err error) {
	if p.err == nil {
		p.err = err
	}
}

func (p *portPair) failf(format string, args ...any) { p.fail(fmt.Errorf(format, args...)) }

func (p *portPair) patience() time.Duration {
	if p.r.Sabotage {
		return patience / 3
	}
	return 2 * patience
}

// wait bounds a single wait.
func (p *portPair) wait() (context.Context, context.CancelFunc) {
	return context.WithTimeout(p.ctx, p.patience())
}

// sh runs a script in a guest.
func (p *portPair) sh(i int, script string) string {
	if p.err != nil {
		return ""
	}
	ctx, cancel := p.wait()
	defer cancel()
	out, err := guestShell(ctx, p.guests[i], script)
	if err != nil {
		p.fail(err)
	}
	return out
}

// portStatus is what the list of ports says.
type portStatus struct {
	Name     string
	Number   uint32
	Console  bool
	OpenHere bool `json:"open_here"`
	Unread   int
	Path     string
}

// list asks a service for its ports.
func (p *portPair) list(i int) map[string]portStatus {
	all := map[string]portStatus{}
	out := p.sh(i, "ivshctl ports list --json --dir "+portsDir)
	if p.err != nil {
		return all
	}
	var list []portStatus
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		p.failf("guest %d: list of ports: %w: %s", i, err, out)
	}
	for _, s := range list {
		all[filepath.Base(s.Path)] = s
	}
	return all
}

// options are those of `ivshctl ports serve`, and which ports there are. The
// consoles of the device's side are pseudo-terminals, as a window has its size
// there, and one of the driver's side is, too.
func (p *portPair) options(i int) (options, names []string) {
	if p.wire == single {
		if i == 0 {
			return []string{"--port", "con0,console,as=char,cache,limit=8K"}, []string{"con0"}
		}
		return []string{"--port", "*,as=char,cache,limit=8K"}, []string{"port-0"}
	}
	names = append([]string{"con0", "con1"}, portNames...)
	for _, name := range names {
		spec := name
		switch {
		case strings.HasPrefix(name, "con"):
			if i == 0 {
				spec += ",console"
			}
			if i == 0 || name == "con0" {
				spec += ",as=pty"
			} else {
				spec += ",as=char"
			}
		case name == plainPort:
			spec += ",as=char"
		case name == limitedPort:
			spec += ",as=char,limit=8K"
		case p.r.Sabotage:
			spec += ",as=char"
		default:
			spec += ",as=char,cache"
		}
		options = append(options, "--port", spec)
	}
	if i == 0 {
		options = append(options, "--max-ports", fmt.Sprint(manyPorts))
	}
	return append(options, "--port", "*,as=char"), names
}

// serve starts `ivshctl ports serve`, and waits until all ports can be opened.
func (p *portPair) serve(i int) {
	p.begin(i)
	p.ready(i)
}

// ready waits for that. A port of the driver's side may have no name at first.
func (p *portPair) ready(i int) {
	_, names := p.options(i)
	missing := map[string]bool{}
	for _, name := range names {
		missing[path.Join(portsDir, name)] = true
	}
	for len(missing) > 0 && p.err == nil {
		line := p.sides[i].line()
		if name, ok := strings.CutPrefix(line, "ready "); ok {
			delete(missing, name)
		}
	}
}

// begin starts it.
func (p *portPair) begin(i int) {
	options, _ := p.options(i)
	p.sides[i] = p.talk(i, append([]string{"ivshctl", "ports", "serve", "--dir", portsDir, "--wire", p.wire}, options...)...)
}

// both starts both sides.
func (p *portPair) both() {
	p.begin(0) // the driver takes its time to find the device
	p.serve(1)
	if p.dev == nil {
		p.dev, p.drv = p.talk(0, "guestprog", "char-drive"), p.talk(1, "guestprog", "char-drive")
	}
	p.ready(0)
}

// end ends a side with a signal.
func (p *portPair) end(i int, s unix.Signal) {
	if p.err != nil {
		return
	}
	want := 0
	if s == unix.SIGKILL {
		want = 128 + int(s)
	}
	if err := p.sides[i].Signal(s); err != nil {
		p.fail(err)
		return
	}
	p.sides[i].end(want)
}

// program takes the place of a side that has ended with a program that has the
// package's calls.
func (p *portPair) program(i int) *talker {
	argv := []string{"guestprog", "port-side", "-wire", p.wire}
	if i == 0 {
		_, names := p.options(0)
		argv = append(argv, "-ports", strings.Join(names, ","))
	}
	p.sides[i] = p.talk(i, argv...)
	if line := p.sides[i].line(); p.err == nil && line != "ready" {
		p.failf("guest %d: %q", i, line)
	}
	return p.sides[i]
}

// featureTable is the table of docs/console.md: its features.
func featureTable() ([]string, error) {
	text, err := os.ReadFile(os.Getenv("IVSHMEM_SOURCE") + "/docs/console.md")
	if err != nil {
		return nil, err
	}
	_, table, found := strings.Cut(string(text), "| feature | Multiport | Single | Original | test |\n| --- | --- | --- | --- | --- |\n")
	if !found {
		return nil, errors.New("docs/console.md: the table of features was not found")
	}
	var features []string
	for line := range strings.Lines(table) {
		if !strings.HasPrefix(line, "| ") {
			break
		}
		features = append(features, strings.TrimSpace(strings.Split(line, "|")[1]))
	}
	return features, nil
}

// rows checks every row of the table on every wire. The multiport wire is the
// last one, and its device stays.
func (p *portPair) rows() error {
	features, err := featureTable()
	if err != nil {
		return err
	}
	table := Table{Title: "The rows of docs/console.md between two guests, through character devices", Head: []string{"feature", multiport, single, original}}
	found := map[string]string{}
	for _, p.wire = range []string{single, original, multiport} {
		begin := time.Now()
		p.both()
		for _, row := range portRows {
			p.r.say("%s: %s", p.wire, row.feature)
			if !slices.Contains(features, row.feature) {
				return fmt.Errorf("docs/console.md has no row %q", row.feature)
			}
			text := row.check(p)
			if p.err != nil {
				return fmt.Errorf("%s wire: %s: %w%s", p.wire, row.feature, p.err, p.said())
			}
			found[row.feature+p.wire] += text
		}
		p.sides[1].quit()
		if p.wire != multiport {
			p.end(0, unix.SIGINT)
		}
		p.r.sample("seconds of the rows, "+p.wire, time.Since(begin).Seconds())
	}
	for _, f := range features {
		table.Rows = append(table.Rows, []string{f, found[f+multiport], found[f+single], found[f+original]})
	}
	p.r.Tables = append(p.r.Tables, table)
	p.r.atLeast("rows of docs/console.md, on 3 wires", float64(len(found)), float64(3*len(features)))
	return p.err
}

// said is what the services had to say.
func (p *portPair) said() (text string) {
	for i, side := range p.sides {
		if side != nil && side.stderr.text() != "" {
			text += fmt.Sprintf("\nguest %d: %s", i, side.stderr.text())
		}
	}
	return text
}
