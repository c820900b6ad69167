package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/fdpass"
	"github.com/ivshmem-go/ivshmem/internal/ports"
	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// A `ports serve` listens on a socket in its directory. Who connects says one
// thing and gets one answer, both in JSON. Everybody may ask for the list; the
// rest is for its user and root.

type controlRequest struct {
	Do       string // list, add, remove, rename, resize
	Name     string
	New      string          `json:",omitempty"`
	Console  bool            `json:",omitempty"`
	Settings *ports.Settings `json:",omitempty"`
	Size     *console.Size   `json:",omitempty"`
}

type controlAnswer struct {
	Ports []ports.Status `json:",omitempty"`
	Path  string         `json:",omitempty"`
	Error string         `json:",omitempty"`
	Exit  int            `json:",omitempty"` // the exit code for Error
}

const (
	// mostRequest is how many bytes of a request are read.
	mostRequest = 64 << 10
	// mostAsking is how many are answered at a time: those who may ask for
	// everything, and as many others.
	mostAsking = 16
	// requestPatience is for how long a request is waited for.
	requestPatience = time.Second
)

// answerControl answers until the context ends. What it returns waits for that.
func (p *program) answerControl(ctx context.Context, s *ports.Service) (wait func()) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := answerAll(ctx, s, p.warn, mayAll, requestPatience); err != nil {
			p.warn(err)
		}
	}()
	return func() { <-ended }
}

// mayAll reports whether who connected may ask for everything.
func mayAll(conn *net.UnixConn) bool {
	cred, err := fdpass.PeerCredentials(conn)
	return err == nil && (cred.Uid == 0 || cred.Uid == uint32(os.Geteuid()))
}

// answerAll answers who connects and asks within patience. Those who may ask for
// the list only cannot keep the others from being answered: where none of their
// places is free they are told so.
func answerAll(ctx context.Context, s *ports.Service, failed func(error), mayAll func(*net.UnixConn) bool, patience time.Duration) error {
	own, others := make(chan struct{}, mostAsking), make(chan struct{}, mostAsking)
	return sockpath.Accept(ctx, s.Control(), failed, func(conn *net.UnixConn) {
		places, all := others, mayAll(conn)
		if all {
			places = own
		}
		if !all && len(places) == cap(places) {
			conn.SetDeadline(time.Now().Add(patience))
			json.NewEncoder(conn).Encode(controlAnswer{Error: "too many users ask at a time: try again", Exit: exitBusy})
			conn.Close()
			return
		}
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			conn.Close()
			return
		}
		go func() {
			defer func() { <-places }()
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			var r controlRequest
			if err := json.NewDecoder(io.LimitReader(conn, mostRequest)).Decode(&r); err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(controlPatience))
			ctx, cancel := context.WithTimeout(ctx, controlPatience/2)
			defer cancel()
			json.NewEncoder(conn).Encode(answer(ctx, s, all, r))
		}()
	})
}

func answer(ctx context.Context, s *ports.Service, mayAll bool, r controlRequest) (a controlAnswer) {
	if r.Do == "list" {
		a.Ports = s.List()
		return a
	}
	var err error
	if !mayAll {
		err = fmt.Errorf("the ports are served by another user: run as root: %w", fs.ErrPermission)
	}
	if err == nil {
		c := console.PortConfig{Name: r.Name, Console: r.Console}
		switch r.Do {
		case "add":
			a.Path, err = s.Add(ctx, c, r.Settings)
		case "remove":
			err = s.Remove(ctx, r.Name)
		case "rename":
			a.Path, err = s.Rename(ctx, r.Name, r.New)
		case "resize":
			if r.Size != nil {
				err = s.Resize(r.Name, *r.Size)
			}
		default:
			err = fmt.Errorf("%q: expected list, add, remove, rename or resize", r.Do)
		}
	}
	if err != nil {
		a.Error = err.Error()
		switch {
		case errors.Is(err, console.ErrBusy):
			a.Exit = exitBusy
		case errors.Is(err, console.ErrNotCarried), errors.Is(err, ports.ErrNotHere):
			a.Exit = exitNotSupported
		case errors.Is(err, ports.ErrNoPort):
			a.Exit = exitNotFound
		default:
			a.Exit = exitCode(err)
		}
	}
	return a
}

// controlError is what the service answered.
type controlError struct {
	text string
	exit int
}

func (e *controlError) Error() string { return e.text }

// Is lets the exit code be what the service says.
func (e *controlError) Is(target error) bool {
	return target == map[int]error{exitNotFound: ivshmem.ErrNotFound, exitBusy: ivshmem.ErrBusy, exitNotSupported: ivshmem.ErrNotSupported}[e.exit]
}

// askPorts asks the service of a directory.
func askPorts(dir string, r controlRequest) (a controlAnswer, err error) {
	path := filepath.Join(dir, ports.ControlFile)
	conn, err := net.Dial("unix", path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return a, fmt.Errorf("%w: no `ivshctl ports serve` runs with the directory %s: start it, or name its --dir", ivshmem.ErrNotFound, dir)
	}
	if err != nil {
		return a, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(controlPatience))
	asked := json.NewEncoder(conn).Encode(r) // it may have been refused before
	if err := json.NewDecoder(conn).Decode(&a); err != nil {
		return a, fmt.Errorf("%s: %w", path, errors.Join(asked, err))
	}
	if a.Error != "" {
		return a, &controlError{a.Error, a.Exit}
	}
	return a, nil
}

// listPorts asks for the list.
func listPorts(dir string) ([]ports.Status, error) {
	a, err := askPorts(dir, controlRequest{Do: "list"})
	return a.Ports, err
}
