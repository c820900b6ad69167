package ports

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/sockpath"
)

// ControlFile is the name of the socket in the directory on which a service is
// asked for things, and by which no other takes the directory.
const ControlFile = ".control"

// DefaultDir is where ports are looked for: /run/ivshmem/ports, and
// $XDG_RUNTIME_DIR/ivshmem/ports for users other than root.
func DefaultDir() string {
	if run := os.Getenv("XDG_RUNTIME_DIR"); run != "" && os.Geteuid() != 0 {
		return filepath.Join(run, "ivshmem", "ports")
	}
	return "/run/ivshmem/ports"
}

// directory is where the ports are, held by one service.
type directory struct {
	path    string
	control *net.UnixListener
	made    []string // directories that were not there, the outermost first
}

// openDirectory takes a directory, makes it where it is not there, and removes
// what a service that was killed left.
func openDirectory(path string) (*directory, error) {
	if most := sockpath.MaxLen - 1 - maxFile - maxExtra; len(path) > most {
		return nil, fmt.Errorf("directory %q has %d bytes, expected at most %d, as sockets with names of up to %d bytes go there: %w",
			path, len(path), most, maxFile+maxExtra, unix.ENAMETOOLONG)
	}
	d := &directory{path: path}
	if err := d.take(); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (d *directory) take() (err error) {
	if err := d.make(filepath.Clean(d.path)); err != nil {
		return err
	}
	// Whoever else could write there could lead programs, and the service,
	// somewhere else.
	var st unix.Stat_t
	if err := unix.Stat(d.path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: d.path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Mode&0o022 != 0 || st.Uid != 0 && st.Uid != uint32(os.Geteuid()) {
		return fmt.Errorf("%s: expected a directory of this user that nobody else can write, its group neither: choose another one, or change its mode (chmod go-w)", d.path)
	}
	// Whoever may look into the directory may ask.
	d.control, err = sockpath.ListenWith(filepath.Join(d.path, ControlFile), sockpath.Rights{Mode: 0o666})
	if err != nil {
		return err
	}
	return d.clean()
}

// make makes a directory and those above it.
func (d *directory) make(path string) error {
	err := os.Mkdir(path, 0o755)
	if errors.Is(err, os.ErrNotExist) {
		if err := d.make(filepath.Dir(path)); err != nil {
			return err
		}
		err = os.Mkdir(path, 0o755)
	}
	if err == nil {
		d.made = append(d.made, path)
	}
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// clean removes sockets that nobody listens on, and links into /dev.
func (d *directory) clean() error {
	all, err := os.ReadDir(d.path)
	if err != nil {
		return err
	}
	for _, e := range all {
		path := filepath.Join(d.path, e.Name())
		stale := false
		switch e.Type() {
		case os.ModeSocket:
			var c net.Conn
			if c, err = net.Dial("unix", path); err == nil {
				c.Close()
			}
			stale = errors.Is(err, unix.ECONNREFUSED)
		case os.ModeSymlink:
			to, _ := os.Readlink(path)
			stale = strings.HasPrefix(to, "/dev/")
		}
		if stale {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// close gives the directory back, and removes it where it was made, unless
// something is left there.
func (d *directory) close() {
	if d.control != nil {
		d.control.Close()
	}
	for i := len(d.made) - 1; i >= 0; i-- {
		os.Remove(d.made[i])
	}
}
