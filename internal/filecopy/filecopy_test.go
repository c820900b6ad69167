package filecopy_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/filecopy"
)

func write(t *testing.T, path string, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	rand.Read(b)
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o640); err != nil {
		t.Fatal(err)
	}
	return b
}

// breaking is a connection that breaks after so many bytes were written.
type breaking struct {
	net.Conn
	left int
}

func (b *breaking) Write(p []byte) (int, error) {
	if len(p) > b.left {
		b.Conn.Write(p[:b.left])
		b.Conn.Close()
		return 0, errors.New("broken")
	}
	b.left -= len(p)
	return b.Conn.Write(p)
}

func TestCopy(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	files := map[string][]byte{}
	for name, n := range map[string]int{"tree/a": 0, "tree/b": 1, "tree/sub/deep/c": 3 << 20, "tree/d": 1 << 20, "alone": 70000} {
		files[name] = write(t, filepath.Join(from, name), n)
	}
	if err := os.Symlink("../d", filepath.Join(from, "tree/sub/link")); err != nil {
		t.Fatal(err)
	}
	stamp := time.Date(2001, 2, 3, 4, 5, 6, 7000, time.UTC)
	if err := os.Chtimes(filepath.Join(from, "alone"), stamp, stamp); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(to)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	s := &filecopy.Sender{Paths: []string{filepath.Join(from, "tree"), filepath.Join(from, "alone")}}
	tries := 0
	sent := 0
	for left := 1000; ; left += 400000 {
		a, b := net.Pipe()
		done := make(chan error, 1)
		go func() {
			err := (&filecopy.Receiver{Root: root}).Receive(b)
			b.Close()
			done <- err
		}()
		tries++
		conn := &breaking{a, left}
		err := s.Send(conn)
		a.Close()
		rerr := <-done
		sent += left - conn.left
		if err == nil {
			if rerr != nil {
				t.Error(rerr)
			}
			break
		}
	}
	if tries < 4 {
		t.Errorf("all in %d tries: nothing was resumed", tries)
	}
	// What had arrived was not sent again.
	if total := 4<<20 + 70001; sent > total+total/2 {
		t.Errorf("%d bytes sent for %d", sent, total)
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(to, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v, want %d", name, len(got), err, len(want))
		}
	}
	if l, err := os.Readlink(filepath.Join(to, "tree/sub/link")); l != "../d" {
		t.Error(l, err)
	}
	info, err := os.Stat(filepath.Join(to, "alone"))
	if err != nil || info.Mode().Perm() != 0o640 || !info.ModTime().Equal(stamp) {
		t.Error(info.Mode(), info.ModTime(), err)
	}
	filepath.WalkDir(to, func(p string, d os.DirEntry, err error) error {
		if strings.Contains(p, "part") {
			t.Errorf("left behind: %s", p)
		}
		return nil
	})
}

// A receiver must not write outside its directory, whatever it is told.
func TestReceiveHostile(t *testing.T) {
	for name, lines := range map[string]string{
		"parent":           `{"path":"../x","mode":420,"size":1}`,
		"absolute":         `{"path":"/tmp/x","mode":420,"size":1}`,
		"nothing":          `{"path":"","mode":420}`,
		"through a link":   `{"path":"l","link":"/"}` + "\n" + `{"path":"l/tmp/x","mode":420,"size":1}`,
		"no JSON":          `hello`,
		"a line too long":  `{"path":"` + strings.Repeat("x", 1<<17) + `"}`,
		"wrong sum":        `{"path":"x","mode":420,"size":1}` + "\nA" + `{"sha256":"00"}`,
		"negative size":    `{"path":"y","mode":420,"size":-1}` + "\n" + `{"sha256":"00"}`,
		"over a directory": `{"path":"dir","mode":420}` + "\n" + `{"sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}`,
	} {
		t.Run(name, func(t *testing.T) {
			outer := t.TempDir()
			dir := filepath.Join(outer, "in")
			if err := os.MkdirAll(filepath.Join(dir, "dir/full"), 0o777); err != nil {
				t.Fatal(err)
			}
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			a, b := net.Pipe()
			go func() {
				io.WriteString(a, lines+"\n")
				a.Close()
			}()
			go io.Copy(io.Discard, a)
			if err := (&filecopy.Receiver{Root: root}).Receive(b); err == nil {
				t.Error("no error")
			}
			b.Close()
			if e, _ := os.ReadDir(outer); len(e) != 1 {
				t.Errorf("outside: %v", e)
			}
		})
	}
}
