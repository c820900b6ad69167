package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/ports"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

func (p *program) portsAttachCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "attach", Usage: "join standard input and output with a port", ArgsUsage: "NAME",
		Description: `Waits for the port, and for the other side to open it. Ends when that closes it,
and everything is written; the end of standard input does not end it, unless
there is --eof: then the port is closed. A terminal as standard input is put into
raw mode; the escape key ends it.

Example: tar c . | ivshctl ports attach --eof org.example.backup
         ivshctl ports attach org.example.backup | tar x`,
		Flags: []cli.Flag{dirFlag, timeoutFlag, escapeFlag,
			&cli.BoolFlag{Name: "eof", Usage: "close the port at the end of standard input"}},
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return usagef("ports attach: expected NAME")
			}
			escape, err := parseEscape(c.String("escape"))
			if err != nil {
				return err
			}
			ctx, cancel := withTimeout(c)
			defer cancel()
			dir, name := portsDir(c), c.Args().First()
			l, err := openPort(ctx, dir, name)
			if err != nil {
				return interrupted(err)
			}
			s := &session{program: p, line: l, name: name, escape: escape, eof: c.Bool("eof"), there: func(ctx context.Context) {
				// What a program says before it leaves is for an other side that is there.
				for !listed(dir, name, func(s ports.Status) bool { return s.OpenThere }) && ctx.Err() == nil {
					time.Sleep(attachPace)
				}
			}}
			err = s.run(ctx)
			if err == nil && s.received.Load() == 0 && s.end == endOfLine && listed(dir, name, func(s ports.Status) bool { return s.OpenHere }) {
				err = fmt.Errorf("port %s: %w: another program has it open", name, ivshmem.ErrBusy)
			}
			return interrupted(err)
		},
	})
}

// attachPace is how often to look for a port, and for the other side.
const attachPace = 20 * time.Millisecond

// openPort opens a port's file, and waits for it to be there.
func openPort(ctx context.Context, dir, name string) (*line, error) {
	for {
		for _, f := range filesOf(name) {
			l, err := openFile(dir, filepath.Join(dir, f), name)
			if l != nil || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENXIO) {
				return l, err
			}
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(attachPace):
		}
	}
}

// mostFileName is how long a file's name may be (NAME_MAX).
const mostFileName = 255

// filesOf are the files that may be meant: that of a port with the name, and the
// one that has the name itself.
func filesOf(name string) []string {
	files := []string{ports.File(name, 0)}
	if name != "" && name[0] != '.' && !strings.Contains(name, "/") && len(name) <= mostFileName && name != files[0] {
		files = append(files, name)
	}
	return files
}

func openFile(dir, path, name string) (*line, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode()&os.ModeSocket == 0 {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			return nil, err
		}
		port := io.ReadWriteCloser(f)
		if !isTerminal(f) {
			port = &charDevice{f, func() bool {
				return listed(dir, name, func(s ports.Status) bool { return s.OpenThere })
			}}
		}
		return &line{ReadWriteCloser: port, resize: func(s console.Size) {
			if c, err := f.SyscallConn(); err == nil {
				c.Control(func(fd uintptr) {
					unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Cols})
				})
			}
		}}, nil
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	// Only the device's side of a console can tell it.
	return &line{ReadWriteCloser: c, closeWrite: c.CloseWrite, resize: func(s console.Size) {
		askPorts(dir, controlRequest{Do: "resize", Name: name, Size: &s})
	}}, nil
}

// isTerminal leaves the file as it is, so that Close ends a Read.
func isTerminal(f *os.File) (is bool) {
	if c, err := f.SyscallConn(); err == nil {
		c.Control(func(fd uintptr) {
			_, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
			is = err == nil
		})
	}
	return is
}

// charDevice is a character device, which has an end of file also before the
// other side opens the port.
type charDevice struct {
	io.ReadWriteCloser
	there func() bool // the other side has it open; nil: it had
}

func (c *charDevice) Read(b []byte) (int, error) {
	for {
		// Asked before: of what was open then the end of file is the end.
		if c.there != nil && c.there() {
			c.there = nil
		}
		n, err := c.ReadWriteCloser.Read(b)
		if n > 0 {
			c.there = nil
		}
		if err != io.EOF || c.there == nil {
			return n, err
		}
		time.Sleep(attachPace)
	}
}

// listed reports whether something is so of a port.
func listed(dir, name string, is func(ports.Status) bool) bool {
	all, _ := listPorts(dir)
	for _, s := range all {
		if (s.Name == name || filepath.Base(s.Path) == name) && is(s) {
			return true
		}
	}
	return false
}
