package evfd_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
)

var sleeps = map[string]evfd.Sleep{"thread": evfd.SleepThread, "poller": evfd.SleepPoller}

// set returns a set of eventfds, tagged with their index.
func set(t testing.TB, how evfd.Sleep, fds ...int) *evfd.Set {
	t.Helper()
	s, err := evfd.NewSet(how)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for i, fd := range fds {
		if err := s.Add(fd, unix.EPOLLIN, int32(i)); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// tags waits and returns the tags of what is ready.
func tags(t testing.TB, s *evfd.Set) (tags []int32) {
	t.Helper()
	events, err := s.Wait()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		tags = append(tags, e.Fd)
	}
	slices.Sort(tags)
	return tags
}

func TestSetReady(t *testing.T) {
	for name, how := range sleeps {
		t.Run(name, func(t *testing.T) {
			a, b, c := eventfd(t), eventfd(t), eventfd(t)
			s := set(t, how, a, b, c)
			evfd.Signal(b)
			// Not drained, it stays ready.
			for range 2 {
				if got := tags(t, s); !slices.Equal(got, []int32{1}) {
					t.Errorf("ready: %v, want [1]", got)
				}
			}
			evfd.Signal(a)
			evfd.Signal(c)
			if got := tags(t, s); !slices.Equal(got, []int32{0, 1, 2}) {
				t.Errorf("ready: %v, want [0 1 2]", got)
			}
			evfd.Drain(b)
			evfd.Drain(a)
			if got := tags(t, s); !slices.Equal(got, []int32{2}) {
				t.Errorf("ready: %v, want [2]", got)
			}
		})
	}
}

// Each signal wakes the sleeper: a signal that came between the look and the
// sleep, or while asleep.
func TestSetWakes(t *testing.T) {
	for name, how := range sleeps {
		t.Run(name, func(t *testing.T) {
			const rounds = 2000
			ping, pong := eventfd(t), eventfd(t)
			there, back := set(t, how, ping), set(t, how, pong)
			done := make(chan error, 1)
			go func() {
				for range rounds {
					if _, err := there.Wait(); err != nil {
						done <- err
						return
					}
					if n := evfd.Take(ping); n != 1 {
						done <- fmt.Errorf("%d signals, want 1", n)
						return
					}
					evfd.Signal(pong)
				}
				done <- nil
			}()
			for range rounds {
				evfd.Signal(ping)
				if got := tags(t, back); !slices.Equal(got, []int32{0}) || evfd.Take(pong) != 1 {
					t.Fatalf("ready: %v", got)
				}
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSetHangup(t *testing.T) {
	for name, how := range sleeps {
		t.Run(name, func(t *testing.T) {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(pair[0])
			s := set(t, how)
			if err := s.Add(pair[0], unix.EPOLLRDHUP, -2); err != nil {
				t.Fatal(err)
			}
			result := make(chan []unix.EpollEvent, 1)
			go func() {
				events, err := s.Wait()
				if err != nil {
					t.Error(err)
				}
				result <- slices.Clone(events)
			}()
			unix.Close(pair[1])
			if e := <-result; len(e) != 1 || e[0].Fd != -2 || e[0].Events&unix.EPOLLRDHUP == 0 {
				t.Errorf("events %+v, want a hang-up of -2", e)
			}
		})
	}
}

// More are ready than one call returns: the others come with the next calls.
func TestSetManyReady(t *testing.T) {
	for name, how := range sleeps {
		t.Run(name, func(t *testing.T) {
			fds := make([]int, 100)
			for i := range fds {
				fds[i] = eventfd(t)
				evfd.Signal(fds[i])
			}
			s := set(t, how, fds...)
			seen := map[int32]bool{}
			for len(seen) < len(fds) {
				for _, tag := range tags(t, s) {
					if seen[tag] || !evfd.Drain(fds[tag]) {
						t.Fatalf("%d came twice", tag)
					}
					seen[tag] = true
				}
			}
		})
	}
}

func TestSetErrors(t *testing.T) {
	s := set(t, evfd.SleepThread)
	if err := s.Add(1<<20, unix.EPOLLIN, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("add no descriptor: %v", err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Add(int(f.Fd()), unix.EPOLLIN, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("add a file, which is always ready: %v", err)
	}
}

// parked returns when a goroutine sleeps in Go's poller for a set.
func parked() {
	stacks := make([]byte, 1<<20)
	for {
		for g := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
			if strings.Contains(g, "[IO wait") && strings.Contains(g, "evfd.(*Set).Wait") {
				return
			}
		}
		runtime.Gosched()
	}
}

// Close ends a sleep in the poller, and later waits fail.
func TestSetClose(t *testing.T) {
	for i := range 100 {
		s := set(t, evfd.SleepPoller, eventfd(t))
		result := make(chan error, 1)
		go func() {
			_, err := s.Wait()
			result <- err
		}()
		if i%2 == 0 { // else somewhere on its way
			parked()
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-result; !errors.Is(err, os.ErrClosed) {
			t.Fatalf("wait during Close: %v, want os.ErrClosed", err)
		}
		if _, err := s.Wait(); !errors.Is(err, os.ErrClosed) {
			t.Fatalf("wait after Close: %v, want os.ErrClosed", err)
		}
	}
	s := set(t, evfd.SleepThread)
	s.Close()
	if _, err := s.Wait(); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("thread: wait after Close: %v, want os.ErrClosed", err)
	}
}

// watched is how many epoll instances are watched by others, in this process.
func watched(t *testing.T) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	isEpoll := func(fd string) bool {
		to, _ := os.Readlink("/proc/self/fd/" + fd)
		return to == "anon_inode:[eventpoll]"
	}
	for _, fd := range fds {
		if !isEpoll(fd.Name()) {
			continue
		}
		info, err := os.ReadFile("/proc/self/fdinfo/" + fd.Name())
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(info)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "tfd:" && isEpoll(f[1]) {
				n++
			}
		}
	}
	return n
}

// TestThreadAlone has Go's poller watch only what it has to: it wakes a thread
// for each event.
func TestThreadAlone(t *testing.T) {
	before := watched(t)
	set(t, evfd.SleepThread, eventfd(t))
	if n := watched(t); n != before {
		t.Errorf("%d epoll instances are watched besides, want none", n-before)
	}
	set(t, evfd.SleepPoller, eventfd(t))
	if n := watched(t); n != before+1 {
		t.Errorf("%d epoll instances are watched besides, want that of SleepPoller", n-before)
	}
}

// TestSleepLeavesOthers has a thread sleep until it is woken by a goroutine
// which needs what the thread might keep for 200 us. It does so only after a
// sleep that was brief, so at least every other one would take as long.
func TestSleepLeavesOthers(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	fd := eventfd(t)
	s := set(t, evfd.SleepThread, fd)
	var pairs []time.Duration
	last := time.Hour
	for range 1000 {
		go evfd.Signal(fd)
		begin := time.Now()
		if _, err := s.Wait(); err != nil {
			t.Fatal(err)
		}
		took := time.Since(begin)
		pairs = append(pairs, last+took)
		last = took
		evfd.Drain(fd)
	}
	// Now and then the signal is there first.
	if slices.Sort(pairs); pairs[100] >= 200*time.Microsecond {
		t.Errorf("two sleeps in turn take %v at least", pairs[100])
	}
}
