package sockpath_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sockpath"
)

// path returns the path of a socket; the folders of t.TempDir can be too long
// for one.
func path(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "link")
}

// stale leaves a socket behind that nobody listens on, as a killed service
// does.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal(err)
	}
}

// answers checks that whoever connects to path reaches l.
func answers(t *testing.T, l net.Listener, path string) {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s.Write([]byte("here"))
	s.Close()
	if b, err := io.ReadAll(c); string(b) != "here" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestListen(t *testing.T) {
	for name, before := range map[string]func(*testing.T, string){
		"nothing there": func(*testing.T, string) {},
		"stale socket":  stale,
	} {
		t.Run(name, func(t *testing.T) {
			p := path(t)
			before(t, p)
			l, err := sockpath.Listen(p)
			if err != nil {
				t.Fatal(err)
			}
			answers(t, l, p)
			l.Close()
			if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("after Close the socket is still there: %v", err)
			}
		})
	}
}

func TestListenLeavesLiveSocket(t *testing.T) {
	p := path(t)
	live, err := sockpath.Listen(p)
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	_, err = sockpath.Listen(p)
	if !errors.Is(err, fault.ErrBusy) || !strings.Contains(err.Error(), p) {
		t.Errorf("second service: %v, want ErrBusy and the path", err)
	}
	// The question whether it lives arrives there as a connection that ends.
	c, err := live.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
		t.Errorf("the live service was sent %q, %v", b, err)
	}
	c.Close()
	answers(t, live, p)
}

// A service whose queue of connections is full is alive.
func TestListenLeavesBusySocket(t *testing.T) {
	p := path(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: p}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for { // until the queue is full
		c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(c)
		if err := unix.Connect(c, &unix.SockaddrUnix{Name: p}); err == unix.EAGAIN {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := sockpath.Listen(p); err == nil || !strings.Contains(err.Error(), p) {
		t.Errorf("second service: %v, want an error that names the path", err)
	}
	if _, err := os.Lstat(p); err != nil {
		t.Errorf("the socket of a busy service is gone: %v", err)
	}
}

func TestListenLeavesOtherFiles(t *testing.T) {
	for name, make := range map[string]func(string) error{
		"file":      func(p string) error { return os.WriteFile(p, []byte("precious"), 0o600) },
		"folder":    func(p string) error { return os.Mkdir(p, 0o700) },
		"pipe":      func(p string) error { return unix.Mkfifo(p, 0o600) },
		"dead link": func(p string) error { return os.Symlink("nowhere", p) },
	} {
		t.Run(name, func(t *testing.T) {
			p := path(t)
			if err := make(p); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(p)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := sockpath.Listen(p); err == nil || !strings.Contains(err.Error(), p) || !strings.Contains(err.Error(), "not a socket") {
				t.Errorf("%v, want an error that says that %s is not a socket", err, p)
			}
			if after, err := os.Lstat(p); err != nil || !os.SameFile(before, after) {
				t.Errorf("it was replaced: %v", err)
			}
		})
	}
	t.Run("link to a file", func(t *testing.T) {
		p := path(t)
		if err := errors.Join(os.WriteFile(p+"x", nil, 0o600), os.Symlink(p+"x", p)); err != nil {
			t.Fatal(err)
		}
		if _, err := sockpath.Listen(p); err == nil {
			t.Error("want an error")
		}
		if _, err := os.Stat(p); err != nil {
			t.Errorf("it was removed: %v", err)
		}
	})
}

func TestPathLength(t *testing.T) {
	dir := filepath.Dir(path(t))
	longest := dir + "/" + strings.Repeat("x", sockpath.MaxLen-len(dir)-1)
	l, err := sockpath.Listen(longest)
	if err != nil {
		t.Fatalf("path of %d bytes: %v", len(longest), err)
	}
	answers(t, l, longest)
	l.Close()
	for _, p := range []string{longest + "x", strings.Repeat("y", 4096), "/" + strings.Repeat("ü", 54)} {
		_, err := sockpath.Listen(p)
		if err == nil || !strings.Contains(err.Error(), "at most 107") || err.Error() != sockpath.Check(p).Error() {
			t.Errorf("path of %d bytes: %v", len(p), err)
		}
	}
	if _, err := sockpath.Listen(""); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("empty path: %v", err)
	}
	if _, err := sockpath.Listen(dir + "/no/such/folder"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such folder: %v", err)
	}
}

// TestRights: the file has the rights that were asked for, whatever the umask,
// and had no others while nobody had asked for more.
func TestRights(t *testing.T) {
	for _, umask := range []int{0, 0o077} {
		for _, mode := range []os.FileMode{0o600, 0o660, 0o666} {
			p := path(t)
			stale(t, p) // which may have had any rights
			old := unix.Umask(umask)
			group := os.Getgid()
			l, err := sockpath.ListenWith(p, sockpath.Rights{Mode: mode, Group: &group})
			unix.Umask(old)
			if err != nil {
				t.Fatal(err)
			}
			if st, err := os.Lstat(p); err != nil || st.Mode().Perm() != mode {
				t.Errorf("umask %03o, mode %03o: found %v, %v", umask, mode, st.Mode(), err)
			}
			answers(t, l, p)
			l.Close()
			if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket is left behind: %v", err)
			}
		}
	}
	if os.Getuid() != 0 { // only root can give a socket away
		t.Run("not ours to give", notOurs)
		return
	}
	t.Run("another owner", func(t *testing.T) {
		p, owner, group := path(t), 12345, 23456
		l, err := sockpath.ListenWith(p, sockpath.Rights{Mode: 0o640, Owner: &owner, Group: &group})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil || st.Uid != 12345 || st.Gid != 23456 || st.Mode&0o777 != 0o640 {
			t.Errorf("found owner %d, group %d, mode %03o, %v", st.Uid, st.Gid, st.Mode&0o777, err)
		}
	})
}

func notOurs(t *testing.T) {
	p, owner := path(t), 0
	if l, err := sockpath.ListenWith(p, sockpath.Rights{Owner: &owner}); err == nil {
		l.Close()
		t.Error("a socket was given to root")
	}
	if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a socket is left behind: %v", err)
	}
}

// TestRightsAtBirth looks at the file between its creation and the end of
// ListenWith, again and again: at no time may it have more rights than asked
// for.
func TestRightsAtBirth(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	p := path(t)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if st, err := os.Lstat(p); err == nil && st.Mode().Perm() != 0o600 {
				t.Errorf("mode %v", st.Mode())
				return
			}
		}
	}()
	for range 2000 {
		l, err := sockpath.ListenWith(p, sockpath.Rights{Mode: 0o600})
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
	close(stop)
	<-done
}

// TestAccept: every client is passed on until the context ends; then the
// listener is closed.
func TestAccept(t *testing.T) {
	p := path(t)
	l, err := sockpath.Listen(p)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	taken := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- sockpath.Accept(ctx, l, func(err error) { t.Error(err) }, func(c *net.UnixConn) {
			c.Close()
			taken <- struct{}{}
		})
	}()
	for range 3 {
		c, err := net.Dial("unix", p)
		if err != nil {
			t.Fatal(err)
		}
		<-taken
		c.Close()
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	// A listener that somebody else closed.
	if l, err = sockpath.Listen(p); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := sockpath.Accept(t.Context(), l, nil, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want net.ErrClosed", err)
	}
}
