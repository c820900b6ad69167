package portload

import (
	"errors"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// File is a port's file, used by nothing but system calls that block.
type File struct {
	fd      int
	started bool // something was read
}

// Open opens a port: a socket, a pseudo-terminal or a character device.
func Open(path string) (io.ReadWriteCloser, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode()&os.ModeSocket != 0 {
		return net.Dial("unix", path)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &File{fd: fd}, nil
}

// Read reads what is there. Before the other side has come there is nothing but
// the end of file.
func (f *File) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(f.fd, b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n > 0:
			f.started = true
			return n, nil
		case f.started:
			return 0, io.EOF
		default:
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// Write writes all of b.
func (f *File) Write(b []byte) (done int, err error) {
	for done < len(b) {
		n, err := unix.Write(f.fd, b[done:])
		switch {
		case err == unix.EINTR:
		case errors.Is(err, unix.ENOSPC): // throttled by a message
			time.Sleep(time.Millisecond)
		case err != nil:
			return done, err
		default:
			done += n
		}
	}
	return done, nil
}

// Close closes it.
func (f *File) Close() error { return unix.Close(f.fd) }
