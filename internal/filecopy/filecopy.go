// Package filecopy copies files and directories over a connection that may
// break: what has arrived is kept, and the next try goes on behind it.
//
// The sender says what comes, a JSON object of one line each; the receiver
// answers, too. For each entry:
//
//	sender:   {"path":"a/b","mode":420,"size":4096,"mtime":"…"}
//	receiver: {"have":1024}
//	sender:   size - have bytes, then {"sha256":"…"} of the whole file
//	receiver: {"ok":true} once the file is in place, {"again":true} if what
//	          it had was spoilt, or {"error":"…"}
//
// and at the end {"end":true}, which the receiver repeats.
package filecopy

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"time"
)

// entry is what the sender says of a file, a directory, or a symbolic link.
type entry struct {
	Path  string      `json:"path,omitempty"` // relative, with slashes
	Mode  fs.FileMode `json:"mode,omitempty"`
	Size  int64       `json:"size,omitempty"`
	MTime time.Time   `json:"mtime,omitzero"`
	Link  string      `json:"link,omitempty"` // what a symbolic link points to
	End   bool        `json:"end,omitempty"`
}

type answer struct {
	Have  int64  `json:"have,omitempty"`
	OK    bool   `json:"ok,omitempty"`
	Again bool   `json:"again,omitempty"` // what was there already was spoilt
	End   bool   `json:"end,omitempty"`
	Error string `json:"error,omitempty"`
}

type checksum struct {
	SHA256 string `json:"sha256"`
}

// RefusedError is the other end's reason for not going on.
type RefusedError struct{ Path, Reason string }

func (e *RefusedError) Error() string {
	return fmt.Sprintf("%s: the other end refuses: %s", e.Path, e.Reason)
}

// Progress is told how far a file is.
type Progress func(path string, done, size int64)

// lines reads and writes JSON by lines, of bounded length.
type lines struct {
	r *bufio.Reader
	w io.Writer
}

const maxLine = 64 << 10

func newLines(rw io.ReadWriter) *lines { return &lines{bufio.NewReaderSize(rw, maxLine), rw} }

func (l *lines) write(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return broken(l.w.Write(append(b, '\n')))
}

func (l *lines) read(v any) error {
	b, err := l.r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return fmt.Errorf("the other end: expected a line of at most %d bytes", maxLine)
	}
	if err != nil {
		return broken(0, err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("the other end: %w", err)
	}
	return nil
}

// brokenError is an error of the connection.
type brokenError struct{ error }

func (e brokenError) Unwrap() error { return e.error }

func broken(_ int, err error) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		return nil
	}
	return brokenError{err}
}

// Broken reports whether an error is of the connection, so that another one
// may do, and not of the files or of what the other end said.
func Broken(err error) bool { return errors.As(err, new(brokenError)) }

// checkPath refuses paths that leave the directory. The receiver's [os.Root]
// does so as well; this says it in words.
func checkPath(p string) error {
	if p == "" || !filepath.IsLocal(filepath.FromSlash(p)) || strings.Contains(p, "\x00") {
		return fmt.Errorf("path %q: expected one inside the directory", p)
	}
	return nil
}
