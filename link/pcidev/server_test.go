package pcidev

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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

// await waits until the log contains a text.
func (l *logBuffer) await(t *testing.T, text string) {
	t.Helper()
	for t.Context().Err() == nil {
		l.mu.Lock()
		found := strings.Contains(l.buf.String(), text)
		l.mu.Unlock()
		if found {
			return
		}
		unix.Nanosleep(&unix.Timespec{Nsec: 1e5}, nil)
	}
}

type service struct {
	path string
	log  logBuffer
	link *link.Link
}

func serve(t *testing.T, c link.Config) *service {
	t.Helper()
	dir, err := os.MkdirTemp("", "pcidev")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{path: filepath.Join(dir, "link"), link: newLink(t, c)}
	listener, err := Listen(s.path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	server := &Server{Link: s.link, Log: slog.New(slog.NewTextHandler(&s.log, nil))}
	go func() { done <- server.Serve(ctx, listener) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(s.path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
		os.RemoveAll(dir)
	})
	return s
}

func (s *service) dial(t *testing.T) *vfiouser.Client {
	t.Helper()
	c, err := vfiouser.Dial(t.Context(), s.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func register(t *testing.T, c *vfiouser.Client, offset uint64) uint32 {
	t.Helper()
	var p [4]byte
	if err := c.ReadRegion(bar0, offset, p[:]); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint32(p[:])
}

func TestServerPeersComeAndGo(t *testing.T) {
	s := serve(t, link.Config{Peers: 2, Vectors: 2})
	a, b := s.dial(t), s.dial(t)
	if got := register(t, a, regID); got != 0 {
		t.Errorf("first peer: ID %d", got)
	}
	if got := register(t, b, regID); got != 1 {
		t.Errorf("second peer: ID %d", got)
	}
	// One too many: refused with a reason; the others do not notice.
	_, err := vfiouser.Dial(t.Context(), s.path)
	if !errors.Is(err, vfiouser.ErrRefused) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("one client too many: got %v, want EBUSY", err)
	}
	s.log.await(t, "client refused")
	if got := register(t, a, regMaxPeers); got != 2 {
		t.Errorf("afterwards: Maximum Peers %d", got)
	}
	// Its ID is free again when a peer left.
	a.Close()
	s.log.await(t, `msg="peer disconnected" id=0`)
	if got := register(t, s.dial(t), regID); got != 0 {
		t.Errorf("after a departure: ID %d", got)
	}
}

// TestServerManyRefusals lets many surplus clients come that say nothing:
// they hold up nobody.
func TestServerManyRefusals(t *testing.T) {
	s := serve(t, link.Config{Peers: 2, Vectors: 1})
	a := s.dial(t)
	s.dial(t)
	for range 3 * maxRefusals {
		c, err := net.Dial("unix", s.path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if got := register(t, a, regMaxPeers); got != 2 {
		t.Errorf("Maximum Peers %d", got)
	}
}

// TestServerViolation breaks the protocol on one connection: that one ends,
// with a reason in the log, and its state is 0 for the others.
func TestServerViolation(t *testing.T) {
	s := serve(t, link.Config{Peers: 2, Vectors: 1})
	good := s.dial(t)
	conn, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// A header of 16 bytes: ID 1, VERSION, a size that no message has.
	if _, err := conn.Write([]byte{1, 0, 1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	s.log.await(t, `level=WARN msg="peer disconnected" id=1`)
	s.log.await(t, "broke the protocol")
	if got := register(t, good, regID); got != 0 {
		t.Errorf("the other peer: ID %d", got)
	}
}

// TestServerDeath ends a connection in the middle of a message.
func TestServerDeath(t *testing.T) {
	s := serve(t, link.Config{Peers: 2, Vectors: 1})
	a, b := s.dial(t), s.dial(t)
	fd := eventfd(t, 0, 0)
	if err := a.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger, EventFD: true, Count: 1, FDs: []int{fd}}); err != nil {
		t.Fatal(err)
	}
	if err := a.WriteRegion(bar0, regControl, []byte{1, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if err := b.WriteRegion(bar0, regState, []byte{5, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	var n [8]byte
	if _, err := unix.Read(fd, n[:]); err != nil {
		t.Fatal(err)
	}
	b.Close()
	if _, err := unix.Read(fd, n[:]); err != nil { // blocks until the interrupt
		t.Fatal(err)
	}
	var p [4]byte
	if err := a.ReadRegion(bar2, 4, p[:]); err != nil {
		t.Fatal(err)
	}
	if got := binary.LittleEndian.Uint32(p[:]); got != 0 {
		t.Errorf("state of the dead peer: got %d, want 0", got)
	}
}

// TestServerEndsRefusals ends the service while a surplus client has not said
// anything yet: when Serve returns, that connection is closed as well.
func TestServerEndsRefusals(t *testing.T) {
	dir, err := os.MkdirTemp("", "pcidev")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "link")
	listener, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	var log logBuffer
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	server := &Server{Link: newLink(t, link.Config{Peers: 2, Vectors: 1}), Log: slog.New(slog.NewTextHandler(&log, nil))}
	go func() { done <- server.Serve(ctx, listener) }()
	var fds []int
	for range 3 {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	log.await(t, "client refused")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for i, fd := range fds {
		if n, _, err := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_DONTWAIT); n != 0 || err != nil {
			t.Errorf("connection %d after the end: got %d, %v, want it to be closed", i, n, err)
		}
	}
}
