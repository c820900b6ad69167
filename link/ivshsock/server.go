package ivshsock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fdpass"
	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/link"
)

// Server connects the clients of sockets to a link. A client costs two
// goroutines and no thread.
type Server struct {
	Link *link.Link
	// Users are the only ones whose processes may connect; empty: whoever has
	// the right to write the socket's file.
	Users []uint32
	// Log receives one record per arrival, departure and refusal, with the
	// reason; nil is silent. Its handler must not block.
	Log *slog.Logger

	wg      sync.WaitGroup // of the clients
	mu      sync.Mutex     // taken inside the link's, never the other way round
	clients map[uint32]*client
}

// Socket is a socket of a server: its clients take the peer ID *Pin, or if Pin
// is nil the lowest that is free.
type Socket struct {
	*net.UnixListener
	Pin *uint32
}

// Serve takes clients until the context ends, closes the listeners, disconnects
// the clients one by one as if they had left, and returns nil. It fails at once
// on a link that [Check] refuses. The listeners are closed in any case.
func (s *Server) Serve(ctx context.Context, sockets ...Socket) error {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	s.clients = map[uint32]*client{}
	stop := func() {}
	err := Check(s.Link.Config())
	if err == nil {
		stop, err = s.Link.Observe(s)
	}
	if err != nil {
		for _, l := range sockets {
			l.Close()
		}
		return err
	}
	defer stop()
	// The first listener that fails ends the others.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make([]error, len(sockets))
	var accepting sync.WaitGroup
	for i, l := range sockets {
		accepting.Go(func() {
			defer cancel()
			failed[i] = sockpath.Accept(ctx, l.UnixListener, s.cannotAccept, func(c *net.UnixConn) { s.connect(c, l.Pin) })
		})
	}
	accepting.Wait()
	s.end()
	return errors.Join(failed...)
}

func (s *Server) cannotAccept(err error) { s.Log.Error("cannot accept a client", "error", err) }

// connect makes a client a peer. Nobody hears of one that is not there for its
// INIT message, or that there is nothing left for.
func (s *Server) connect(conn *net.UnixConn, pin *uint32) {
	who, err := fdpass.PeerCredentials(conn)
	if err != nil {
		conn.Close()
		s.cannotAccept(err)
		return
	}
	process := slog.Group("process", "pid", who.Pid, "user", who.Uid)
	c, err := newClient(s.Link, conn)
	var peer *link.Peer
	if err == nil {
		if len(s.Users) > 0 && !slices.Contains(s.Users, who.Uid) {
			err = fmt.Errorf("user %d is not allowed", who.Uid)
		} else {
			peer, err = s.Link.AttachExternal(pin, func(id uint32) error { return s.greet(c, id) })
		}
	}
	if err != nil {
		conn.Close() // all that this wire can say
		s.Log.Warn("client refused", process, "reason", err)
		return
	}
	s.Log.Info("peer connected", "id", c.id, process)
	s.wg.Go(func() {
		err := c.run()
		// The order is the protocol's: the client is forgotten, then its entry
		// is cleared, then the others are told.
		s.forget(c)
		peer.Detach()
		if err == nil {
			s.Log.Info("peer disconnected", "id", c.id, process)
		} else {
			s.Log.Warn("peer disconnected", "id", c.id, process, "reason", err)
		}
	})
}

// greet sends INIT, before anybody is told of the new peer.
func (s *Server) greet(c *client, id uint32) error {
	c.id = id
	// A new socket has room for it, so nothing is worth waiting for: others are
	// to be accepted.
	c.conn.SetWriteDeadline(time.Now().Add(time.Second))
	now := make(chan struct{})
	close(now)
	if err := send(c.conn, appendInit(nil, s.Link.Config(), id), unix.UnixRights(s.Link.FD()), now); err != nil {
		return fmt.Errorf("INIT: %w", err)
	}
	c.conn.SetWriteDeadline(time.Time{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients[id] = c
	return nil
}

func (s *Server) forget(c *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.clients, c.id)
}

// Joined implements [link.Observer]: the others are told first, a new client
// of ours hears of the others, and of itself last.
func (s *Server) Joined(id uint32, others []uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	newcomer := s.clients[id]
	told := newTold()
	for _, other := range others {
		if c := s.clients[other]; c != nil {
			told.expect()
			c.push(event{id: id, told: told})
		}
		if newcomer != nil {
			newcomer.push(event{id: other})
		}
	}
	if newcomer != nil {
		newcomer.push(event{id: id, await: told})
		newcomer.joined = true
		newcomer.stalled.Store(0)
	}
}

// Left implements [link.Observer].
func (s *Server) Left(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.clients {
		if c.joined {
			c.push(event{id: id, gone: true})
		}
	}
}

// end disconnects all clients.
func (s *Server) end() {
	s.mu.Lock()
	for _, c := range s.clients {
		c.end(nil)
	}
	s.mu.Unlock()
	s.wg.Wait()
}
