package fdpass

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A test that waits this long has failed.
const patience = 20 * time.Second

var noDeadline time.Time

// checkLeaks fails the test if descriptors stay open. Call it first.
func checkLeaks(t *testing.T) {
	t.Helper()
	before := openFDs(t)
	t.Cleanup(func() {
		for fd, what := range openFDs(t) {
			if _, ok := before[fd]; !ok {
				t.Errorf("descriptor %s leaked: %s", fd, what)
			}
		}
	})
}

func openFDs(t testing.TB) map[string]string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(target, "anon_inode:[event") {
			m[e.Name()] = target // the runtime's poller opens its two when it likes
		}
	}
	return m
}

// newConn returns a Conn and the plain other end.
func newConn(t testing.TB) (*Conn, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := FromFD(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); unix.Close(fds[1]) })
	return c, fds[1]
}

// pipeEnds returns n read ends of pipes; the write ends are closed.
func pipeEnds(t testing.TB, n int) []int {
	t.Helper()
	fds := make([]int, n)
	for i := range fds {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		unix.Close(p[1])
		fds[i] = p[0]
	}
	t.Cleanup(func() { CloseAll(fds) })
	return fds
}

func inode(t testing.TB, fd int) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func rawSend(t testing.TB, fd int, b []byte, fds ...int) {
	t.Helper()
	var control []byte
	if len(fds) > 0 {
		control = unix.UnixRights(fds...)
	}
	if n, err := unix.SendmsgN(fd, b, control, nil, unix.MSG_NOSIGNAL); n != len(b) || err != nil {
		t.Fatalf("%d of %d bytes, %v", n, len(b), err)
	}
}

func TestReceive(t *testing.T) {
	checkLeaks(t)
	c, peer := newConn(t)
	ends := pipeEnds(t, MaxFDs)
	rawSend(t, peer, []byte("ab"), ends[0])
	rawSend(t, peer, []byte("c"))
	rawSend(t, peer, []byte("de"), ends[1], ends[2])
	buf := make([]byte, 4)
	fds, err := c.ReceiveFull(buf, make([]int, 0, 3), noDeadline)
	if err != nil || string(buf) != "abcd" || len(fds) != 3 {
		t.Fatalf("%q, %v, %v", buf, fds, err)
	}
	for i, fd := range fds {
		if inode(t, fd) != inode(t, ends[i]) {
			t.Errorf("descriptor %d is another file", i)
		}
		if flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d is not close-on-exec", i)
		}
	}
	CloseAll(fds)
	rawSend(t, peer, []byte("fg"), ends...)
	fds, err = c.ReceiveFull(buf[:3], make([]int, 0, MaxFDs), noDeadline)
	if err != nil || string(buf[:3]) != "efg" || len(fds) != MaxFDs {
		t.Fatalf("%q, %d descriptors, %v", buf[:3], len(fds), err)
	}
	CloseAll(fds)
	if fds, err := c.ReceiveFull(nil, nil, noDeadline); err != nil || fds != nil {
		t.Errorf("nothing to read: %v, %v", fds, err)
	}
}

// TestReceiveErrors: whatever fails, no descriptor stays open, those handed
// in included.
func TestReceiveErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		send string
		fds  int
		have int // descriptors collected before
		room int
		want error
	}{
		{"end before the first byte", "", 0, 2, 4, io.EOF},
		{"end in the middle", "abc", 2, 1, 4, io.ErrUnexpectedEOF},
		{"one too many", "abcd", 3, 0, 2, ErrTooManyFDs},
		{"no room at all", "abcd", 1, 0, 0, ErrTooManyFDs},
		{"too many with the earlier ones", "abcd", 2, 2, 3, ErrTooManyFDs},
		{"as many as the kernel passes", "a", MaxFDs, 0, MaxFDs - 1, ErrTooManyFDs},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkLeaks(t)
			conn, peer := newConn(t)
			ends := pipeEnds(t, c.fds)
			if c.send != "" {
				rawSend(t, peer, []byte(c.send), ends...)
			}
			unix.Shutdown(peer, unix.SHUT_WR)
			have := make([]int, 0, max(c.room, c.have))
			for _, fd := range pipeEnds(t, c.have) {
				dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
				if err != nil {
					t.Fatal(err)
				}
				have = append(have, dup)
			}
			fds, err := conn.ReceiveFull(make([]byte, 4), have[:c.have:max(c.room, c.have)], noDeadline)
			if !errors.Is(err, c.want) || fds != nil {
				t.Errorf("%v, %v, want %v", fds, err, c.want)
			}
		})
	}
}

// TestDescriptorsLost: at the limit of open files the kernel delivers a part.
func TestDescriptorsLost(t *testing.T) {
	checkLeaks(t)
	c, peer := newConn(t)
	ends := pipeEnds(t, 3)
	rawSend(t, peer, []byte("abcd"), ends...)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	next, err := unix.FcntlInt(uintptr(peer), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	few := old
	few.Cur = uint64(next) + 1 // room for one
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	fds, err := c.ReceiveFull(make([]byte, 4), make([]int, 0, 3), noDeadline)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, ErrFDsLost) || fds != nil {
		t.Errorf("%v, %v, want ErrFDsLost", fds, err)
	}
}

func TestReceiveDeadline(t *testing.T) {
	checkLeaks(t)
	c, peer := newConn(t)
	if err := c.SetReceiveTick(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	rawSend(t, peer, []byte("a"), pipeEnds(t, 1)...)
	fds, err := c.ReceiveFull(make([]byte, 2), make([]int, 0, 1), time.Now().Add(10*time.Millisecond))
	if !errors.Is(err, os.ErrDeadlineExceeded) || fds != nil {
		t.Errorf("%v, %v, want os.ErrDeadlineExceeded", fds, err)
	}
	// What is complete is complete, deadline or not; half a message is not.
	rawSend(t, peer, []byte("bc"))
	rawSend(t, peer, []byte("d"), pipeEnds(t, 1)...)
	past := time.Now().Add(-time.Second)
	if _, err := c.ReceiveFull(make([]byte, 2), nil, past); err != nil {
		t.Error(err)
	}
	if _, err := c.ReceiveFull(make([]byte, 2), make([]int, 0, 1), past); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want os.ErrDeadlineExceeded", err)
	}
}
