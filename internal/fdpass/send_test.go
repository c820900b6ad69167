package fdpass

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
