package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/ivshsock"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
)

// service is a link and how it is served.
type service struct {
	config  link.Config
	options pcidev.Options
	// The sockets' paths; "": none.
	socket, ivshmem2 string
	perPeer          bool // a socket for each peer: the paths with .ID behind
	rights           sockpath.Rights
	users            []uint32
	log              *slog.Logger
	// ready is called when everybody can connect.
	ready func(*link.Link) error
}

// run serves the link until the context ends.
func (s *service) run(ctx context.Context) error {
	if err := checkDescriptors(s); err != nil {
		return err
	}
	if err := checkThreads(s); err != nil {
		return err
	}
	if s.ivshmem2 != "" {
		if err := ivshsock.Check(s.config); err != nil {
			return usageError{err}
		}
	}
	l, err := link.New(s.config)
	if err != nil {
		return err
	}
	defer l.Close()
	qemu, err := s.listen(s.socket)
	if err != nil {
		return err
	}
	others, err := s.listen(s.ivshmem2)
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGUSR1)
	defer signal.Stop(asked)
	if err == nil {
		err = s.ready(l)
	}
	if err != nil {
		closeAll(qemu)
		closeAll(others)
		return err
	}
	// The first that fails ends the others.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go s.report(ctx, l, asked)
	running := 0
	ended := make(chan error)
	start := func(serve func(context.Context) error) {
		running++
		go func() { ended <- serve(ctx) }()
	}
	for _, socket := range qemu {
		server := &pcidev.Server{Link: l, Options: s.options, Users: s.users, Log: s.log}
		server.Options.Pin = socket.Pin
		start(func(ctx context.Context) error { return server.Serve(ctx, socket.UnixListener) })
	}
	if len(others) > 0 {
		server := &ivshsock.Server{Link: l, Users: s.users, Log: s.log}
		start(func(ctx context.Context) error { return server.Serve(ctx, others...) })
	}
	for ; running > 0; running-- {
		if e := <-ended; e != nil && err == nil {
			err = e
		}
		cancel()
	}
	return err
}

// report logs what the service uses whenever it is asked to. It gives back what
// memory it can before, so that two reports can be compared.
func (s *service) report(ctx context.Context, l *link.Link, asked <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-asked:
		}
		peers := 0
		for _, p := range l.Snapshot().Peers {
			if p.Present {
				peers++
			}
		}
		debug.FreeOSMemory()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		s.log.Info("in use", "peers", peers, "goroutines", runtime.NumGoroutine(), "heap", m.HeapAlloc)
	}
}

// listen makes the sockets of one kind.
func (s *service) listen(path string) (sockets []ivshsock.Socket, err error) {
	if path == "" {
		return nil, nil
	}
	if !s.perPeer {
		l, err := sockpath.ListenWith(path, s.rights)
		if err != nil {
			return nil, err
		}
		return []ivshsock.Socket{{UnixListener: l}}, nil
	}
	for id := range s.config.Peers {
		l, err := sockpath.ListenWith(fmt.Sprintf("%s.%d", path, id), s.rights)
		if err != nil {
			closeAll(sockets)
			return nil, err
		}
		sockets = append(sockets, ivshsock.Socket{UnixListener: l, Pin: &id})
	}
	return sockets, nil
}

func closeAll(sockets []ivshsock.Socket) {
	for _, s := range sockets {
		s.Close()
	}
}

// joinFlags say who may join a link.
var joinFlags = []cli.Flag{
	&cli.BoolFlag{Name: "socket-per-peer", Usage: "a socket for each peer ID, PATH.0, PATH.1, …, so that roles survive any order of connecting"},
	&cli.StringFlag{Name: "owner", Usage: "`USER` who owns the sockets (default: this one)"},
	&cli.StringFlag{Name: "group", Usage: "`GROUP` of the sockets (default: this user's)"},
	&cli.StringFlag{Name: "socket-mode", Usage: "octal `MODE` of the sockets, such as 0660; to connect takes the right to write (default: as the umask says)"},
	&cli.StringSliceFlag{Name: "allow-user", Usage: "`USER` whose processes may connect, and those of no other; can be repeated"},
}

// join reads joinFlags.
func (s *service) join(c *cli.Context) error {
	s.perPeer = c.Bool("socket-per-peer")
	for _, f := range []struct {
		flag   string
		id     **int
		lookup func(string) (string, error)
	}{
		{"owner", &s.rights.Owner, userID},
		{"group", &s.rights.Group, func(name string) (string, error) {
			g, err := user.LookupGroup(name)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		}},
	} {
		if v := c.String(f.flag); v != "" {
			id, err := parseID(f.flag, v, f.lookup)
			if err != nil {
				return err
			}
			n := int(id)
			*f.id = &n
		}
	}
	if v := c.String("socket-mode"); v != "" {
		mode, err := strconv.ParseUint(v, 8, 9)
		if err != nil || mode&0o200 == 0 {
			return usagef("--socket-mode %q: expected an octal mode with which the owner may connect, such as 0600 or 0660", v)
		}
		s.rights.Mode = os.FileMode(mode)
	}
	for _, v := range c.StringSlice("allow-user") {
		id, err := parseID("allow-user", v, userID)
		if err != nil {
			return err
		}
		s.users = append(s.users, uint32(id))
	}
	return nil
}

func userID(name string) (string, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return "", err
	}
	return u.Uid, nil
}

// parseID reads the name or number of a user or group.
func parseID(flag, s string, lookup func(string) (string, error)) (uint64, error) {
	if id, err := strconv.ParseUint(s, 10, 31); err == nil {
		return id, nil
	}
	text, err := lookup(s)
	if err != nil {
		return 0, usagef("--%s: %w", flag, err)
	}
	return strconv.ParseUint(text, 10, 31)
}

// memoryFile is the file that a name of shared memory stands for: a path, or,
// without a slash, a POSIX shared memory object.
func memoryFile(name string) string {
	if name == "" || strings.Contains(name, "/") {
		return name
	}
	return filepath.Join("/dev/shm", name)
}
