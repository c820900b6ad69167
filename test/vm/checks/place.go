// Package checks has what every way to the device has to be able to do, as
// checks of real commands that tests and campaigns share.
package checks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// Patience bounds each single wait: a guest under emulation on a busy machine
// is slow, but not that slow.
const Patience = time.Minute

// Place is where commands run: a guest, or this host.
type Place interface {
	start(argv []string, stdout, stderr io.Writer) (running, error)
}

type running interface {
	Signal(syscall.Signal) error
	Done() <-chan struct{}
	Wait(ctx context.Context) (vm.Status, error)
}

// Guest is a guest as a place.
func Guest(g *vm.Guest) Place { return guest{g} }

type guest struct{ *vm.Guest }

func (g guest) start(argv []string, stdout, stderr io.Writer) (running, error) {
	return g.Exec(vm.Command{Argv: argv, Stdout: stdout, Stderr: stderr})
}

// Host is this host, with commands from folders.
func Host(folders ...string) Place { return host{folders, 0} }

// HostUser is the host as an ordinary user sees it, for a process that is root.
func HostUser(uid uint32, folders ...string) Place { return host{folders, uid} }

type host struct {
	folders []string
	uid     uint32 // 0: that of this process
}

func (h host) start(argv []string, stdout, stderr io.Writer) (running, error) {
	path := argv[0]
	for _, f := range h.folders {
		if found, err := exec.LookPath(filepath.Join(f, argv[0])); err == nil {
			path = found
		}
	}
	cmd := exec.Command(path, argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", stdout, stderr
	if h.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.uid, Gid: h.uid}}
	}
	c, err := vm.StartChild(cmd)
	if err != nil {
		return nil, err
	}
	return child{c}, nil
}

type child struct{ *vm.Child }

func (c child) Signal(s syscall.Signal) error { c.Child.Signal(s); return nil }

func (c child) Wait(ctx context.Context) (vm.Status, error) {
	select {
	case <-c.Done():
	case <-ctx.Done():
		_ = c.Kill()
		return vm.Status{Signal: syscall.SIGKILL}, ctx.Err()
	}
	var e *exec.ExitError
	if err := c.Kill(); !errors.As(err, &e) {
		return vm.Status{}, err
	}
	s := e.Sys().(syscall.WaitStatus)
	if s.Signaled() {
		return vm.Status{Signal: s.Signal()}, nil
	}
	return vm.Status{Code: s.ExitStatus()}, nil
}

// Process is a command that runs in a place.
type Process struct {
	running
	name   string
	lines  chan string
	rest   string
	stderr buffer
}

// Start starts a command.
func Start(p Place, argv ...string) (*Process, error) {
	c := &Process{name: strings.Join(argv, " "), lines: make(chan string, 1<<16)}
	var err error
	if c.running, err = p.start(argv, c, &c.stderr); err != nil {
		return nil, fmt.Errorf("%s: %w", c.name, err)
	}
	return c, nil
}

// Write implements io.Writer for the command's output.
func (p *Process) Write(b []byte) (int, error) {
	p.rest += string(b)
	for {
		line, rest, ok := strings.Cut(p.rest, "\n")
		if !ok {
			return len(b), nil
		}
		p.rest = rest
		p.lines <- line
	}
}

// Line waits for the next line of output.
func (p *Process) Line(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	select {
	case l := <-p.lines:
		return l, nil
	case <-p.Done():
	case <-ctx.Done():
		return "", fmt.Errorf("%s: no output: %w: %s", p.name, ctx.Err(), p.Stderr())
	}
	select { // it may have been the last one
	case l := <-p.lines:
		return l, nil
	default:
		return "", fmt.Errorf("%s: ended without another line: %s", p.name, p.Stderr())
	}
}

// Stderr is what the command has written there so far.
func (p *Process) Stderr() string { return strings.TrimSpace(p.stderr.String()) }

// End waits for the end of the command, and checks its exit status.
func (p *Process) End(ctx context.Context, want int) error {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	st, err := p.Wait(ctx)
	if err == nil && st.ExitCode() != want {
		err = fmt.Errorf("%v, expected exit status %d", st, want)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", p.name, err, p.Stderr())
	}
	return nil
}

// Kill ends the command, if it runs, and waits until it is gone: what it held
// may be needed again.
func (p *Process) Kill() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _ = p.Wait(ctx)
}

// Result waits for the end of the command, which has to succeed, and decodes
// the next line that it printed.
func (p *Process) Result(ctx context.Context, v any) error {
	if err := p.End(ctx, 0); err != nil {
		return err
	}
	line, err := p.Line(ctx)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(line), v)
}

// Run runs a command that has to succeed, and returns what it printed.
func Run(ctx context.Context, p Place, argv ...string) (string, error) {
	c, err := Start(p, argv...)
	if err != nil {
		return "", err
	}
	if err := c.End(ctx, 0); err != nil {
		return "", err
	}
	var out strings.Builder
	for len(c.lines) > 0 {
		out.WriteString(<-c.lines + "\n")
	}
	return out.String() + c.rest, nil
}

// buffer is one that is read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
