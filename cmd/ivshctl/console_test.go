package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// terminal is a program with a terminal of its own, and its user.
type terminal struct {
	*testing.T
	cmd           *exec.Cmd
	master, slave *os.File
	before        unix.Termios

	mu     sync.Mutex
	screen bytes.Buffer
}

// inTerminal runs ivshctl in a terminal.
func inTerminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	return inTerminalTo(t, nil, args...)
}

// inTerminalTo is inTerminal with another standard output, unless that is nil.
func inTerminalTo(t *testing.T, out *os.File, args ...string) *terminal {
	t.Helper()
	x := &terminal{T: t, cmd: exec.Command("ivshctl", args...)}
	var err error
	if x.master, x.slave, err = pty.Open(); err != nil {
		t.Fatal(err)
	}
	if err := pty.Setsize(x.master, &pty.Winsize{Rows: 24, Cols: 80}); err != nil {
		t.Fatal(err)
	}
	x.before = x.modes()
	x.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = x.slave, x.slave, x.slave
	if out != nil {
		x.cmd.Stdout = out
	}
	x.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := x.master.Read(b)
			x.mu.Lock()
			x.screen.Write(b[:n])
			x.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		x.cmd.Process.Kill()
		x.cmd.Wait()
		x.slave.Close()
		x.master.Close()
	})
	return x
}

func (x *terminal) modes() unix.Termios {
	x.Helper()
	a, err := unix.IoctlGetTermios(int(x.slave.Fd()), unix.TCGETS)
	if err != nil {
		x.Fatal(err)
	}
	return *a
}

func (x *terminal) shows(s string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return strings.Contains(x.screen.String(), s)
}

func (x *terminal) text() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.screen.String()
}

func (x *terminal) until(what string, f func() bool) {
	x.Helper()
	for end := time.Now().Add(60 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			x.Fatalf("never: %s; the screen shows %q", what, x.text())
		}
	}
}

// raw waits until the terminal passes every key on.
func (x *terminal) raw() {
	x.Helper()
	x.until("raw mode", func() bool { return x.modes().Lflag&(unix.ECHO|unix.ICANON|unix.ISIG) == 0 })
}

func (x *terminal) keys(s string) {
	x.Helper()
	if _, err := io.WriteString(x.master, s); err != nil {
		x.Fatal(err)
	}
}

// ended waits for the end with an exit code, and looks at the terminal.
func (x *terminal) ended(code int) {
	x.Helper()
	late := time.AfterFunc(30*time.Second, func() {
		x.cmd.Process.Signal(unix.SIGABRT) // tells where it hangs
	})
	defer late.Stop()
	err := x.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		x.Fatal(err)
	}
	if got := x.cmd.ProcessState.ExitCode(); got != code {
		x.Errorf("exit code %d, want %d; the screen shows %q", got, code, x.text())
	}
	if x.modes() != x.before {
		x.Error("the terminal is not as it was")
	}
}

// consoleLink is a link whose other end is in this process.
type consoleLink struct {
	*testing.T
	path string
	ctx  context.Context
}

func newConsoleLink(t *testing.T) *consoleLink {
	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	t.Cleanup(cancel)
	return &consoleLink{t, ivshmemtest.Serve(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8003, ReadWrite: 1 << 20}), ctx}
}

func (l *consoleLink) open(id uint32) *ivshmem.Device {
	l.Helper()
	for {
		d, err := ivshmem.Open(l.path)
		if err != nil {
			l.Fatal(err)
		}
		if d.ID() == id {
			l.Cleanup(func() { d.Close() })
			return d
		}
		d.Close() // the program is not there yet
	}
}

// device is the device's side, with a console and a plain port, both open; stop
// ends it.
func (l *consoleLink) device() (d *console.Device, con, log *console.Port, stop func()) {
	l.Helper()
	d, err := console.NewDevice(l.open(0), console.Config{})
	if err != nil {
		l.Fatal(err)
	}
	for _, p := range []struct {
		p **console.Port
		c console.PortConfig
	}{{&con, console.PortConfig{Name: "con", Console: true}}, {&log, console.PortConfig{Name: "log"}}} {
		if *p.p, err = d.AddPort(p.c); err == nil {
			err = (*p.p).Open()
		}
		if err != nil {
			l.Fatal(err)
		}
	}
	return d, con, log, l.serve(d.Serve)
}

// serve lets a device serve until stop, or the end of the test.
func (l *consoleLink) serve(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(l.ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f(ctx)
	}()
	stop = func() {
		cancel()
		<-ended
	}
	l.Cleanup(stop)
	return stop
}

// driver is the port "con" at the other end, open.
func (l *consoleLink) driver() *console.Port {
	l.Helper()
	d, err := console.Open(l.ctx, l.open(1), console.Config{})
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { d.Close() })
	p, err := d.WaitPort(l.ctx, "con")
	if err == nil {
		err = p.Open()
	}
	if err != nil {
		l.Fatal(err)
	}
	return p
}

func (l *consoleLink) say(p *console.Port, s string) {
	l.Helper()
	if err := p.WaitOpen(l.ctx); err != nil {
		l.Fatal(err)
	}
	if _, err := p.WriteAll(l.ctx, []byte(s)); err != nil {
		l.Fatal(err)
	}
}

// prompt waits until the program has heard that the port is open: keys before
// that are for nobody.
func (l *consoleLink) prompt(x *terminal, p *console.Port) {
	l.Helper()
	l.say(p, "login: ")
	x.until("the prompt", func() bool { return x.shows("login: ") })
}

func (l *consoleLink) hear(p *console.Port, want string) {
	l.Helper()
	if err := p.WaitOpen(l.ctx); err != nil {
		l.Fatal(err)
	}
	b := make([]byte, len(want))
	if n, err := io.ReadFull(p, b); string(b) != want {
		l.Fatalf("got %q, %v; want %q", b[:n], err, want)
	}
}

// Every way out leaves the terminal as it was.
func TestConsoleLeaves(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(*terminal, *consoleLink, *console.Device, *console.Port, func())
		code int
	}{
		{"escape", func(x *terminal, _ *consoleLink, _ *console.Device, _ *console.Port, _ func()) { x.keys("\x1d") }, 0},
		{"SIGINT", func(x *terminal, _ *consoleLink, _ *console.Device, _ *console.Port, _ func()) {
			x.cmd.Process.Signal(unix.SIGINT)
		}, 0},
		{"SIGTERM", func(x *terminal, _ *consoleLink, _ *console.Device, _ *console.Port, _ func()) {
			x.cmd.Process.Signal(unix.SIGTERM)
		}, 0},
		{"SIGHUP", func(x *terminal, _ *consoleLink, _ *console.Device, _ *console.Port, _ func()) {
			x.cmd.Process.Signal(unix.SIGHUP)
		}, 1},
		{"SIGQUIT", func(x *terminal, _ *consoleLink, _ *console.Device, _ *console.Port, _ func()) {
			x.cmd.Process.Signal(unix.SIGQUIT)
		}, 1},
		{"the device leaves", func(_ *terminal, _ *consoleLink, _ *console.Device, _ *console.Port, stop func()) { stop() }, exitGone},
		{"the port is removed", func(_ *terminal, _ *consoleLink, d *console.Device, p *console.Port, _ func()) { d.RemovePort(p) }, 1},
		{"escape, and nobody reads", func(x *terminal, l *consoleLink, _ *console.Device, _ *console.Port, _ func()) {
			for range 300 { // more than the port, and its limit, hold
				x.keys(strings.Repeat("x", 2000))
			}
			x.keys("\x1d")
		}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newConsoleLink(t)
			d, con, _, stop := l.device()
			x := inTerminal(t, "console", "-d", l.path)
			x.raw()
			l.prompt(x, con)
			c.do(x, l, d, con, stop)
			x.ended(c.code)
		})
	}
}

// The escape key works while nobody is at the other end.
func TestConsoleLeavesNobody(t *testing.T) {
	t.Parallel()
	l := newConsoleLink(t)
	x := inTerminal(t, "console", "-d", l.path)
	x.raw()
	x.keys("x\x1d")
	x.ended(0)
}

// All keys but the escape key go to the other side.
func TestConsoleKeys(t *testing.T) {
	t.Parallel()
	l := newConsoleLink(t)
	_, con, log, _ := l.device()
	all := "\x00\x03\x04\x11\x13\x1a\x1b[A\r\n\x7f"
	x := inTerminal(t, "console", "-d", l.path)
	x.raw()
	x.until("the key", func() bool { return x.shows(": ^] leaves") })
	l.prompt(x, con)
	x.keys(all)
	l.hear(con, all)
	x.keys("last")
	l.hear(con, "last")
	x.keys("\x1dnot this")
	x.ended(0)
	con.Wait(l.ctx, console.HangUp)
	if n := con.Unread(); n > 0 {
		t.Errorf("%d bytes from behind the escape key", n)
	}
	// Another key, and another port.
	x = inTerminal(t, "console", "-d", l.path, "--escape", "^A", "log")
	x.raw()
	l.prompt(x, log)
	x.keys("\x1d")
	l.hear(log, "\x1d")
	x.keys("\x01")
	x.ended(0)
	x = inTerminal(t, "console", "-d", l.path, "--escape", "none", "log")
	x.raw()
	l.prompt(x, log)
	x.keys("\x01\x1d")
	l.hear(log, "\x01\x1d")
	x.cmd.Process.Signal(unix.SIGTERM)
	x.ended(0)
}

// At the device's end the driver comes and goes, and learns the window's size.
func TestConsoleOfDevice(t *testing.T) {
	t.Parallel()
	l := newConsoleLink(t)
	x := inTerminal(t, "console", "-d", l.path)
	x.raw()
	dev := l.open(1)
	for _, text := range []string{"first boot", "second boot"} {
		d, err := console.Open(l.ctx, dev, console.Config{})
		if err != nil {
			t.Fatal(err)
		}
		p := d.Port(0)
		if err := p.Open(); err != nil {
			t.Fatal(err)
		}
		l.say(p, text)
		x.until(text, func() bool { return x.shows(text) })
		x.keys("root\r")
		l.hear(p, "root\r")
		x.until("the size", func() bool { return p.Size() == console.Size{Cols: 80, Rows: 24} })
		if err := pty.Setsize(x.master, &pty.Winsize{Rows: 50, Cols: 132}); err != nil {
			t.Fatal(err)
		}
		x.until("the new size", func() bool { return p.Size() == console.Size{Cols: 132, Rows: 50} })
		if err := pty.Setsize(x.master, &pty.Winsize{Rows: 24, Cols: 80}); err != nil {
			t.Fatal(err)
		}
		x.until("the old size", func() bool { return p.Size() == console.Size{Cols: 80, Rows: 24} })
		d.Close()
	}
	x.keys("\x1d")
	x.ended(0)
}

// In place of the terminal: one for others, or a socket.
func TestConsoleForOthers(t *testing.T) {
	t.Parallel()
	l := newConsoleLink(t)
	_, con, _, _ := l.device()
	dir, err := os.MkdirTemp("", "ivshctl")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "x")
	for _, c := range []struct {
		args []string
		open func() (io.ReadWriteCloser, error)
	}{
		{[]string{"--pty", "--link", path}, func() (io.ReadWriteCloser, error) { return os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0) }},
		{[]string{"--socket", path}, func() (io.ReadWriteCloser, error) { return net.Dial("unix", path) }},
	} {
		x := inTerminal(t, append([]string{"console", "-d", l.path}, c.args...)...)
		x.until("ready", func() bool { return x.shows("ready " + path) })
		f, err := c.open()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(f, "typed")
		l.hear(con, "typed")
		l.say(con, "shown")
		b := make([]byte, 5)
		if _, err := io.ReadFull(f, b); string(b) != "shown" {
			t.Errorf("%q, %v", b, err)
		}
		f.Close()
		x.cmd.Process.Signal(unix.SIGTERM)
		x.ended(0)
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
}

// `ports attach` is the same terminal, and the size goes by way of the service.
func TestAttachTerminal(t *testing.T) {
	for _, form := range []string{"socket", "pty"} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			attachTerminal(t, form)
		})
	}
}

func attachTerminal(t *testing.T, form string) {
	l := newConsoleLink(t)
	dir, err := os.MkdirTemp("", "ivshctl")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	service := inTerminal(t, "ports", "serve", "-d", l.path, "--dir", dir, "--port", "con,console,as="+form)
	service.until("ready", func() bool { return service.shows("ready") })
	p := l.driver()
	x := inTerminal(t, "ports", "attach", "--dir", dir, "con")
	x.raw()
	l.say(p, "login: ")
	x.until("the prompt", func() bool { return x.shows("login: ") })
	x.keys("\x03root\r")
	l.hear(p, "\x03root\r")
	if err := pty.Setsize(x.master, &pty.Winsize{Rows: 50, Cols: 132}); err != nil {
		t.Fatal(err)
	}
	x.until("the size", func() bool { return p.Size() == console.Size{Cols: 132, Rows: 50} })
	x.keys("\x1d")
	x.ended(0)
	// The end of file ends it, too.
	x = inTerminal(t, "ports", "attach", "--dir", dir, "con")
	x.raw()
	l.say(p, "bye")
	x.until("the text", func() bool { return x.shows("bye") })
	p.Close()
	x.ended(0)
}

// What is typed while nobody is there is for nobody, and nothing waits for it.
func TestTypedToNobody(t *testing.T) {
	t.Parallel()
	l := newConsoleLink(t)
	_, con, _, _ := l.device()
	con.Close()
	open, err := openLine(l.ctx, con)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := open.Write([]byte("x")); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	p := l.driver()
	l.say(con, "y")
	l.hear(p, "y")
}

// slowLine takes its time to be written to.
type slowLine struct {
	io.ReadWriteCloser
	got []byte
}

func (l *slowLine) Write(b []byte) (int, error) {
	time.Sleep(50 * time.Millisecond)
	l.got = append(l.got, b...)
	return len(b), nil
}

// What was typed before the escape key is written before the end.
func TestEscapeIsLast(t *testing.T) {
	l := &slowLine{}
	s := &session{program: &program{out: io.Discard}, line: &line{ReadWriteCloser: l}, escape: 0x1d}
	if err := s.keys(context.Background(), strings.NewReader("last\x1dnot this")); err != errEscape {
		t.Error(err)
	}
	if string(l.got) != "last" {
		t.Errorf("%q", l.got)
	}
}

// A panic in one of a session's goroutines restores the terminal, too.
func TestPanicRestores(t *testing.T) {
	restored := false
	s := &session{restore: func() { restored = true }}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic is gone")
			}
		}()
		defer s.repair()
		panic("x")
	}()
	if !restored {
		t.Error("not restored")
	}
}

func TestParseEscape(t *testing.T) {
	for s, want := range map[string]int{"^]": 0x1d, "^A": 1, "^a": 1, "^?": 0x7f, "^@": 0, "^_": 0x1f, "~": '~', "^": '^', "none": -1} {
		if got, err := parseEscape(s); err != nil || got != want {
			t.Errorf("%q: %#x, %v, want %#x", s, got, err, want)
		}
	}
	for _, s := range []string{"", "^5", "^^^", "ab", "nil"} {
		if got, err := parseEscape(s); err == nil {
			t.Errorf("%q: %#x", s, got)
		}
	}
}
