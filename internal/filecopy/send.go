package filecopy

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Sender sends files. It remembers which have arrived, so that Send on another
// connection goes on.
type Sender struct {
	Paths    []string // files and directories
	Progress Progress // may be nil
	arrived  map[string]bool
	// Count and Bytes are what has arrived.
	Count int
	Bytes int64
}

// Send sends what has not arrived yet. It returns nil once everything has.
// After an error the connection is of no more use; if it is one of the connection
// ([Broken]), another one may do. What the receiver does not want is a
// [RefusedError].
func (s *Sender) Send(conn io.ReadWriter) error {
	if s.arrived == nil {
		s.arrived = map[string]bool{}
	}
	l := newLines(conn)
	for _, p := range s.Paths {
		base := filepath.Dir(filepath.Clean(p))
		err := filepath.WalkDir(p, func(file string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			name, err := filepath.Rel(base, file)
			if err != nil {
				return err
			}
			if name == "." || s.arrived[file] { // "." is what the receiver has anyway
				return nil
			}
			size, err := s.one(l, file, filepath.ToSlash(name), d)
			if err != nil {
				return err
			}
			s.arrived[file] = true
			s.Count++
			s.Bytes += size
			return nil
		})
		if err != nil {
			return err
		}
	}
	if err := l.write(entry{End: true}); err != nil {
		return err
	}
	var a answer
	if err := l.read(&a); err != nil {
		return err
	}
	if !a.End {
		return errors.New("expected the receiver to say that it has everything")
	}
	return nil
}

func (s *Sender) one(l *lines, file, name string, d fs.DirEntry) (int64, error) {
	info, err := d.Info()
	if err != nil {
		return 0, err
	}
	e := entry{Path: name, Mode: info.Mode(), MTime: info.ModTime()}
	switch {
	case info.IsDir():
	case info.Mode()&fs.ModeSymlink != 0:
		if e.Link, err = os.Readlink(file); err != nil {
			return 0, err
		}
	case info.Mode().IsRegular():
		return info.Size(), s.file(l, file, e, info.Size())
	default:
		return 0, &fs.PathError{Op: "copy", Path: file, Err: fmt.Errorf("%v: expected a file, a directory or a symbolic link", info.Mode().Type())}
	}
	var a answer
	return 0, ask(l, e, &a)
}

// ask says what comes, and reads the answer.
func ask(l *lines, e entry, a *answer) error {
	if err := l.write(e); err != nil {
		return err
	}
	if err := l.read(a); err != nil {
		return err
	}
	if a.Error != "" {
		return &RefusedError{e.Path, a.Error}
	}
	return nil
}

func (s *Sender) file(l *lines, file string, e entry, size int64) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	e.Size = size
	var a answer
	if err := ask(l, e, &a); err != nil {
		return err
	}
	if a.Have < 0 || a.Have > size {
		return fmt.Errorf("%s: the receiver has %d bytes, expected at most %d", e.Path, a.Have, size)
	}
	sum := sha256.New()
	if _, err := io.CopyN(sum, f, a.Have); err != nil {
		return changed(file, err)
	}
	if err := s.content(l.w, f, sum, e.Path, a.Have, size); err != nil {
		return changed(file, err)
	}
	a = answer{}
	if err := l.write(checksum{hex.EncodeToString(sum.Sum(nil))}); err != nil {
		return err
	}
	if err := l.read(&a); err != nil {
		return err
	}
	switch {
	case a.OK:
		return nil
	case a.Again:
		return s.file(l, file, e, size)
	}
	return &RefusedError{e.Path, a.Error}
}

// changed makes the end of a file that was longer a local error.
func changed(file string, err error) error {
	if errors.Is(err, io.EOF) {
		return &fs.PathError{Op: "copy", Path: file, Err: errors.New("it became shorter meanwhile")}
	}
	return err
}

func (s *Sender) content(w io.Writer, f io.Reader, sum hash.Hash, path string, done, size int64) error {
	buf := make([]byte, 256<<10)
	for done < size {
		n, err := f.Read(buf[:min(int64(len(buf)), size-done)])
		if n > 0 {
			sum.Write(buf[:n])
			if err := broken(w.Write(buf[:n])); err != nil {
				return err
			}
			done += int64(n)
			if s.Progress != nil {
				s.Progress(path, done, size)
			}
		}
		if err != nil && done < size {
			return err
		}
	}
	return nil
}
