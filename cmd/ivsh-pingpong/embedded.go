package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/pingpong"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/stream"
)

// embedded serves a link and runs two peer processes of this program on it.
// The first to connect gets ID 0 and measures; its output is the program's.
func (s *settings) embedded(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "ivsh-pingpong")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "link")
	config := link.Config{Peers: uint32(2 + s.peers), Vectors: 3, ReadWrite: 4096, Output: 4096}
	if s.over != pingpong.Section {
		// Memory that nobody touches costs nothing.
		config.Output = 16 << 20
	}
	l, err := link.New(config)
	if err != nil {
		return err
	}
	defer l.Close()
	listener, err := pcidev.Listen(socket)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- (&pcidev.Server{Link: l}).Serve(ctx, listener) }()

	idle, err := s.idlePeers(socket)
	if err == nil {
		err = s.processes(ctx, socket)
	}
	for _, d := range idle {
		d.Close()
	}
	cancel()
	return errors.Join(err, <-served)
}

// idlePeers takes the first peer IDs, each with an endpoint that does nothing.
func (s *settings) idlePeers(socket string) (idle []*ivshmem.Device, err error) {
	for range s.peers {
		d, err := ivshmem.Open(socket)
		if err != nil {
			return idle, err
		}
		idle = append(idle, d)
		if s.over != pingpong.Section {
			if _, err := stream.New(d, stream.Config{Mode: stream.Sleep}); err != nil {
				return idle, err
			}
		}
	}
	return idle, nil
}

// processes runs both peers. Which of them gets the lower ID does not matter:
// each prints what it measured, and only that one measures.
func (s *settings) processes(ctx context.Context, socket string) error {
	// When one fails, the other would wait in vain.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	exits := make(chan error, 2)
	for i := range 2 {
		cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"--device", socket}, os.Args[1:]...)...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), embeddedPeer+"="+strconv.Itoa(s.peers))
		cmd.Stdout, cmd.Stderr = s.out, s.err
		cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
		go func() {
			// The kernel takes the end of the thread that starts a child for
			// the end of its parent, so the thread has to stay; and the child
			// inherits the CPUs of the thread.
			runtime.LockOSThread()
			exits <- s.runOn(i, cmd)
		}()
	}
	var first error
	for range 2 {
		if err := <-exits; err != nil && first == nil {
			first = fmt.Errorf("peer process: %w", err)
			cancel()
		}
	}
	return first
}

// runOn runs a peer process, on a CPU of its own if --cpus names some.
func (s *settings) runOn(i int, cmd *exec.Cmd) error {
	if s.cpus != nil {
		var set unix.CPUSet
		set.Set(s.cpus[i])
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("run on CPU %d: %w", s.cpus[i], err)
		}
	}
	return cmd.Run()
}
