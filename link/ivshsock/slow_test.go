package ivshsock_test

import (
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
)

// recorder is a peer of another kind.
type recorder struct {
	mu     sync.Mutex
	counts map[uint16]int
}

func (r *recorder) Raise(vector uint16) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counts == nil {
		r.counts = map[uint16]int{}
	}
	r.counts[vector]++
}

func (r *recorder) count(vector uint16) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts[vector]
}

func (s *service) attach() *link.Peer {
	s.t.Helper()
	p, err := s.link.Attach(nil, &recorder{})
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

// TestManyMessages: the first set of messages is larger than a socket's buffer,
// and the client slow. Nothing is lost.
func TestManyMessages(t *testing.T) {
	const peers, vectors = 60, 32
	s := serve(t, config(peers+1, vectors))
	for range peers {
		defer s.attach().Detach()
	}
	c := s.greeted()
	if err := c.Setup(); err != nil { // checks the sequence of each peer
		t.Fatal(err)
	}
	if len(c.Eventfds) != peers+1 {
		t.Errorf("eventfds of %d peers, want %d", len(c.Eventfds), peers+1)
	}
}

// TestSlowReader does not read while others come and go. It is told of what is
// then, in the right order, and held up nobody.
func TestSlowReader(t *testing.T) {
	s := serve(t, config(4, 2))
	slow, good := s.dial(), s.dial()
	introduced(t, slow, 1)
	for range 2000 {
		s.attach().Detach()
	}
	stays := s.attach()
	defer stays.Detach()
	for _, c := range []*ivshmemtest.Ivshmem2{good, slow} {
		s.await("the last arrival", func() bool {
			_, err := c.Next(0) // checks the sequence
			if err != nil && !errors.Is(err, unix.EAGAIN) {
				t.Fatal(err)
			}
			return err != nil && len(c.Eventfds[stays.ID()]) == 2
		})
		if err := c.Ring(stays.ID(), 0); err != nil {
			t.Error(err)
		}
	}
}

// TestStuckReader does not read at all: it is disconnected in the end, and the
// others do not notice before that.
func TestStuckReader(t *testing.T) {
	s := serve(t, config(4, 2))
	stuck, good := s.dial(), s.dial()
	told := make(chan error, 1)
	go func() {
		for {
			m, err := good.Next(patience) // checks the sequence
			if err != nil || m.Type == 2 && m.ID == stuck.ID {
				told <- err
				return
			}
		}
	}()
	for i := 0; i < 1<<16 && len(s.present()) == 2; i++ {
		s.attach().Detach()
	}
	s.awaitLog("did not take a message")
	if err := <-told; err != nil {
		t.Fatal(err)
	}
	if got := s.present(); !equal(got, []uint32{1}) {
		t.Errorf("peers: %d", got)
	}
}

// qemu2020 reads a connection as the device of 2020 does after INIT: each read
// has room for 32 bytes, handles the first message in what it has, and takes
// the one descriptor that came, for whatever message that is.
type qemu2020 struct {
	socket  int
	buf     []byte
	vectors map[uint32]uint32 // known vectors of each peer
	leaked  int
}

func (q *qemu2020) read(t *testing.T) (kind, id uint32, end bool) {
	t.Helper()
	room := make([]byte, 32-len(q.buf))
	var oob [64]byte
	n, oobn, _, _, err := unix.Recvmsg(q.socket, room, oob[:], unix.MSG_CMSG_CLOEXEC)
	if err == unix.EINTR {
		return 0, 0, false
	}
	if n == 0 || err != nil {
		return 0, 0, true
	}
	q.buf = append(q.buf, room[:n]...)
	fd := -1
	if list, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(list) > 0 {
		if fds, err := unix.ParseUnixRights(&list[0]); err == nil && len(fds) > 0 {
			fd = fds[0]
			for _, other := range fds[1:] {
				unix.Close(other)
				t.Error("more than one descriptor in a read")
			}
		}
	}
	kind = binary.LittleEndian.Uint32(q.buf)
	size := binary.LittleEndian.Uint32(q.buf[4:])
	if len(q.buf) < int(size) {
		t.Fatalf("a message of %d bytes arrived in pieces", size)
	}
	id = binary.LittleEndian.Uint32(q.buf[8:])
	if kind == 1 {
		if vector := binary.LittleEndian.Uint32(q.buf[12:]); vector != q.vectors[id] {
			t.Fatalf("eventfd of peer %d: vector %d after %d others", id, vector, q.vectors[id])
		}
		if fd < 0 {
			t.Fatalf("the eventfd of peer %d came without a descriptor", id)
		}
		q.vectors[id]++
		unix.Close(fd)
	} else {
		if q.vectors[id] == 0 {
			t.Fatalf("PEER_GONE of peer %d, which is not known", id)
		}
		if fd >= 0 {
			t.Fatalf("PEER_GONE of peer %d took a descriptor", id)
		}
		delete(q.vectors, id)
	}
	if q.buf = q.buf[size:]; len(q.buf) > 0 {
		t.Fatalf("%d bytes of the next message are left behind message type %d: it waits for more to come", len(q.buf), kind)
	}
	return kind, id, false
}

// TestDeviceOf2020 lets others come and go as fast as they can, in front of a
// client with the habits of the device of 2020: no message may be read together
// with another.
func TestDeviceOf2020(t *testing.T) {
	s := serve(t, config(6, 3))
	c := s.greeted()
	q := &qemu2020{socket: c.Socket(), vectors: map[uint32]uint32{}}
	stop := make(chan struct{})
	var churn sync.WaitGroup
	for range 4 {
		churn.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				p, err := s.link.Attach(nil, &recorder{})
				if err != nil {
					t.Error(err)
					return
				}
				unix.Nanosleep(&unix.Timespec{Nsec: 2e5}, nil)
				p.Detach()
			}
		})
	}
	departures := 0
	for departures < 300 {
		kind, _, end := q.read(t)
		if end {
			t.Error("the connection ended")
			break
		}
		if kind == 2 {
			departures++
		}
	}
	close(stop)
	churn.Wait()
}

// TestHalfClosed: to close one direction is to leave.
func TestHalfClosed(t *testing.T) {
	for name, how := range map[string]int{"its writing": unix.SHUT_WR, "its reading": unix.SHUT_RD} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, config(3, 1))
			a, b := s.dial(), s.dial()
			introduced(t, a, 1)
			if err := unix.Shutdown(b.Socket(), how); err != nil {
				t.Fatal(err)
			}
			defer s.attach().Detach() // something to write
			s.await("the departure", func() bool { return strings.Contains(s.log.String(), `msg="peer disconnected" id=1`) })
		})
	}
}

// TestManyClients: 200 clients, all told of each other, cost goroutines and no
// threads.
func TestManyClients(t *testing.T) {
	const n = 200
	s := serve(t, config(n+1, 1))
	goroutines := runtime.NumGoroutine()
	clients := make([]*ivshmemtest.Ivshmem2, n)
	for i := range clients {
		clients[i] = s.greeted()
		clients[i].OwnOnly = true
		if err := clients[i].Setup(); err != nil {
			t.Fatal(err)
		}
	}
	if got := runtime.NumGoroutine() - goroutines; got > 2*n+8 {
		t.Errorf("%d goroutines for %d clients", got, n)
	}
	// The last one rings all, and all hear of it.
	last := s.dial()
	for _, c := range clients {
		if err := last.Ring(c.ID, 0); err != nil {
			t.Fatal(err)
		}
		s.rung(c, 0)
		for len(c.Eventfds) <= n {
			if _, err := c.Next(patience); err != nil {
				t.Fatal(err)
			}
		}
	}
}
