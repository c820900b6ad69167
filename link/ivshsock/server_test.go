package ivshsock_test

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

	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/ivshsock"
	"github.com/ivshmem-go/ivshmem/regs"
)

// TestOrder checks the messages of arrivals and departures, and that an ID is
// used again.
func TestOrder(t *testing.T) {
	s := serve(t, config(3, 2))
	a := s.greeted()
	if a.ID != 0 || a.MaxPeers != 3 || a.Vectors != 2 || a.Output != 0 || len(a.Memory) != 64<<10 {
		t.Errorf("INIT: %+v", a)
	}
	introduced(t, a, 0)
	b := s.greeted()
	introduced(t, a, 1)
	introduced(t, b, 0)
	introduced(t, b, 1)
	c := s.greeted()
	for _, p := range []*ivshmemtest.Ivshmem2{a, b} {
		introduced(t, p, 2)
	}
	for id := range uint32(3) { // in the order in which they came, the own ones last
		introduced(t, c, id)
	}

	if err := b.SetState(7); err != nil {
		t.Fatal(err)
	}
	s.rung(a, 0)
	if a.State(1) != 7 {
		t.Errorf("state of peer 1: got %d, want 7", a.State(1))
	}
	b.Close()
	for _, p := range []*ivshmemtest.Ivshmem2{a, c} {
		next(t, p, 2, 1, 0)
		if p.State(1) != 0 {
			t.Errorf("entry of a peer that is gone: %d", p.State(1))
		}
	}
	again := s.greeted()
	if again.ID != 1 {
		t.Fatalf("ID %d, want the free one, 1", again.ID)
	}
	introduced(t, a, 1)
	introduced(t, c, 1)
	for _, id := range []uint32{0, 2, 1} {
		introduced(t, again, id)
	}
	for _, p := range []*ivshmemtest.Ivshmem2{a, c, again} {
		nothing(t, p)
	}
}

// TestOwnEventfdsLast: whoever has all its messages can be rung by everybody,
// also by those who have just read of a departure, after which the service
// waits a moment.
func TestOwnEventfdsLast(t *testing.T) {
	s := serve(t, config(22, 3))
	var there []*ivshmemtest.Ivshmem2
	for range 20 {
		guest := s.attach()
		for _, p := range there {
			introduced(t, p, guest.ID())
		}
		guest.Detach()
		for _, p := range there {
			next(t, p, 2, guest.ID(), 0)
		}
		c := s.dial()
		for _, p := range there {
			for len(p.Eventfds[c.ID]) < 3 { // no time is left for what comes later
				if _, err := p.Next(0); err != nil {
					t.Fatalf("peer %d, which is complete, is not known to peer %d: %v", c.ID, p.ID, err)
				}
			}
		}
		there = append(there, c)
	}
}

// TestOneTooMany: surplus clients are closed, and nobody else notices.
func TestOneTooMany(t *testing.T) {
	s := serve(t, config(2, 2))
	a, b := s.dial(), s.dial()
	introduced(t, a, 1)
	for range 100 {
		if c, err := ivshmemtest.DialIvshmem2(s.path); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("got %+v, %v, want the end of the connection", c, err)
		}
	}
	s.awaitLog("all peers of the link are connected")
	nothing(t, a)
	nothing(t, b)
	if err := a.Ring(1, 1); err != nil {
		t.Fatal(err)
	}
	s.rung(b, 1)
	b.Close()
	next(t, a, 2, 1, 0)
	s.dial()
}

// TestDescriptorsExhausted takes all descriptors away while a client connects:
// it is not served then, those that are there go on, and the next one gets in.
func TestDescriptorsExhausted(t *testing.T) {
	s := serve(t, config(4, 4))
	a := s.dial()
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	limit := was
	limit.Cur = 256
	for _, free := range []int{4, 2, 1} { // for: some of the eventfds as well; being accepted; connecting
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		var fill []int
		for {
			fd, err := unix.Dup(a.Socket())
			if err != nil {
				break
			}
			fill = append(fill, fd)
		}
		for _, fd := range fill[:free] {
			unix.Close(fd)
		}
		client := s.raw()
		s.awaitLog("too many open files")
		if got := s.present(); !equal(got, []uint32{0}) {
			t.Errorf("peers while there are no descriptors: %d", got)
		}
		nothing(t, a)
		unix.Close(client)
		for _, fd := range fill[free:] {
			unix.Close(fd)
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
			t.Fatal(err)
		}
		s.awaitLog("client refused")
		s.log.mu.Lock()
		s.log.buf.Reset()
		s.log.mu.Unlock()
	}
	b := s.dial()
	s.await("the arrival", func() bool {
		for len(a.Eventfds[b.ID]) < 4 {
			if _, err := a.Next(0); err != nil {
				return false
			}
		}
		return true
	})
	if err := a.Ring(b.ID, 3); err != nil {
		t.Fatal(err)
	}
	s.rung(b, 3)
}

// TestAborted connects and leaves at once, many times: whoever hears of it
// hears of the end as well, and everything is given back.
func TestAborted(t *testing.T) {
	s := serve(t, config(3, 2))
	a := s.dial()
	for range 500 {
		unix.Close(s.raw())
	}
	last := s.dial()
	s.await("two peers", func() bool { return len(s.present()) == 2 })
	for len(a.Eventfds[last.ID]) < 2 {
		if _, err := a.Next(patience); err != nil { // checks the sequence
			t.Fatal(err)
		}
	}
	s.await("the end of departures", func() bool {
		_, err := a.Next(0)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		return err != nil && len(a.Eventfds) == 2
	})
}

// TestData sends something, which no client may.
func TestData(t *testing.T) {
	s := serve(t, config(3, 1))
	a, b := s.dial(), s.dial()
	introduced(t, a, 1)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := unix.Sendmsg(b.Socket(), []byte{0}, unix.UnixRights(int(null.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	next(t, a, 2, 1, 0)
	if _, err := b.Next(patience); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want the end of the connection", err)
	}
	s.awaitLog("it sent data")
}

// TestUsers refuses by credentials.
func TestUsers(t *testing.T) {
	me := uint32(os.Getuid())
	s := serve(t, config(2, 1), func(s *ivshsock.Server) { s.Users = []uint32{me + 1} })
	if _, err := ivshmemtest.DialIvshmem2(s.path); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got %v, want the end of the connection", err)
	}
	s.awaitLog("is not allowed")
	serve(t, config(2, 1), func(s *ivshsock.Server) { s.Users = []uint32{me + 1, me} }).dial()
}

// TestPin gives each peer ID a socket: roles survive any order of connecting,
// and connecting again.
func TestPin(t *testing.T) {
	c := config(2, 1)
	c.Protocol = 0x8003
	l, err := link.New(c)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir, err := os.MkdirTemp("", "ivshsock")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := func(id uint32) string { return filepath.Join(dir, string('0'+rune(id))) }
	var sockets []ivshsock.Socket
	for id := range c.Peers {
		listener, err := sockpath.Listen(path(id))
		if err != nil {
			t.Fatal(err)
		}
		sockets = append(sockets, ivshsock.Socket{UnixListener: listener, Pin: &id})
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- (&ivshsock.Server{Link: l}).Serve(ctx, sockets...) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for range 3 {
		for _, id := range []uint32{1, 0} {
			p, err := ivshmemtest.DialIvshmem2(path(id))
			for errors.Is(err, io.EOF) { // the former one is not gone yet
				p, err = ivshmemtest.DialIvshmem2(path(id))
			}
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			// ID 0 is the back-end, whoever came first.
			if want := []uint32{0xc003, 0x8003}[id]; p.ID != id || p.Protocol != want {
				t.Errorf("socket %d: ID %d, protocol %#x, want %#x", id, p.ID, p.Protocol, want)
			}
			unix.Shutdown(p.Socket(), unix.SHUT_RDWR)
		}
	}
}

// TestServiceEnds: the entries are cleared and those who remain are told, one
// after the other. What clients hold stays usable, as the device of 2020 does
// not notice.
func TestServiceEnds(t *testing.T) {
	s := serve(t, config(3, 1))
	clients := []*ivshmemtest.Ivshmem2{s.dial(), s.dial(), s.dial()}
	introduced(t, clients[0], 1)
	introduced(t, clients[0], 2)
	introduced(t, clients[1], 2)
	for i, c := range clients {
		if err := c.SetState(uint32(i) + 1); err != nil {
			t.Fatal(err)
		}
	}
	s.stop()
	for id := range uint32(3) {
		if got := clients[0].State(id); got != 0 {
			t.Errorf("entry of peer %d: %d, want 0", id, got)
		}
	}
	own := clients[1].Eventfds[1][0]
	clients[1].Take(0)
	for _, c := range clients {
		for {
			if _, err := c.Next(patience); errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := unix.Write(own, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Error(err)
	}
	if n, err := clients[1].Take(0); n != 1 || err != nil {
		t.Errorf("an eventfd after the end: %d, %v", n, err)
	}
}

// TestGarbage: a client may write everywhere. The link tells each peer's state
// as that peer has it.
func TestGarbage(t *testing.T) {
	s := serve(t, config(3, 1))
	hostile := s.dial()
	rec := &recorder{}
	p, err := s.link.Attach(nil, rec)
	if err != nil {
		t.Fatal(err)
	}
	p.Store(regs.State, 5)
	for i := range hostile.Memory {
		hostile.Memory[i] = 0xff
	}
	got := s.link.Snapshot().Peers
	if !got[0].External || got[0].State != 0xffffffff || p.StateOf(0) != 0xffffffff {
		t.Errorf("the client's own entry: %+v", got[0])
	}
	if got[1].External || got[1].State != 5 || p.StateOf(1) != 5 {
		t.Errorf("the other's state: %+v, want 5", got[1])
	}
	// A departure clears the entry, and is an interrupt, whatever is there.
	p.Store(regs.InterruptControl, 1)
	hostile.Close()
	s.await("an interrupt", func() bool { return rec.count(0) == 1 })
	if p.StateOf(0) != 0 {
		t.Errorf("state of a client that is gone: %d", p.StateOf(0))
	}
	p.Detach()
}

// TestLarge: sizes have 64 bits.
func TestLarge(t *testing.T) {
	const size = 8 << 30
	rw, err := ivshsock.ReadWrite(2, 1<<30, 5<<30)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, link.Config{Peers: 2, Vectors: 1, ReadWrite: rw, Output: 1 << 30})
	a := s.dial()
	if len(a.Memory) != size || a.Output != 1<<30 {
		t.Fatalf("%d bytes of memory, output sections of %d", len(a.Memory), a.Output)
	}
	a.Memory[size-1] = 42
	if b := s.dial(); b.Memory[size-1] != 42 {
		t.Error("the last byte did not arrive")
	}
}

func TestServeRefusesLink(t *testing.T) {
	l, err := link.New(link.Config{Peers: 2, Vectors: 1, ReadWrite: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l2, err := link.New(link.Config{Peers: 2, Vectors: 1, ReadWrite: 8192})
	if err != nil {
		t.Fatal(err)
	}
	defer l2.Close()
	err = (&ivshsock.Server{Link: l2}).Serve(t.Context(), ivshsock.Socket{UnixListener: listener})
	if err == nil || !strings.Contains(err.Error(), "power of two") {
		t.Errorf("got %v", err)
	}
	if _, err := listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener: %v, want it to be closed", err)
	}
}
