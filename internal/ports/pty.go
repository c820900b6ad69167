package ports

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

const (
	// sizePace is how often the size of a terminal is looked at: setting it wakes
	// nobody at the other end.
	sizePace = 200 * time.Millisecond
	// drainPace and drainPatience are for what a program has not read when the
	// line is hung up: how often to look, and how long it may read nothing.
	drainPace     = 10 * time.Millisecond
	drainPatience = 2 * time.Second
	// openPace is how often a terminal is asked for where there is none.
	openPace = 200 * time.Millisecond
)

// PTY makes terminals until the context ends, or the port is gone. There is one
// at a time, in raw mode at first; what programs set stays.
//
// The port is open while a program has the terminal open. The other side's
// closing is loss of carrier, as on a serial line: what came before is read, and
// then the programs read the end of file and get SIGHUP, and there is a new
// terminal; but with CLOCAL set (stty clocal) they stay.
func (d *Door) PTY(ctx context.Context) error { return d.terminals(ctx, openTerminal) }

// terminals is PTY with terminals that open makes.
func (d *Door) terminals(ctx context.Context, open func() (*terminal, error)) error {
	var t *terminal
	// Any user can be given the name of a terminal that is closed: before that the
	// path leads to the next one, or nowhere.
	leave := func() {
		if t == nil {
			return
		}
		if to, _ := os.Readlink(d.Path); to == t.name {
			os.Remove(d.Path)
		}
		t.close()
	}
	defer leave()
	for {
		next, err := open()
		if err != nil && t == nil {
			return err
		}
		if err != nil {
			d.failed(fmt.Errorf("%w: waiting for one", err))
			leave() // this one may be what the next needs
			if next, err = openLater(ctx, open); err != nil {
				return err
			}
		}
		if err := d.link(next.name); err != nil {
			next.close()
			return err
		}
		if t != nil {
			t.close()
		}
		t = next
		if err := d.serve(ctx, t); err != errHangUp {
			return err
		}
	}
}

// openLater opens a terminal as soon as there is one.
func openLater(ctx context.Context, open func() (*terminal, error)) (*terminal, error) {
	for {
		select {
		case <-time.After(openPace):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if t, err := open(); err == nil {
			return t, nil
		}
	}
}

// link lets Path lead to a device.
func (d *Door) link(device string) error {
	if d.Path == "" {
		d.Ready(device)
		return nil
	}
	if st, err := os.Lstat(d.Path); err == nil && st.Mode()&os.ModeSymlink == 0 {
		return fmt.Errorf("%s exists and is not a symbolic link: choose another path, or remove it", d.Path)
	}
	// In one step: the path leads somewhere at any time.
	dir, file := filepath.Split(d.Path)
	tmp := filepath.Join(dir, ".new-"+file)
	os.Remove(tmp)
	if err := os.Symlink(device, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, d.Path); err != nil {
		os.Remove(tmp)
		return err
	}
	d.Ready(d.Path)
	return nil
}

// serve serves the programs of a terminal, until it is hung up.
func (d *Door) serve(ctx context.Context, t *terminal) error {
	size := d.Port.Size()
	if size != (console.Size{}) {
		t.setSize(size)
	}
	for {
		if err := t.waitOpen(ctx); err != nil {
			return err
		}
		sized := make(chan struct{})
		visit, cancel := context.WithCancel(ctx)
		go func() {
			defer close(sized)
			d.follow(visit, t)
		}()
		err := d.visit(ctx, t, t.local)
		cancel()
		<-sized
		switch {
		case err == errHangUp:
			t.drain(ctx)
			return err
		case err != errLeft:
			return err
		}
		if !d.Port.PeerOpen() {
			t.drop() // else it would be the next program's
		}
		if !d.Cache {
			t.flush()
		}
	}
}

// follow carries the size of the window, from the terminal to the other side
// where that is possible, and else back.
func (d *Door) follow(ctx context.Context, t *terminal) {
	var size console.Size
	if d.Resize != nil && !d.Port.Console() {
		return
	}
	for {
		changed := d.Port.Changes()
		if d.Resize == nil {
			if s := d.Port.Size(); s != size {
				size = s
				t.setSize(s)
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
			continue
		}
		if s := t.size(); s != size {
			size = s
			if err := d.Resize(d.Port, s); err != nil && !errors.Is(err, console.ErrNotCarried) {
				d.failed(err)
			}
		}
		select {
		case <-time.After(sizePace):
		case <-ctx.Done():
			return
		}
	}
}

// terminal is a PTY, seen from its master.
type terminal struct {
	*os.File
	name   string
	opened *os.File // events of somebody opening it
}

func openTerminal() (*terminal, error) {
	master, slave, err := pty.Open()
	if err != nil {
		return nil, fmt.Errorf("pseudo-terminal: %w", err)
	}
	// With nobody there the master says so only once somebody has been there.
	defer slave.Close()
	defer master.Close()
	t := &terminal{name: slave.Name()}
	if _, err := term.MakeRaw(int(slave.Fd())); err != nil {
		return nil, fmt.Errorf("raw mode of %s: %w", t.name, err)
	}
	// The library's file waits with a thread.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	t.File = os.NewFile(uintptr(fd), master.Name())
	fd, err = unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.File.Close()
		return nil, fmt.Errorf("inotify: %w: fs.inotify.max_user_instances is how many a user may have", err)
	}
	t.opened = os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, t.name, unix.IN_OPEN); err != nil {
		t.close()
		return nil, fmt.Errorf("inotify: %s: %w", t.name, err)
	}
	return t, nil
}

func (t *terminal) close() {
	t.File.Close()
	t.opened.Close()
}

// waitOpen waits until a program has the terminal open, or wrote something.
func (t *terminal) waitOpen(ctx context.Context) error {
	master, err := t.SyscallConn()
	if err != nil {
		return err
	}
	events, err := t.opened.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { t.opened.SetReadDeadline(past) })
	defer stop()
	buf := make([]byte, 4096)
	err = events.Read(func(fd uintptr) bool {
		for {
			if n, err := unix.Read(int(fd), buf); n <= 0 && err != unix.EINTR {
				break // all events are looked at at once
			}
		}
		left, pending := poll(master)
		return !left || pending
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// control does something with the master's descriptor.
func (t *terminal) control(f func(fd int) error) error {
	c, err := t.SyscallConn()
	if err != nil {
		return err
	}
	if e := c.Control(func(fd uintptr) { err = f(int(fd)) }); e != nil {
		return e
	}
	return err
}

// local reports whether CLOCAL is set: the line has no carrier.
func (t *terminal) local() (set bool) {
	t.control(func(fd int) error {
		a, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		set = err == nil && a.Cflag&unix.CLOCAL != 0
		return err
	})
	return set
}

func (t *terminal) size() (s console.Size) {
	t.control(func(fd int) error {
		w, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		if err == nil {
			s = console.Size{Cols: w.Col, Rows: w.Row}
		}
		return err
	})
	return s
}

func (t *terminal) setSize(s console.Size) {
	t.control(func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Cols})
	})
}

// asProgram does something as a program on the terminal can.
func (t *terminal) asProgram(f func(fd int)) {
	fd, err := unix.Open(t.name, unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	f(fd)
}

// flush drops what no program read, on its way and there. A program that has the
// terminal already may see some of it.
func (t *terminal) flush() {
	t.control(func(fd int) error { return unix.IoctlSetInt(fd, unix.TCFLSH, unix.TCOFLUSH) })
	t.asProgram(func(fd int) { unix.IoctlSetInt(fd, unix.TCFLSH, unix.TCIFLUSH) })
}

// drop drops what programs said that have left.
func (t *terminal) drop() {
	t.control(func(fd int) error {
		buf := make([]byte, 4096)
		for {
			if left, pending := pollFD(uintptr(fd)); !left || !pending {
				return nil
			}
			if n, err := unix.Read(fd, buf); n <= 0 && err != unix.EINTR {
				return err
			}
		}
	})
}

// drain waits until the programs have read everything, which hanging up would
// drop.
func (t *terminal) drain(ctx context.Context) {
	if c, err := t.SyscallConn(); err == nil {
		if left, _ := poll(c); left {
			return
		}
	}
	t.asProgram(func(fd int) {
		last, empty := 0, 0
		for since := time.Now(); ctx.Err() == nil && empty < 2 && time.Since(since) < drainPatience; {
			n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
			if err != nil {
				return
			}
			if n == 0 {
				empty++
			} else {
				empty = 0
			}
			if n != last {
				last, since = n, time.Now()
			}
			select {
			case <-ctx.Done():
			case <-time.After(drainPace):
			}
		}
	})
}
