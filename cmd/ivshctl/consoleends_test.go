package main

import (
	"context"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// pipe is a pipe of one page.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err == nil {
		_, err = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, os.Getpagesize())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	return r, w
}

// shell is a program at a terminal with standard output elsewhere, and the port
// at the other end.
type shell struct {
	*terminal
	link *consoleLink
	port *console.Port
}

// shells are `console` and `ports attach`.
var shells = map[string]func(*testing.T, *os.File) shell{
	"console": func(t *testing.T, out *os.File) shell {
		l := newConsoleLink(t)
		_, con, _, _ := l.device()
		return shell{inTerminalTo(t, out, "console", "-d", l.path), l, con}
	},
	"attach": func(t *testing.T, out *os.File) shell {
		l := newConsoleLink(t)
		dir := shortDir(t)
		service := inTerminal(t, "ports", "serve", "-d", l.path, "--dir", dir, "--port", "con,console")
		service.until("ready", func() bool { return service.shows("ready") })
		p := l.driver()
		return shell{inTerminalTo(t, out, "ports", "attach", "--dir", dir, "con"), l, p}
	},
}

// shortDir is a directory for sockets: the names of others are too long.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ivshctl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Who reads standard output may leave: `ivshctl console | head`.
func TestOutputCloses(t *testing.T) {
	for name, start := range shells {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, w := pipe(t)
			x := start(t, w)
			w.Close()
			x.raw()
			x.link.say(x.port, "shown")
			b := make([]byte, 5)
			if _, err := io.ReadFull(r, b); string(b) != "shown" {
				t.Fatalf("%q, %v", b, err)
			}
			r.Close()
			x.link.say(x.port, "for nobody")
			x.ended(exitFailed)
			x.until("the reason", func() bool { return x.shows("broken pipe") })
		})
	}
}

// Every way out works while standard output takes nothing.
func TestOutputStops(t *testing.T) {
	for name, start := range shells {
		for what, end := range map[string]struct {
			do   func(shell)
			code int
		}{
			"escape":  {func(x shell) { x.keys("\x1d") }, 0},
			"SIGTERM": {func(x shell) { x.cmd.Process.Signal(unix.SIGTERM) }, 0},
			"SIGHUP":  {func(x shell) { x.cmd.Process.Signal(unix.SIGHUP) }, exitFailed},
		} {
			t.Run(name+" "+what, func(t *testing.T) {
				t.Parallel()
				r, w := pipe(t)
				x := start(t, w)
				x.raw()
				ctx, cancel := context.WithCancel(x.link.ctx)
				wrote := make(chan struct{})
				go func() {
					defer close(wrote)
					if x.port.WaitOpen(ctx) == nil {
						x.port.WriteAll(ctx, make([]byte, 1<<20))
					}
				}()
				defer func() {
					cancel()
					<-wrote
				}()
				x.until("a full pipe", func() bool {
					n, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
					return err == nil && n == os.Getpagesize()
				})
				end.do(x)
				x.ended(end.code)
			})
		}
	}
}

// pieces are read one by one.
type pieces []string

func (p *pieces) Read(b []byte) (int, error) {
	if len(*p) == 0 {
		select {} // a terminal has no end
	}
	n := copy(b, (*p)[0])
	*p = (*p)[1:]
	return n, nil
}

// stopped takes nothing.
type stopped struct{ io.ReadWriteCloser }

func (stopped) Write([]byte) (int, error) { select {} }

// The escape key works while neither the line nor the bell's terminal takes
// anything.
func TestEscapeWhileStopped(t *testing.T) {
	t.Parallel()
	s := &session{program: &program{out: stopped{}}, line: &line{ReadWriteCloser: stopped{}}, escape: 0x1d}
	typedText := append(pieces(strings.Split(strings.Repeat("x", 2*typed), "")), "\x1d")
	if err := s.keys(context.Background(), &typedText); err != errEscape {
		t.Error(err)
	}
}

// What is typed before the escape key goes out, also if the port has to keep it
// first, at both ends of a link.
func TestLastWordsArrive(t *testing.T) {
	last := strings.Repeat("a line\r", 8000) + "poweroff\r"
	// type types all of that and the escape key. What the other side has not read
	// leaves no room for the rest at first.
	typeLast := func(l *consoleLink, x *terminal, p *console.Port) {
		l.Helper()
		l.prompt(x, p)
		if err := p.SetLimit(1); err != nil {
			l.Fatal(err)
		}
		x.keys(last + "\x1d")
		x.until("the keys are taken", func() bool {
			n, err := unix.IoctlGetInt(int(x.slave.Fd()), unix.TIOCINQ)
			return err == nil && n == 0
		})
		if err := p.SetLimit(1 << 20); err != nil {
			l.Fatal(err)
		}
	}
	t.Run("driver", func(t *testing.T) {
		t.Parallel()
		l := newConsoleLink(t)
		_, _, log, _ := l.device()
		x := inTerminal(t, "console", "-d", l.path, "log")
		x.raw()
		typeLast(l, x, log)
		b := make([]byte, len(last))
		if n, err := io.ReadFull(log, b); string(b) != last {
			t.Errorf("%d bytes, %v; want %d", n, err, len(last))
		}
		x.ended(0)
	})
	t.Run("device", func(t *testing.T) {
		t.Parallel()
		l := newConsoleLink(t)
		l.path = ivshmemtest.Serve(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8003, ReadWrite: 64 << 10})
		x := inTerminal(t, "console", "-d", l.path)
		x.raw()
		d, err := console.Open(l.ctx, l.open(1), console.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		p := d.Port(0)
		if err := p.Open(); err != nil {
			t.Fatal(err)
		}
		typeLast(l, x, p)
		// What is in the queue when a device leaves is not for its driver any more:
		// 4 buffers of 4096 bytes.
		b := make([]byte, len(last)-4*4096)
		if n, err := io.ReadFull(p, b); !strings.HasPrefix(last, string(b)) {
			t.Errorf("%d bytes, %v; want %d", n, err, len(b))
		}
		x.ended(0)
	})
}

func TestShown(t *testing.T) {
	for name, want := range map[string]string{
		"org.example.log": "org.example.log", "größe 2": "größe 2", "": "", "\x1b[2J": `"\x1b[2J"`, "\u009b2J": `"\u009b2J"`, `a"b`: `"a\"b"`,
	} {
		if got := shown(name); got != want {
			t.Errorf("%q: %s, want %s", name, got, want)
		}
	}
}

// The other side's name for a port does nothing to the terminal.
func TestHostileNameShown(t *testing.T) {
	t.Parallel()
	const name = "\u009b2J\x1b]0;x\a"
	l := newConsoleLink(t)
	d, err := console.NewDevice(l.open(0), console.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.AddPort(console.PortConfig{Name: name, Console: true}); err != nil {
		t.Fatal(err)
	}
	l.serve(d.Serve)
	// By its name, which comes a moment after the port.
	x := inTerminal(t, "console", "-d", l.path, name)
	x.raw()
	x.until("the name", func() bool { return x.shows(`"\u009b2J\x1b]0;x\a": ^] leaves`) })
	x.keys("\x1d")
	x.ended(0)
}
