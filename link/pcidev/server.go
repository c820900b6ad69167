package pcidev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fdpass"
	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// maxRefusals bounds how many surplus clients are told so at the same time;
// more are just closed.
const maxRefusals = 64

// Server connects the clients of a socket to a link, one function for each.
type Server struct {
	Link    *link.Link
	Options Options
	// Log receives one record per arrival, departure and refusal, with the
	// reason; nil is silent.
	Log *slog.Logger

	refusing chan struct{}
	wg       sync.WaitGroup
	mu       sync.Mutex
	conns    map[io.Closer]struct{} // of all goroutines of wg
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
	s.refusing = make(chan struct{}, maxRefusals)
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	defer s.end()
	for {
		conn, err := listener.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			if conn != nil {
				conn.Close()
			}
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOBUFS):
			// Out of descriptors or memory: this client cannot be served, but those
			// that are connected go on. The pending connection stays in the
			// backlog, so accepting again at once would spin.
			s.Log.Error("cannot accept a client", "error", err)
			if !pause(ctx) {
				return nil
			}
		case errors.Is(err, unix.ECONNABORTED):
		case err != nil:
			listener.Close()
			return fmt.Errorf("accept: %w", err)
		default:
			s.connect(conn)
		}
	}
}

// connect makes a function for a client and serves it in a goroutine.
func (s *Server) connect(conn *net.UnixConn) {
	who := credentials(conn)
	f, err := New(s.Link, s.Options)
	if err != nil {
		s.Log.Warn("client refused", "process", who, "reason", err)
		errno := unix.EBUSY
		if !errors.Is(err, link.ErrFull) {
			errno = unix.ENOMEM
		}
		s.refuse(conn, errno)
		return
	}
	v, err := vfiouser.NewServer(conn, f, vfiouser.ServerOptions{})
	if err != nil {
		f.Close()
		s.Log.Error("cannot serve a client", "process", who, "error", err)
		return
	}
	s.Log.Info("peer connected", "id", f.ID(), "process", who)
	s.start(v, func() {
		err := v.Run()
		f.Close()
		switch {
		case err == nil, errors.Is(err, net.ErrClosed):
			s.Log.Info("peer disconnected", "id", f.ID(), "process", who)
		default:
			s.Log.Warn("peer disconnected", "id", f.ID(), "process", who, "reason", err)
		}
	})
}

// refuse tells a surplus client why it is turned away, without holding up
// anybody else.
func (s *Server) refuse(conn *net.UnixConn, errno unix.Errno) {
	select {
	case s.refusing <- struct{}{}:
	default:
		conn.Close()
		return
	}
	s.start(conn, func() {
		defer func() { <-s.refusing }()
		vfiouser.Refuse(conn, errno)
	})
}

// start runs what has to do with a connection, until the end at the latest.
// Only the loop of Serve calls it.
func (s *Server) start(conn io.Closer, run func()) {
	s.mu.Lock()
	s.conns[conn] = struct{}{}
	s.mu.Unlock()
	s.wg.Go(func() {
		run()
		s.mu.Lock()
		delete(s.conns, conn)
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

// credentials names the process at the other end of a socket, for the log.
func credentials(conn *net.UnixConn) string {
	u, err := fdpass.PeerCredentials(conn)
	if err != nil {
		return "unknown"
	}
	return fmt.Sprintf("%d (user %d)", u.Pid, u.Uid)
}

// pause waits before the next try of something that failed for want of
// resources; it is false when the context ended.
func pause(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(100 * time.Millisecond):
		return true
	}
}
