package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

var escapeFlag = &cli.StringFlag{Name: "escape", Usage: "`KEY` that leaves, where standard input is a terminal: ^A to ^_, one character, or none", Value: "^]"}

// parseEscape reads a key; -1: none.
func parseEscape(s string) (int, error) {
	switch {
	case s == "none":
		return -1, nil
	case len(s) == 1:
		return int(s[0]), nil
	case len(s) == 2 && s[0] == '^' && s[1] >= '?' && s[1] <= '_':
		return int(s[1] ^ 0x40), nil
	case len(s) == 2 && s[0] == '^' && s[1] >= 'a' && s[1] <= 'z':
		return int(s[1] & 0x1f), nil
	}
	return 0, usagef("--escape %q: expected ^A to ^_, one character, or none", s)
}

func escapeName(key int) string {
	if key < ' ' || key == 0x7f {
		return "^" + string(rune(key^0x40))
	}
	return string(rune(key))
}

// line is what a session talks to.
type line struct {
	io.ReadWriteCloser
	closeWrite func() error       // says that nothing more is written; nil: it cannot
	resize     func(console.Size) // tells the size of the window; nil: it cannot
}

// How a session ended.
type sessionEnd int

const (
	endOfLine    sessionEnd = iota // the line's end of file
	endByContext                   // a signal, or the time was up
	endByEscape
	endOfInput
)

// session joins standard input and output with a line.
type session struct {
	*program
	line   *line
	name   string
	escape int
	eof    bool // the end of standard input ends it
	// there waits for the other side, for which input is kept until then; nil: it
	// is not. Who types does so in the present.
	there func(context.Context)

	received atomic.Int64 // bytes
	end      sessionEnd

	once    sync.Once
	restore func() // the terminal
}

// typed is how many pieces of typed input wait for the other side, which has to
// take them; the escape key works all the same.
const typed = 256

// lastWords is how long what is on its way at the end may take: what was typed
// before the escape key, and what has arrived.
const lastWords = time.Second

// briefly does something that may take for ever, and waits for lastWords at most.
func briefly(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(lastWords):
	}
}

// errEscape and errInput are the ends of a session that are none of the line's.
var (
	errEscape = errors.New("the escape key")
	errInput  = errors.New("the end of standard input")
)

// run carries bytes both ways until the line or the context ends, or the user
// has enough. It closes the line, and leaves the terminal as it was.
func (s *session) run(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	hup, stop := signal.NotifyContext(ctx, unix.SIGHUP, unix.SIGQUIT)
	defer stop()
	defer context.AfterFunc(hup, func() { cancel(errors.New("ended by a signal")) })()
	// Who reads standard output may leave. That is an error of Write then, and not
	// the end of the program with the terminal as it is.
	signal.Ignore(unix.SIGPIPE)
	defer signal.Reset(unix.SIGPIPE)
	closed := context.AfterFunc(ctx, func() { s.line.Close() })
	defer func() {
		if closed() {
			s.line.Close()
		}
	}()
	in := io.Reader(s.in)
	keys, isTerminal := s.in.(*os.File)
	isTerminal = isTerminal && term.IsTerminal(int(keys.Fd()))
	if isTerminal {
		if err := s.raw(ctx, keys); err != nil {
			return err
		}
		defer s.cooked()
	}
	go func() {
		defer s.repair()
		if isTerminal {
			cancel(s.keys(ctx, in))
			return
		}
		if s.there != nil {
			s.there(ctx)
		}
		_, err := io.Copy(s.line, in)
		switch {
		case s.eof:
			cancel(errInput)
		case err == nil && s.line.closeWrite != nil:
			s.line.closeWrite()
		}
	}()
	copied := make(chan error, 1)
	go func() {
		defer s.repair()
		_, err := io.Copy(struct{ io.Writer }{s.out}, counted{s})
		copied <- err
	}()
	select {
	case err = <-copied:
	case <-ctx.Done():
		briefly(func() { <-copied }) // standard output may take nothing
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
		switch err {
		case errEscape:
			s.end = endByEscape
			return nil
		case errInput:
			s.end = endOfInput
			return nil
		}
		s.end = endByContext
		return err
	}
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.ECONNRESET) { // of a terminal; of a connection
		err = nil
	}
	return err
}

// counted counts what is read from the line.
type counted struct{ s *session }

func (c counted) Read(b []byte) (int, error) {
	n, err := c.s.line.Read(b)
	c.s.received.Add(int64(n))
	return n, err
}

// raw puts the terminal into raw mode and follows its size.
func (s *session) raw(ctx context.Context, keys *os.File) error {
	fd := int(keys.Fd())
	name := shown(s.name)
	if s.escape >= 0 {
		fmt.Fprintf(s.err, "%s: %s leaves\n", name, escapeName(s.escape))
	} else {
		fmt.Fprintln(s.err, name)
	}
	state, err := term.MakeRaw(fd)
	if err != nil {
		return fmt.Errorf("raw mode of the terminal: %w", err)
	}
	s.restore = func() {
		term.Restore(fd, state)
		briefly(func() { fmt.Fprintln(s.err) }) // it may have been stopped
	}
	if s.line.resize == nil {
		return nil
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	go func() {
		defer s.repair()
		defer signal.Stop(changed)
		for {
			if w, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ); err == nil && w.Col|w.Row != 0 {
				s.line.resize(console.Size{Cols: w.Col, Rows: w.Row})
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return nil
}

// cooked leaves the terminal as it was.
func (s *session) cooked() {
	if s.restore != nil {
		s.once.Do(s.restore)
	}
}

// repair is for goroutines: a panic there would leave the terminal raw.
func (s *session) repair() {
	if r := recover(); r != nil {
		s.cooked()
		panic(r)
	}
}

// keys takes what is typed, and returns why that ended. The line may take
// nothing, so what waits for it is bounded: the bell says that something was
// dropped.
func (s *session) keys(ctx context.Context, in io.Reader) error {
	waiting, written := make(chan []byte, typed), make(chan struct{})
	bell := make(chan struct{}, 1)
	defer close(bell)
	go func() {
		defer s.repair()
		for range bell {
			io.WriteString(s.out, "\a") // which may take nothing
		}
	}()
	go func() {
		defer s.repair()
		defer close(written)
		for b := range waiting {
			if _, err := s.line.Write(b); err != nil {
				return // the line ends for whoever reads from it, too
			}
		}
	}()
	buf := make([]byte, 1024)
	for {
		n, err := in.Read(buf)
		b := buf[:n]
		left := false
		for i, c := range b {
			if int(c) == s.escape {
				b, left = b[:i], true
				break
			}
		}
		if len(b) > 0 {
			select {
			case waiting <- append([]byte(nil), b...):
			default:
				select {
				case bell <- struct{}{}:
				default:
				}
			}
		}
		if left {
			close(waiting)
			briefly(func() { <-written })
			return errEscape
		}
		if err != nil {
			return fmt.Errorf("the terminal: %w", err)
		}
	}
}

// shown is a name of the other side's as a terminal may show it: quoted where it
// has something that a terminal might obey.
func shown(name string) string {
	if q := strconv.Quote(name); q != `"`+name+`"` {
		return q
	}
	return name
}
