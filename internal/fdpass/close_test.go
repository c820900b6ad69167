package fdpass

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
