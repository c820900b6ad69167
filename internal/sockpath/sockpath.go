// Package sockpath makes and serves Unix sockets by path, with errors that
// name the path and the remedy.
package sockpath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fault"
)

// MaxLen is the longest path of a socket in bytes (unix(7)).
const MaxLen = 107

// Check says whether a path can name a socket at all.
func Check(path string) error {
	if len(path) > MaxLen {
		return fmt.Errorf("socket path %q has %d bytes, expected at most %d: use a shorter directory, or a path relative to it: %w", path, len(path), MaxLen, unix.ENAMETOOLONG)
	}
	if path == "" {
		return errors.New("socket path is empty")
	}
	return nil
}

// Rights of a socket's file. To connect takes the right to write it.
type Rights struct {
	Mode         os.FileMode // permission bits; 0: those that the umask leaves
	Owner, Group *int        // nil: those of the process
}

// Listen makes a listening stream socket at path. A socket that nobody
// listens on any more is replaced.
func Listen(path string) (*net.UnixListener, error) { return ListenWith(path, Rights{}) }

// ListenWith is Listen for a socket with the given rights. At no time has it
// more than those.
func ListenWith(path string, r Rights) (*net.UnixListener, error) {
	if err := Check(path); err != nil {
		return nil, err
	}
	// Of two services that find the same stale socket, one would remove the
	// other's fresh one: so one looks, removes and listens at a time.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	l, err := r.listen(path)
	if !errors.Is(err, unix.EADDRINUSE) {
		return l, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	return r.listen(path)
}

func (r Rights) listen(path string) (*net.UnixListener, error) {
	var c net.ListenConfig
	if r.Mode != 0 {
		// bind(2) takes the mode of the socket itself, without what the umask
		// forbids, for its file.
		c.Control = func(_, _ string, raw syscall.RawConn) error {
			var err error
			if e := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), uint32(r.Mode.Perm())) }); e != nil {
				return e
			}
			return err
		}
	}
	l, err := c.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	if err := r.give(path); err != nil {
		l.Close()
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// give sets owner, group, and last the mode, which chown(2) may change.
func (r Rights) give(path string) error {
	if r.Owner != nil || r.Group != nil {
		owner, group := -1, -1
		if r.Owner != nil {
			owner = *r.Owner
		}
		if r.Group != nil {
			group = *r.Group
		}
		if err := os.Lchown(path, owner, group); err != nil {
			return fmt.Errorf("give the socket away: %w: only root can give it to another user, and others only to groups that they are in", err)
		}
	}
	if r.Mode != 0 {
		return os.Chmod(path, r.Mode.Perm())
	}
	return nil
}

// Accept passes every client of a listener to take, one after the other, until
// the context ends, and closes the listener. It returns nil then, or what made
// the listener useless. Failed is told why a client could not be accepted, where
// that passes. While take or failed blocks, further clients wait in the socket's
// queue; when the context ends they have to return.
func Accept(ctx context.Context, l *net.UnixListener, failed func(error), take func(*net.UnixConn)) error {
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			if conn != nil {
				conn.Close()
			}
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOBUFS):
			// Out of descriptors or memory: this client cannot be served, but those
			// that are connected go on. The pending connection stays in the
			// backlog, so accepting again at once would spin.
			failed(err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(100 * time.Millisecond):
			}
		case errors.Is(err, unix.ECONNABORTED):
		case err != nil:
			return fmt.Errorf("accept: %w", err)
		default:
			take(conn)
		}
	}
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s exists and is not a socket: choose another path, or remove it", path)
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err == nil {
		c.Close()
		return fmt.Errorf("%s: %w: another service listens there: choose another path, or end that service", path, fault.ErrBusy)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%s exists, and whether it is in use cannot be told: %w", path, err)
	}
	return os.Remove(path)
}
