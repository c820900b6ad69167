package pcidev

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

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

func serve(t *testing.T, c link.Config, change ...func(*Server)) *service {
	t.Helper()
	return serveLink(t, newLink(t, c), change...)
}

func serveLink(t *testing.T, l *link.Link, change ...func(*Server)) *service {
	t.Helper()
	dir, err := os.MkdirTemp("", "pcidev")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{path: filepath.Join(dir, "link"), link: l}
	listener, err := Listen(s.path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	server := &Server{Link: s.link, Log: slog.New(slog.NewTextHandler(&s.log, nil))}
	for _, f := range change {
		f(server)
	}
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

// TestServerSilence lets clients connect that say nothing, more than there are
// peers and more than the service keeps: none takes a peer's place, those that
// mean it get in, and the ones that said nothing are closed.
func TestServerSilence(t *testing.T) {
	s := serve(t, link.Config{Peers: 2, Vectors: 1})
	a := s.dial(t)
	var silent []int
	for range 2 * maxSilent {
		silent = append(silent, s.connect(t))
	}
	b := s.dial(t)
	if ids := []uint32{register(t, a, regID), register(t, b, regID)}; ids[0] != 0 || ids[1] != 1 {
		t.Errorf("IDs %d, want 0 and 1", ids)
	}
	for _, fd := range silent {
		expectEnd(t, fd)
	}
}

// TestServerCrowd lets hundreds of clients, who have sent their VERSION, stand in
// the queue of the socket before the service begins to accept, and among them
// more that say nothing, or half a header, than the service keeps. Each of the
// first kind becomes a peer; of the others no more stay than are kept.
func TestServerCrowd(t *testing.T) {
	const honest, quiet = 400, 80
	l := newLink(t, link.Config{Peers: honest, Vectors: 1})
	dir, err := os.MkdirTemp("", "pcidev")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s := &service{path: filepath.Join(dir, "link"), link: l}
	listener, err := Listen(s.path)
	if err != nil {
		t.Fatal(err)
	}
	// A header of 16 bytes, ID 1, VERSION, 20 bytes in all; version 0.0.
	hello := []byte{1, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	var speakers, silent []int
	for i := range honest + quiet {
		fd := s.connect(t)
		say := hello
		switch i % 12 {
		case 0:
			say = nil
			silent = append(silent, fd)
		case 6:
			say = hello[:8]
			silent = append(silent, fd)
		default:
			speakers = append(speakers, fd)
		}
		if _, err := unix.Write(fd, say); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	server := &Server{Link: l}
	go func() { done <- server.Serve(ctx, listener) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	refused := 0
	for _, fd := range speakers {
		reply := make([]byte, 20)
		if n, err := unix.Read(fd, reply); n < 16 || err != nil || reply[8] != 1 { // type: reply, no error
			refused++
		}
	}
	if refused > 0 {
		t.Errorf("%d of %d clients that had sent their VERSION did not become peers", refused, honest)
	}
	open := 0
	for _, fd := range silent {
		if _, _, err := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_DONTWAIT); err == unix.EAGAIN {
			open++
		}
	}
	if open > maxSilent {
		t.Errorf("%d of %d silent clients are connected, want at most %d", open, quiet, maxSilent)
	}
	// They do not keep others out.
	for range maxSilent {
		s.connect(t)
	}
	unix.Close(speakers[0])
	for t.Context().Err() == nil {
		c, err := vfiouser.Dial(t.Context(), s.path)
		if err == nil {
			c.Close()
			break
		}
		if !errors.Is(err, unix.EBUSY) { // the ID may not be free yet
			t.Fatal(err)
		}
	}
}

// TestServerUsers refuses a client by its credentials.
func TestServerUsers(t *testing.T) {
	me := uint32(os.Getuid())
	s := serve(t, link.Config{Peers: 2, Vectors: 1}, func(s *Server) { s.Users = []uint32{me + 1, me} })
	a := s.dial(t)
	others := serve(t, link.Config{Peers: 2, Vectors: 1}, func(s *Server) { s.Users = []uint32{me + 1} })
	if _, err := vfiouser.Dial(t.Context(), others.path); !errors.Is(err, vfiouser.ErrRefused) || !errors.Is(err, unix.EACCES) {
		t.Errorf("another user: got %v, want EACCES", err)
	}
	others.log.await(t, "is not allowed")
	if n := len(others.link.Snapshot().Peers); others.link.Snapshot().Peers[0].Present || n != 2 {
		t.Error("the refused client is a peer")
	}
	if got := register(t, a, regID); got != 0 {
		t.Errorf("the user that is allowed: ID %d", got)
	}
}

// TestServerPin gives a socket to each peer: whoever connects gets the ID of
// its socket, in whatever order.
func TestServerPin(t *testing.T) {
	l := newLink(t, link.Config{Peers: 3, Vectors: 1})
	pinned := make([]*service, 3)
	for i := range pinned {
		id := uint32(i)
		pinned[i] = serveLink(t, l, func(s *Server) { s.Options.Pin = &id })
	}
	var clients [3]*vfiouser.Client
	for _, i := range []int{2, 0, 1} {
		clients[i] = pinned[i].dial(t)
		if got := register(t, clients[i], regID); got != uint32(i) {
			t.Errorf("socket %d: ID %d", i, got)
		}
	}
	if _, err := vfiouser.Dial(t.Context(), pinned[1].path); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a second client of a socket: got %v, want EBUSY", err)
	}
	for _, i := range []int{0, 2} {
		clients[i].Close()
		pinned[i].log.await(t, "peer disconnected")
	}
	if got := register(t, pinned[2].dial(t), regID); got != 2 {
		t.Errorf("after a departure of 0 and 2, socket 2: ID %d", got)
	}
}

// TestServerFileCutShort shortens the file behind a link to nothing, as any
// peer can that has it.
func TestServerFileCutShort(t *testing.T) {
	s := serve(t, link.Config{Peers: 3, Vectors: 1, ReadWrite: 4096, File: filepath.Join(t.TempDir(), "memory")})
	hostile, a, b := s.dial(t), s.dial(t), s.dial(t)
	r, err := hostile.Region(bar2)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(r.FD)
	if err := unix.Ftruncate(r.FD, 0); err != nil {
		t.Fatal(err)
	}
	if err := a.WriteRegion(bar0, regState, []byte{7, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	var p [4]byte
	if err := b.ReadRegion(bar2, 4, p[:]); err != nil || p[0] != 7 {
		t.Errorf("state of peer 1: got %x, %v, want 7", p, err)
	}
	// A trapped access to what is not there any more.
	if err := a.ReadRegion(bar2, 4096, p[:]); err == nil {
		t.Error("an access to nothing succeeded")
	}
	s.log.await(t, "cut short")
	if got := register(t, b, regID); got != 2 {
		t.Errorf("afterwards: ID %d", got)
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
	s.log.await(t, `level=WARN msg="client refused"`)
	s.log.await(t, "broke the protocol")
	// The same from one that is a peer.
	peer := s.connect(t)
	hello := []byte{1, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if _, err := unix.Write(peer, append(hello, 2, 0, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)); err != nil {
		t.Fatal(err)
	}
	s.log.await(t, `level=WARN msg="peer disconnected" id=1`)
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

// TestServerEndsSilence ends the service while a client has not said anything
// yet: when Serve returns, that connection is closed as well.
func TestServerEndsSilence(t *testing.T) {
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
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	server := &Server{Link: newLink(t, link.Config{Peers: 2, Vectors: 1})}
	go func() { done <- server.Serve(ctx, listener) }()
	s := &service{path: path}
	var fds []int
	for range 3 {
		fds = append(fds, s.connect(t))
	}
	s.dial(t) // the others have been accepted before
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, fd := range fds {
		if n, _, err := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_DONTWAIT); n != 0 || err != nil {
			t.Errorf("a connection after the end: got %d, %v, want it to be closed", n, err)
		}
	}
}

// connect is a client that says nothing.
func (s *service) connect(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.path}); err != nil {
		t.Fatal(err)
	}
	return fd
}

// expectEnd waits until the service has closed a connection.
func expectEnd(t *testing.T, fd int) {
	t.Helper()
	if n, err := unix.Read(fd, make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("got %d, %v, want the end of the connection", n, err)
	}
}

// TestServerThousandPeers: a state change of one interrupts a thousand others.
func TestServerThousandPeers(t *testing.T) {
	const n = 1000
	s := serve(t, link.Config{Peers: n + 1, Vectors: 1})
	changer := s.dial(t)
	before := usage(t)
	fds := make([]int, n)
	for i := range fds {
		c := s.dial(t)
		fds[i] = eventfd(t, 0, 0) // a read blocks
		if err := c.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger, EventFD: true, Count: 1, FDs: fds[i : i+1]}); err != nil {
			t.Fatal(err)
		}
		if err := c.WriteRegion(bar0, regControl, []byte{1, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
	}
	after := usage(t)
	t.Logf("%d peers, both ends: %d threads, %d KiB of memory", n, after["Threads"]-before["Threads"], after["VmRSS"]-before["VmRSS"])
	for state := byte(1); state < 4; state++ {
		begin := time.Now()
		if err := changer.WriteRegion(bar0, regState, []byte{state, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
		t.Logf("a state change: %v", time.Since(begin))
		for _, fd := range fds {
			var b [8]byte
			if _, err := unix.Read(fd, b[:]); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// usage reads the numbers of /proc/self/status.
func usage(t *testing.T) map[string]int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	numbers := map[string]int{}
	for line := range strings.Lines(string(b)) {
		var n int
		name, value, _ := strings.Cut(line, ":")
		if _, err := fmt.Sscan(value, &n); err == nil {
			numbers[name] = n
		}
	}
	return numbers
}
