// Package sockpath makes and reaches Unix sockets by path, with errors that
// name the path and the remedy.
package sockpath

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

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

// Listen makes a listening stream socket at path. A socket that nobody
// listens on any more is replaced.
func Listen(path string) (*net.UnixListener, error) {
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
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if !errors.Is(err, unix.EADDRINUSE) {
		return l, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	return net.ListenUnix("unix", addr)
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
