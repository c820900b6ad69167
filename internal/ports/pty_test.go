package ports

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

var (
	con    = console.PortConfig{Name: "con", Console: true}
	asPTYs = Config{Others: Settings{Form: PTY}}
)

// tty opens a port's terminal when it is there.
func (s *served) tty(file string) *os.File {
	s.t.Helper()
	s.wait(file, there)
	for {
		f, err := os.OpenFile(s.path(file), os.O_RDWR|syscall.O_NOCTTY, 0)
		if err == nil {
			s.t.Cleanup(func() { f.Close() })
			return f
		}
		if s.ctx.Err() != nil {
			s.t.Fatal(err)
		}
	}
}

func (b *both) eventually(what string, f func() bool) {
	b.t.Helper()
	for !f() {
		if b.ctx.Err() != nil {
			b.t.Fatal("never: ", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// A terminal passes all bytes as they are, and its last closing closes the port.
func TestPTY(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, asPTYs, log)
	far := b.far("log")
	raw := "\x00\x03\x04\x11\x13\x1a\r\n\xff\x7f"
	for range 3 {
		f, g := b.s.tty("log"), b.s.tty("log")
		write(t, f, raw)
		b.hear(far, raw)
		b.say(far, raw)
		b.hear(g, raw)
		f.Close()
		write(t, g, "still here")
		b.hear(far, "still here")
		g.Close()
		b.closed(far)
	}
	// Open no longer than to say something.
	f := b.s.tty("log")
	write(t, f, "short")
	f.Close()
	b.hear(far, "short")
	b.closed(far)
}

// The other side's closing hangs up, behind what was sent; there is another
// terminal then.
func TestPTYHangUp(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, asPTYs, log)
	far := b.far("log")
	f := b.s.tty("log")
	first, _ := os.Readlink(b.s.path("log"))
	data := stream(200 << 10)
	go func() {
		far.WaitOpen(b.ctx)
		far.WriteAll(b.ctx, data)
		far.Close()
	}()
	b.hear(f, string(data))
	if n, err := f.Read(make([]byte, 1)); n != 0 || err != io.EOF && !errors.Is(err, unix.EIO) {
		t.Errorf("%d, %v", n, err)
	}
	b.eventually("a new terminal", func() bool {
		now, _ := os.Readlink(b.s.path("log"))
		_, err := os.Stat(b.s.path("log"))
		return now != first && err == nil
	})
	if err := far.Open(); err != nil {
		t.Fatal(err)
	}
	f = b.s.tty("log")
	b.say(far, "again")
	b.hear(f, "again")
}

// Without carrier detection there is no hang-up.
func TestPTYLocal(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, asPTYs, log)
	far := b.far("log")
	f := b.s.tty("log")
	a, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	a.Cflag |= unix.CLOCAL
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, a); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		b.say(far, "hello")
		b.hear(f, "hello")
		far.Close()
		b.s.wait("log", func(s Status) bool { return !s.OpenThere })
		if err := far.Open(); err != nil {
			t.Fatal(err)
		}
	}
	b.s.wait("log", hereOpen)
	write(t, f, "bye")
	b.hear(far, "bye")
	f.Close()
	b.closed(far)
}

// What no program read is dropped, or kept.
func TestPTYCache(t *testing.T) {
	t.Parallel()
	for _, cache := range []bool{false, true} {
		b := newBoth(t, console.Config{}, Config{Others: Settings{Form: PTY, Cache: cache}}, log)
		far := b.far("log")
		f := b.s.tty("log")
		data := stream(600 << 10)
		n := b.stuff(far, data)
		f.Close()
		b.s.wait("log", func(s Status) bool { return !s.OpenHere })
		b.closed(far)
		if cache {
			f = b.s.tty("log")
			// What had not left the other side when nobody was here is not sent.
			b.hear(f, string(data[:n-128<<10]))
			continue
		}
		// Nothing is on the way any more when the other side is closed, too.
		far.Close()
		b.s.wait("log", func(s Status) bool { return !s.OpenThere })
		if err := far.Open(); err != nil {
			t.Fatal(err)
		}
		f = b.s.tty("log")
		b.eventually("dropped", func() bool {
			n, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ)
			return n == 0 && err == nil
		})
		b.say(far, "new")
		b.hear(f, "new")
	}
}

// A window's size goes from a terminal of the device's side to one of the
// driver's, where programs get SIGWINCH.
func TestPTYResize(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, asPTYs, con)
	d := serve(t, b.driver, asPTYs)
	near := b.s.tty("con")
	d.wait("con", there)
	// The program is this process's child, with the terminal as its own.
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	tty := d.tty("con")
	program := exec.Command("sh", "-c", `trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done`)
	program.Stdin, program.Stdout, program.Stderr = tty, in, os.Stderr
	program.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	defer program.Wait()
	defer program.Process.Kill()
	b.hear(out, "ready\n")
	for _, want := range []string{"40 120\n", "25 80\n"} {
		size := &unix.Winsize{Row: 40, Col: 120}
		if want == "25 80\n" {
			size = &unix.Winsize{Row: 25, Col: 80}
		}
		if err := unix.IoctlSetWinsize(int(near.Fd()), unix.TIOCSWINSZ, size); err != nil {
			t.Fatal(err)
		}
		b.hear(out, want)
	}
	// A terminal that comes later has it from the start.
	if p := b.driver.Lookup("con"); p.Size() != (console.Size{Cols: 80, Rows: 25}) {
		t.Error(p.Size())
	}
}

// The end of the service hangs up: a program does not wait for ever.
func TestPTYServiceEnds(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, asPTYs, log)
	f := b.s.tty("log")
	b.s.wait("log", hereOpen)
	b.s.stop()
	if n, err := f.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error(n, err)
	}
	if _, err := os.Lstat(b.s.path("log")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
