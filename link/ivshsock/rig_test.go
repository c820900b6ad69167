package ivshsock_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/ivshsock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// service is a link with an ivshmem2 socket.
type service struct {
	t    testing.TB
	link *link.Link
	path string
	log  logBuffer
	stop func() // ends it, and waits for that
}

// config is a link that the wire can carry: 64 KiB in all.
func config(peers uint32, vectors uint16) link.Config {
	return link.Config{Peers: peers, Vectors: vectors, ReadWrite: 60 << 10}
}

func serve(t testing.TB, c link.Config, change ...func(*ivshsock.Server)) *service {
	t.Helper()
	l, err := link.New(c)
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: its paths may be too long for a socket.
	dir, err := os.MkdirTemp("", "ivshsock")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{t: t, link: l, path: filepath.Join(dir, "link")}
	listener, err := sockpath.Listen(s.path)
	if err != nil {
		t.Fatal(err)
	}
	server := &ivshsock.Server{Link: l, Log: slog.New(slog.NewTextHandler(&s.log, nil))}
	for _, f := range change {
		f(server)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, ivshsock.Socket{UnixListener: listener}) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		s.stop()
		l.Close()
		os.RemoveAll(dir)
	})
	return s
}

// dial connects a client, and receives its whole first set of messages.
func (s *service) dial() *ivshmemtest.Ivshmem2 {
	s.t.Helper()
	c := s.greeted()
	if err := c.Setup(); err != nil {
		s.t.Fatal(err)
	}
	return c
}

// greeted is a client that has received INIT only.
func (s *service) greeted() *ivshmemtest.Ivshmem2 {
	s.t.Helper()
	c, err := ivshmemtest.DialIvshmem2(s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// raw is a connection on which nothing has been read.
func (s *service) raw() int {
	s.t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.path}); err != nil {
		s.t.Fatal(err)
	}
	return fd
}

func (s *service) await(what string, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		if time.Now().After(end) {
			s.t.Fatalf("%s: it did not happen\n%s", what, s.log.String())
		}
		unix.Nanosleep(&unix.Timespec{Nsec: 1e5}, nil)
	}
}

func (s *service) awaitLog(text string) {
	s.t.Helper()
	s.await(text, func() bool { return strings.Contains(s.log.String(), text) })
}

// present is the IDs of the peers that the link has.
func (s *service) present() (ids []uint32) {
	for id, p := range s.link.Snapshot().Peers {
		if p.Present {
			ids = append(ids, uint32(id))
		}
	}
	return ids
}

// next receives a message and checks it.
func next(t testing.TB, c *ivshmemtest.Ivshmem2, kind, id, vector uint32) {
	t.Helper()
	m, err := c.Next(patience)
	if err != nil {
		t.Fatalf("peer %d, waiting for message type %d of peer %d: %v", c.ID, kind, id, err)
	}
	if m.Type != kind || m.ID != id || m.Vector != vector {
		t.Fatalf("peer %d received %+v, want type %d, ID %d, vector %d", c.ID, m, kind, id, vector)
	}
}

// introduced receives the eventfds of a peer.
func introduced(t testing.TB, c *ivshmemtest.Ivshmem2, id uint32) {
	t.Helper()
	for v := range c.Vectors {
		next(t, c, 1, id, v)
	}
}

// nothing checks that no message is there.
func nothing(t testing.TB, c *ivshmemtest.Ivshmem2) {
	t.Helper()
	if m, err := c.Next(0); !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("peer %d received %+v, %v, want nothing", c.ID, m, err)
	}
}

// rung waits until a vector was rung.
func (s *service) rung(c *ivshmemtest.Ivshmem2, vector uint32) {
	s.t.Helper()
	s.await("a doorbell", func() bool {
		n, err := c.Take(vector)
		if err != nil {
			s.t.Fatal(err)
		}
		return n > 0
	})
}

func equal(a, b []uint32) bool { return slices.Equal(a, b) }
