// Package suite has the tests of the toolkit in real guests: stock kernels in
// a stock QEMU, with the project's own commands as users run them.
package suite

import (
	"bytes"
	"context"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// limit bounds each wait: a guest under emulation on a busy machine is slow,
// but not that slow.
const limit = 2 * time.Minute

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// serve starts a link's service for the test.
func serve(t *testing.T, options ...string) *vm.Service {
	t.Helper()
	var log bytes.Buffer
	s, err := vm.Serve(t.Context(), &log, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		if t.Failed() {
			t.Logf("log of the service:\n%s", log.String())
		}
	})
	return s
}

// guests boots guests on a link, in the order of their peer IDs.
func guests(t *testing.T, s *vm.Service, configs ...vm.Config) []*vm.Guest {
	t.Helper()
	for i := range configs {
		if configs[i].Devices == nil {
			configs[i].Devices = []vm.Device{{Socket: s.Socket}}
		}
	}
	return vm.NewAll(t, configs)
}

// run runs a command in a guest and returns what it printed.
func run(t *testing.T, g *vm.Guest, want int, argv ...string) string {
	t.Helper()
	r, err := g.Run(deadline(t), argv...)
	if err != nil {
		t.Fatalf("%s: %q: %v", g.Name(), argv, err)
	}
	if r.ExitCode() != want {
		t.Fatalf("%s: %q: %v, want exit status %d\n%s%s", g.Name(), argv, r.Status, want, r.Stdout, r.Stderr)
	}
	return string(r.Stdout) + string(r.Stderr)
}

// process is a command that runs in a guest while the test goes on.
type process struct {
	*vm.Process
	t      *testing.T
	name   string
	out    *lines
	stderr bytes.Buffer
}

func start(t *testing.T, g *vm.Guest, argv ...string) *process {
	t.Helper()
	p := &process{t: t, name: strings.Join(argv, " "), out: newLines()}
	var err error
	if p.Process, err = g.Exec(vm.Command{Argv: argv, Stdout: p.out, Stderr: &p.stderr}); err != nil {
		t.Fatalf("%s: %s: %v", g.Name(), p.name, err)
	}
	return p
}

// line waits for the next line of output.
func (p *process) line() string {
	p.t.Helper()
	select {
	case l := <-p.out.c:
		return l
	case <-p.Done():
		select {
		case l := <-p.out.c:
			return l
		default:
		}
		p.t.Fatalf("%s ended without another line: %s", p.name, p.stderr.String())
	case <-time.After(limit):
		p.t.Fatalf("%s printed no line in %v", p.name, limit)
	}
	return ""
}

// end waits for the end and checks the exit status.
func (p *process) end(want int) {
	p.t.Helper()
	st, err := p.Wait(deadline(p.t))
	if err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
	if st.ExitCode() != want {
		p.t.Fatalf("%s: %v, want exit status %d: %s", p.name, st, want, p.stderr.String())
	}
}

// lines takes output apart.
type lines struct {
	c    chan string
	rest string
}

func newLines() *lines { return &lines{c: make(chan string, 1024)} }

func (l *lines) Write(b []byte) (int, error) {
	l.rest += string(b)
	for {
		line, rest, ok := strings.Cut(l.rest, "\n")
		if !ok {
			return len(b), nil
		}
		l.rest = rest
		l.c <- line
	}
}

// onHost runs a command of this source on the host, by name.
func onHost(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := vm.HostBinary(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return exec.CommandContext(deadline(t), path, args...)
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	return v
}
