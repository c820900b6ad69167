package filecopy

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
)

// Receiver puts files into a directory, and nowhere else.
type Receiver struct {
	Root     *os.Root
	Progress Progress // may be nil
	// Count and Bytes are what has arrived.
	Count int
	Bytes int64
}

// partial is the name that a file has until it is whole. It tells which
// version of the file it is a part of.
func partial(e entry) string {
	id := sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%d", e.Path, e.Size, e.MTime.UnixNano()))
	return path.Join(path.Dir(e.Path), ".ivshctl-part-"+hex.EncodeToString(id[:8]))
}

// Receive takes files until the sender says that this was all: then it returns
// nil. After an error the connection is of no more use, and another one may do if
// it is one of the connection ([Broken]); what has arrived stays.
func (r *Receiver) Receive(conn io.ReadWriter) error {
	l := newLines(conn)
	for {
		var e entry
		if err := l.read(&e); err != nil {
			return err
		}
		if e.End {
			return l.write(answer{End: true})
		}
		if err := r.one(l, e); err != nil {
			if !Broken(err) {
				l.write(answer{Error: err.Error()})
			}
			return err
		}
	}
}

func (r *Receiver) one(l *lines, e entry) error {
	if err := checkPath(e.Path); err != nil {
		return &fs.PathError{Op: "receive", Path: e.Path, Err: err}
	}
	if dir := path.Dir(e.Path); dir != "." {
		if err := r.Root.MkdirAll(dir, 0o777); err != nil {
			return err
		}
	}
	switch {
	case e.Mode.IsDir():
		if err := r.Root.MkdirAll(e.Path, e.Mode.Perm()|0o700); err != nil {
			return err
		}
	case e.Link != "":
		part := partial(e)
		r.Root.Remove(part)
		if err := r.Root.Symlink(e.Link, part); err != nil {
			return err
		}
		if err := r.Root.Rename(part, e.Path); err != nil {
			return err
		}
	default:
		return r.file(l, e)
	}
	r.Count++
	return l.write(answer{OK: true})
}

// file receives a file, or what is missing of it, and puts it in place once it
// is on the disk.
func (r *Receiver) file(l *lines, e entry) error {
	part := partial(e)
	f, sum, have, err := r.open(part, e)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := l.write(answer{Have: have}); err != nil {
		return err
	}
	if err := r.content(f, l.r, sum, e, have); err != nil {
		return err
	}
	var c checksum
	if err := l.read(&c); err != nil {
		return err
	}
	if found := hex.EncodeToString(sum.Sum(nil)); found != c.SHA256 {
		if err := r.Root.Remove(part); err != nil {
			return err
		}
		if have > 0 { // the part may have suffered from a crash
			return l.write(answer{Again: true})
		}
		return &fs.PathError{Op: "receive", Path: e.Path, Err: fmt.Errorf("SHA-256: expected %s, found %s: it changed while it was sent", c.SHA256, found)}
	}
	if err := errors.Join(f.Chmod(e.Mode.Perm()), f.Sync(), r.Root.Chtimes(part, e.MTime, e.MTime), r.Root.Rename(part, e.Path)); err != nil {
		return err
	}
	r.Count++
	r.Bytes += e.Size
	return l.write(answer{OK: true})
}

// open opens the part of a file that has arrived, and reads it once for the
// checksum.
func (r *Receiver) open(part string, e entry) (f *os.File, sum hash.Hash, have int64, err error) {
	if info, err := r.Root.Lstat(part); err == nil && !(info.Mode().IsRegular() && info.Size() <= e.Size) {
		if err := r.Root.Remove(part); err != nil {
			return nil, nil, 0, err
		}
	}
	if f, err = r.Root.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, nil, 0, err
	}
	sum = sha256.New()
	if have, err = io.Copy(sum, f); err != nil {
		f.Close()
		return nil, nil, 0, err
	}
	return f, sum, have, nil
}

func (r *Receiver) content(f *os.File, from *bufio.Reader, sum hash.Hash, e entry, done int64) error {
	buf := make([]byte, 256<<10)
	for done < e.Size {
		n, err := from.Read(buf[:min(int64(len(buf)), e.Size-done)])
		if n > 0 {
			sum.Write(buf[:n])
			if _, err := f.Write(buf[:n]); err != nil {
				return err
			}
			done += int64(n)
			if r.Progress != nil {
				r.Progress(e.Path, done, e.Size)
			}
		}
		if err := broken(0, err); err != nil {
			return err
		}
	}
	return nil
}
