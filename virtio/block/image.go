package block

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Image is what a disk keeps its data in. Its methods may be called at the same
// time, and inside its size only.
type Image interface {
	io.ReaderAt
	io.WriterAt
	// Size is the size in bytes, which does not change.
	Size() int64
	// Sync returns when all that was written is on stable storage.
	Sync() error
	// Zero makes n bytes read as zeros, and may give up the space for them if
	// unmap says so.
	Zero(offset, n int64, unmap bool) error
	// Discard says that nobody wants n bytes any more.
	Discard(offset, n int64) error
}

// File is a file, or block device, as an image. It is locked against another
// use as an image, unless both only read.
type File struct {
	f    *os.File
	size int64
}

// OpenFile opens a file or block device.
func OpenFile(path string, readOnly bool) (*File, error) {
	flags, lock := os.O_RDWR, unix.LOCK_EX
	if readOnly {
		flags, lock = os.O_RDONLY, unix.LOCK_SH
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	size, err := imageSize(f)
	if err == nil {
		if err = unix.Flock(int(f.Fd()), lock|unix.LOCK_NB); err == unix.EWOULDBLOCK {
			err = fmt.Errorf("%s: in use by another process: end it, or serve a copy", path)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &File{f, size}, nil
}

func imageSize(f *os.File) (int64, error) {
	info, err := f.Stat()
	switch {
	case err != nil:
		return 0, err
	case info.Mode().IsRegular():
		return info.Size(), nil
	case info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0:
		return f.Seek(0, io.SeekEnd)
	}
	return 0, fmt.Errorf("%s: expected a file or a block device", f.Name())
}

// Size is the size in bytes when it was opened.
func (f *File) Size() int64 { return f.size }

// ReadAt implements [io.ReaderAt].
func (f *File) ReadAt(p []byte, offset int64) (int, error) { return f.f.ReadAt(p, offset) }

// WriteAt implements [io.WriterAt].
func (f *File) WriteAt(p []byte, offset int64) (int, error) { return f.f.WriteAt(p, offset) }

// Sync is fsync.
func (f *File) Sync() error { return f.f.Sync() }

// Close gives the lock back.
func (f *File) Close() error { return f.f.Close() }

// Zero implements [Image].
func (f *File) Zero(offset, n int64, unmap bool) error {
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE)
	if unmap {
		mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	}
	if err := f.allocate(mode, offset, n); !unsupported(err) {
		return err
	}
	return writeZeros(f, offset, n)
}

// Discard implements [Image].
func (f *File) Discard(offset, n int64) error {
	err := f.allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, n)
	if unsupported(err) {
		return nil
	}
	return err
}

func (f *File) allocate(mode uint32, offset, n int64) error {
	for {
		if err := unix.Fallocate(int(f.f.Fd()), mode, offset, n); err != unix.EINTR {
			return err
		}
	}
}

// unsupported reports whether the file system cannot do it.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL)
}

func writeZeros(w io.WriterAt, offset, n int64) error {
	var zeros [1 << 16]byte
	for n > 0 {
		m, err := w.WriteAt(zeros[:min(n, int64(len(zeros)))], offset)
		if err != nil {
			return err
		}
		offset, n = offset+int64(m), n-int64(m)
	}
	return nil
}
