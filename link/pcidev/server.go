package pcidev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fdpass"
	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// maxSilent bounds how many clients may be connected that have not said
// anything yet, and maxSilence how long each may: a client that means it takes
// milliseconds. The next ones wait in the socket's queue meanwhile, and nobody
// loses its place: what a client has sent counts, also where the service is
// late to read it because a thousand come at once. A socket that is one peer's
// needs less.
const (
	maxSilent       = 64
	maxSilentPinned = 2
	maxSilence      = time.Second
)

// Server connects the clients of a socket to a link, one function for each.
// Each connection has a thread.
type Server struct {
	Link    *link.Link
	Options Options
	// Users are the only ones whose processes may connect; empty: whoever has
	// the right to write the socket's file.
	Users []uint32
	// Log receives one record per arrival, departure and refusal, with the
	// reason; nil is silent. Its handler must not block.
	Log *slog.Logger

	wg     sync.WaitGroup
	mu     sync.Mutex
	conns  map[io.Closer]struct{} // of all goroutines of wg
	silent chan struct{}          // one for each silent client, and for the next to come
}

// Listen makes a link's socket. A socket that a dead service left behind is
// replaced; anything else that exists at path is an error.
func Listen(path string) (*net.UnixListener, error) { return sockpath.Listen(path) }

// Serve takes clients until the context ends, then closes the listener and
// all connections, waits for them, and returns nil.
func (s *Server) Serve(ctx context.Context, listener *net.UnixListener) error {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	s.conns = map[io.Closer]struct{}{}
	limit := maxSilent
	if s.Options.Pin != nil {
		limit = maxSilentPinned
	}
	s.silent = make(chan struct{}, limit)
	s.silent <- struct{}{}
	defer s.end()
	return sockpath.Accept(ctx, listener, func(err error) {
		s.Log.Error("cannot accept a client", "error", err)
	}, func(conn *net.UnixConn) {
		s.connect(conn)
		select {
		case s.silent <- struct{}{}:
		case <-ctx.Done():
		}
	})
}

// connect serves a client in a goroutine. It becomes a peer when it has made
// itself known by a VERSION message.
func (s *Server) connect(conn *net.UnixConn) {
	spoke := sync.OnceFunc(func() { <-s.silent })
	who, err := fdpass.PeerCredentials(conn)
	if err != nil {
		spoke()
		conn.Close()
		s.Log.Error("cannot serve a client", "error", err)
		return
	}
	process := slog.Group("process", "pid", who.Pid, "user", who.Uid)
	var f *Function
	v, err := vfiouser.NewServer(conn, func() (vfiouser.Device, error) {
		spoke()
		if len(s.Users) > 0 && !slices.Contains(s.Users, who.Uid) {
			return nil, fmt.Errorf("user %d is not allowed: %w", who.Uid, unix.EACCES)
		}
		var err error
		if f, err = New(s.Link, s.Options); err != nil {
			return nil, refusal(err)
		}
		s.Log.Info("peer connected", "id", f.ID(), process)
		return f, nil
	}, vfiouser.ServerOptions{VersionTimeout: maxSilence})
	if err != nil {
		spoke()
		s.Log.Error("cannot serve a client", process, "error", err)
		return
	}
	s.start(v, func() {
		err := s.run(v)
		spoke()
		ended := err == nil || errors.Is(err, net.ErrClosed)
		switch {
		case f == nil && ended:
			s.Log.Info("client ended without a VERSION message", process)
			return
		case f == nil:
			s.Log.Warn("client refused", process, "reason", err)
			return
		}
		f.Close()
		if ended {
			s.Log.Info("peer disconnected", "id", f.ID(), process)
		} else {
			s.Log.Warn("peer disconnected", "id", f.ID(), process, "reason", err)
		}
	})
}

// refusal adds the error number that goes out.
func refusal(err error) error {
	errno := unix.EBUSY
	if !errors.Is(err, link.ErrFull) && !errors.Is(err, link.ErrTaken) {
		errno = unix.ENOMEM
	}
	return &refused{err, errno}
}

type refused struct {
	error
	errno unix.Errno
}

func (r *refused) Unwrap() []error { return []error{r.errno, r.error} }

// run serves a client to its end. Where the shared memory is not sealed, a
// peer can cut the file short; that ends the connections that touch it, and
// nothing else.
func (s *Server) run(v *vfiouser.Server) (err error) {
	if s.Link.Sealed() {
		return v.Run()
	}
	if fault := mem.Guard(func() { err = v.Run() }); fault != nil {
		return fault
	}
	return err
}

// start runs what has to do with a connection, until the end at the latest.
// Only the loop of Serve calls it.
func (s *Server) start(v *vfiouser.Server, run func()) {
	s.mu.Lock()
	s.conns[v] = struct{}{}
	s.mu.Unlock()
	s.wg.Go(func() {
		// Never unlocked, so a thread ends with the connection: those of a
		// crowd that has left do not stay.
		defer runtime.LockOSThread()
		run()
		s.mu.Lock()
		delete(s.conns, v)
		s.mu.Unlock()
	})
}

func (s *Server) end() {
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}
