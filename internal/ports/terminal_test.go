package ports

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// newDoor is a door at the driver's end of a port that is a socket at the
// device's.
func newDoor(t *testing.T) (*both, *Door) {
	t.Helper()
	b := newBoth(t, console.Config{}, Config{}, log)
	p, err := b.driver.WaitPort(b.ctx, "log")
	if err != nil {
		t.Fatal(err)
	}
	return b, &Door{Port: p, Path: filepath.Join(tempDir(t), "log"), Ready: func(string) {}}
}

// run calls a function that ends with its context, and returns what ends it.
func (b *both) run(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(b.ctx)
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	stop = func() {
		b.t.Helper()
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			b.t.Error(err)
		}
		ended <- nil
	}
	b.t.Cleanup(stop)
	return stop
}

// program opens a terminal.
func (b *both) program(path string) *os.File {
	b.t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { f.Close() })
	return f
}

// What a program says to nobody, and leaves, is dropped once: it is not looked
// at again and again, and not sent with what the next one says.
func TestPTYNobodyListens(t *testing.T) {
	t.Parallel()
	for _, cache := range []bool{false, true} {
		b, d := newDoor(t)
		var visits atomic.Int32
		d.Cache, d.Left = cache, func() { visits.Add(1) }
		term, err := openTerminal()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(term.close)
		master, err := term.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		stop := b.run(func(ctx context.Context) error { return d.serve(ctx, term) })
		// More than the terminal has room for in one place.
		f := b.program(term.name)
		write(t, f, string(stream(10<<10)))
		f.Close()
		b.eventually("dropped", func() bool {
			if n := visits.Load(); n > 100 {
				t.Fatalf("cache %v: the port was opened %d times for one program", cache, n)
			}
			left, pending := poll(master)
			return left && !pending
		})
		c := b.s.dial("log")
		write(t, b.program(term.name), "NEW")
		b.hear(c, "NEW")
		stop()
	}
}

// A terminal that has hung up is given back when the path leads to another one,
// and the last one when it leads nowhere: nobody else can be given one that the
// path leads to.
func TestPTYPathIsOwn(t *testing.T) {
	t.Parallel()
	b, d := newDoor(t)
	for range 10 {
		last, ready := "", make(chan string, 10)
		d.Ready = func(path string) {
			now, err := os.Readlink(path)
			if err != nil {
				t.Error(err)
			}
			if last != "" {
				if _, err := os.Stat(last); now == last || err != nil {
					t.Errorf("from %s to %s: the old one was given back before: %v", last, now, err)
				}
			}
			last = now
			ready <- now
		}
		stop := b.run(d.PTY)
		var f *os.File
		for range 3 {
			f = b.program(<-ready)
			c := b.s.dial("log")
			write(t, c, "hello")
			b.hear(f, "hello")
			c.Close()
			if n, err := f.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Error(n, err)
			}
		}
		f = b.program(<-ready)
		hungUp := make(chan struct{})
		go func() {
			defer close(hungUp)
			f.Read(make([]byte, 1))
			if to, err := os.Readlink(d.Path); err == nil {
				t.Errorf("it still leads to %s", to)
			}
		}()
		b.eventually("open", d.Port.InUse)
		stop()
		<-hungUp
	}
}

// When there are no terminals at a hang-up, the programs are hung up, the path
// leads nowhere, and there is a terminal as soon as there can be.
func TestPTYNoneLeft(t *testing.T) {
	t.Parallel()
	b, d := newDoor(t)
	ready, failures := make(chan string, 10), make(chan error, 10)
	d.Ready = func(path string) { ready <- path }
	d.Failed = func(err error) { failures <- err }
	errNone := errors.New("none left")
	hungUp := make(chan struct{})
	opens := 0
	b.run(func(ctx context.Context) error {
		return d.terminals(ctx, func() (*terminal, error) {
			switch opens++; opens {
			case 1:
				return openTerminal()
			case 2:
				return nil, errNone
			case 3:
				select {
				case <-hungUp:
				case <-ctx.Done():
				}
				return nil, errNone
			}
			return openTerminal()
		})
	})
	f, c := b.program(<-ready), b.s.dial("log")
	write(t, c, "hello")
	b.hear(f, "hello")
	c.Close()
	if n, err := f.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error(n, err)
	}
	if _, err := os.Lstat(d.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the path leads somewhere: %v", err)
	}
	close(hungUp)
	f, c = b.program(<-ready), b.s.dial("log")
	write(t, c, "again")
	b.hear(f, "again")
	if err := <-failures; !errors.Is(err, errNone) || len(failures) > 0 {
		t.Errorf("%v, and %d more", err, len(failures))
	}
	// At first there has to be one.
	if err := d.terminals(b.ctx, func() (*terminal, error) { return nil, errNone }); err != errNone {
		t.Error(err)
	}
}
