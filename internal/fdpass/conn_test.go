package fdpass

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
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

// inSyscall waits until thread tid is inside system call nr.
func inSyscall(t *testing.T, tid int, nr ...int) {
	t.Helper()
	for start := time.Now(); time.Since(start) < patience; runtime.Gosched() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid))
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range nr {
			if bytes.HasPrefix(b, fmt.Appendf(nil, "%d ", n)) {
				return
			}
		}
	}
	t.Fatalf("thread %d does not reach system call %d", tid, nr)
}

// blocked runs f on its own thread and returns its result and the thread.
func blocked(f func() error) (tid int, result chan error) {
	tids := make(chan int)
	result = make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with f
		tids <- unix.Gettid()
		result <- f()
	}()
	return <-tids, result
}

func wait(t *testing.T, result chan error) error {
	t.Helper()
	select {
	case err := <-result:
		return err
	case <-time.After(patience):
		t.Fatal("the call does not return")
		return nil
	}
}

// TestInterrupted: with a tick, a signal ends recvmsg with EINTR whatever the
// handler's flags are (signal(7)).
func TestInterrupted(t *testing.T) {
	c, peer := newConn(t)
	if err := c.SetReceiveTick(patience); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1)
	tid, result := blocked(func() error {
		_, err := c.ReceiveFull(buf, nil, noDeadline)
		return err
	})
	for range 20 {
		inSyscall(t, tid, unix.SYS_RECVMSG)
		if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
	}
	inSyscall(t, tid, unix.SYS_RECVMSG)
	rawSend(t, peer, []byte("x"))
	if err := wait(t, result); err != nil || buf[0] != 'x' {
		t.Errorf("%q, %v", buf, err)
	}
}

func TestCloseWakesReceive(t *testing.T) {
	for name, end := range map[string]func(*Conn){
		"Close":    func(c *Conn) { c.Close() },
		"Shutdown": (*Conn).Shutdown,
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			c, _ := newConn(t)
			buf := make([]byte, 1)
			tid, result := blocked(func() error {
				_, err := c.ReceiveFull(buf, nil, noDeadline)
				return err
			})
			inSyscall(t, tid, unix.SYS_RECVMSG)
			end(c)
			if err := wait(t, result); err != net.ErrClosed {
				t.Errorf("%v, want net.ErrClosed", err)
			}
			if _, err := c.ReceiveFull(buf, nil, noDeadline); err != net.ErrClosed {
				t.Errorf("later: %v", err)
			}
			if err := c.Send(buf, nil); err != net.ErrClosed {
				t.Errorf("later: %v", err)
			}
			if err := c.SetReceiveTick(0); err != net.ErrClosed {
				t.Errorf("later: %v", err)
			}
		})
	}
}

func TestCloseWakesSend(t *testing.T) {
	checkLeaks(t)
	c, _ := newConn(t)
	c.SetSendTimeout(patience * 10)
	tid, result := blocked(func() error { return c.Send(make([]byte, 16<<20), nil) })
	inSyscall(t, tid, pollSyscalls...)
	c.Close()
	if err := wait(t, result); err != net.ErrClosed {
		t.Errorf("%v, want net.ErrClosed", err)
	}
}

// TestNumberNotReused: the kernel gives the number of a closed descriptor to
// the next file. No call that was under way may touch that one.
func TestNumberNotReused(t *testing.T) {
	checkLeaks(t)
	for range 300 {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		c, err := FromFD(fds[0])
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() { c.Close() })
		}
		wg.Go(func() {
			buf := make([]byte, 1)
			for {
				if _, err := c.ReceiveFull(buf, nil, noDeadline); err != nil {
					return
				}
				t.Error("a byte that was not for this connection")
			}
		})
		// The other files, with a byte to steal.
		for range 4 {
			var other [2]int
			if other, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				t.Fatal(err)
			}
			rawSend(t, other[1], []byte("x"))
			runtime.Gosched()
			if n, _, err := unix.Recvfrom(other[0], make([]byte, 2), unix.MSG_DONTWAIT); n != 1 || err != nil {
				t.Errorf("%d bytes, %v: somebody took it", n, err)
			}
			CloseAll(other[:])
		}
		wg.Wait()
		unix.Close(fds[1])
	}
}

// TestClosedByTheLast: while a call is between its first look and the system
// call, the number must stay taken.
func TestClosedByTheLast(t *testing.T) {
	checkLeaks(t)
	c, _ := newConn(t)
	if !c.enter() {
		t.Fatal("a new connection is closed")
	}
	c.Close()
	if _, err := unix.FcntlInt(uintptr(c.fd), unix.F_GETFD, 0); err != nil {
		t.Errorf("closed under a call: %v", err)
	}
	c.leave()
	if _, err := unix.FcntlInt(uintptr(c.fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("not closed by the last call: %v", err)
	}
}

func TestFromFD(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	c, err := FromFD(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if flags, err := unix.FcntlInt(uintptr(c.FD()), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v: close-on-exec was expected", flags, err)
	}
	if flags, err := unix.FcntlInt(uintptr(c.FD()), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %#x, %v: blocking was expected", flags, err)
	}
}

func TestFD(t *testing.T) {
	c, _ := newConn(t)
	fd := c.FD()
	if fd < 0 {
		t.Fatal(fd)
	}
	c.Shutdown()
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if n, err := unix.Poll(p, 0); c.FD() != fd || n != 1 || p[0].Revents&(unix.POLLHUP|unix.POLLRDHUP) != unix.POLLHUP|unix.POLLRDHUP {
		t.Errorf("after Shutdown: %d, %v, %+v", c.FD(), err, p)
	}
	c.Close()
	c.Close()
	if c.FD() != -1 {
		t.Errorf("after Close: %d", c.FD())
	}
}

func TestSend(t *testing.T) {
	checkLeaks(t)
	c, peer := newConn(t)
	other, err := FromFD(dup(t, peer))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	ends := pipeEnds(t, MaxFDs)
	// More than the socket holds: the descriptors go with the first byte only.
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
	sent := make(chan error, 1)
	go func() { sent <- c.Send(big, ends) }()
	first := make([]byte, 1)
	fds, err := other.ReceiveFull(first, make([]int, 0, MaxFDs), noDeadline)
	if err != nil || len(fds) != MaxFDs || first[0] != '0' {
		t.Fatalf("%d descriptors, %v", len(fds), err)
	}
	for i, fd := range fds {
		if inode(t, fd) != inode(t, ends[i]) {
			t.Fatalf("descriptor %d is another file", i)
		}
	}
	CloseAll(fds)
	rest := make([]byte, len(big)-1)
	if _, err := other.ReceiveFull(rest, nil, noDeadline); err != nil || !bytes.Equal(rest, big[1:]) {
		t.Errorf("the rest differs, %v", err)
	}
	if err := wait(t, sent); err != nil {
		t.Error(err)
	}
	for _, bad := range []error{
		c.Send([]byte("x"), make([]int, MaxFDs+1)),
		c.Send(nil, ends[:1]),
	} {
		if !errors.Is(bad, unix.EINVAL) {
			t.Errorf("%v, want EINVAL", bad)
		}
	}
	if err := c.Send([]byte("x"), []int{-1}); !errors.Is(err, unix.EBADF) {
		t.Errorf("%v, want EBADF", err)
	}
	if err := c.Send(nil, nil); err != nil {
		t.Error(err)
	}
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestSendToOneWhoDoesNotRead(t *testing.T) {
	c, peer := newConn(t)
	c.SetSendTimeout(10 * time.Millisecond)
	if err := c.Send(make([]byte, 16<<20), nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want os.ErrDeadlineExceeded", err)
	}
	// The limit is for the whole: room now and then does not extend it.
	c, peer = newConn(t)
	c.SetSendTimeout(time.Millisecond)
	stop := make(chan bool)
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 256)
		for {
			select {
			case <-stop:
				return
			default:
				unix.Recvfrom(peer, b, unix.MSG_DONTWAIT)
			}
		}
	})
	if err := c.Send(make([]byte, 64<<20), nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want os.ErrDeadlineExceeded", err)
	}
	close(stop)
	wg.Wait()
	// A peer that is gone is another matter.
	c, peer = newConn(t)
	unix.Shutdown(peer, unix.SHUT_RDWR)
	if err := c.Send([]byte("x"), nil); !errors.Is(err, unix.EPIPE) {
		t.Errorf("%v, want EPIPE", err)
	}
}

func TestFromUnixConn(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dial, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer dial.Close()
	accepted, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	cred, err := PeerCredentials(accepted)
	if err != nil || int(cred.Pid) != os.Getpid() || int(cred.Uid) != os.Getuid() || int(cred.Gid) != os.Getgid() {
		t.Errorf("%+v, %v", cred, err)
	}
	c, err := FromUnixConn(accepted)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := accepted.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the original is still open: %v", err)
	}
	flags, err := unix.FcntlInt(uintptr(c.FD()), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %#x, %v: not blocking was expected", flags, err)
	}
	if flags, _ := unix.FcntlInt(uintptr(c.FD()), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
		t.Error("not close-on-exec")
	}
	if _, err := FromUnixConn(accepted); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed connection: %v", err)
	}
}

func TestFromFDWrongKind(t *testing.T) {
	checkLeaks(t)
	packets, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := FromFD(packets); !errors.Is(err, unix.EPROTOTYPE) {
		t.Errorf("%v, want EPROTOTYPE", err)
	}
	if _, err := FromFD(dup(t, pipeEnds(t, 1)[0])); !errors.Is(err, unix.ENOTSOCK) {
		t.Errorf("%v, want ENOTSOCK", err)
	}
}

func TestNoAllocation(t *testing.T) {
	c, peer := newConn(t)
	other, err := FromFD(dup(t, peer))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.SetReceiveTick(time.Second); err != nil {
		t.Fatal(err)
	}
	ends := pipeEnds(t, 2)
	buf, fds := make([]byte, 64), make([]int, 0, 2)
	if n := testing.AllocsPerRun(500, func() {
		if err := c.Send(buf, ends); err != nil {
			t.Fatal(err)
		}
		got, err := other.ReceiveFull(buf, fds, time.Now().Add(patience))
		if err != nil || len(got) != 2 {
			t.Fatal(got, err)
		}
		CloseAll(got)
	}); n != 0 {
		t.Errorf("%v allocations per message", n)
	}
}
