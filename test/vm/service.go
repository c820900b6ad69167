package vm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// Service is an `ivshctl serve` of this source that runs beside the guests.
type Service struct {
	// Socket is the path of the link's socket.
	Socket string
	// QEMU is what the service told to add to QEMU's command line, besides
	// the device.
	QEMU []string
	*Child

	dir string
}

// Serve starts the service of a link with options of `ivshctl serve`, and
// returns when it is ready. Its log goes to log, which may be nil.
func Serve(ctx context.Context, log io.Writer, options ...string) (*Service, error) {
	ivshctl, err := HostBinary(ctx, "ivshctl")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "ivshmem-link-")
	if err != nil {
		return nil, err
	}
	s := &Service{Socket: filepath.Join(dir, "link.sock"), dir: dir}
	cmd := exec.Command(ivshctl, append([]string{"serve", "--socket", s.Socket}, options...)...)
	ready := &readiness{line: "ready " + s.Socket + "\n", ready: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = ready, log
	if s.Child, err = StartChild(cmd); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	select {
	case <-ready.ready:
		for line := range strings.Lines(ready.text()) {
			if f := strings.Fields(line); len(f) == 2 && f[0][0] == '-' && !strings.Contains(line, "vfio-user-pci") {
				s.QEMU = append(s.QEMU, f...)
			}
		}
		return s, nil
	case <-s.Done():
		err = fmt.Errorf("ivshctl serve: %w\n%s", s.Kill(), ready.text())
	case <-ctx.Done():
		err = ctx.Err()
	}
	s.Close()
	return nil, err
}

// HostBinary builds a command of this source for the host and returns its path.
func HostBinary(ctx context.Context, name string) (string, error) {
	cache, err := fetch.Open(nil)
	if err != nil {
		return "", err
	}
	binaries, err := Binaries(ctx, cache.Dir, runtime.GOARCH)
	if err != nil {
		return "", err
	}
	if binaries[name] == "" {
		return "", fmt.Errorf("this source has no command %s", name)
	}
	return binaries[name], nil
}

// Close kills the service and removes its socket.
func (s *Service) Close() {
	_ = s.Kill()
	os.RemoveAll(s.dir)
}

// readiness waits for a line in what is written to it.
type readiness struct {
	line  string
	ready chan struct{}

	mu   sync.Mutex
	got  bytes.Buffer
	done bool
}

func (r *readiness) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.done {
		r.got.Write(p)
		if strings.Contains(r.got.String(), r.line) {
			r.done = true
			close(r.ready)
		}
	}
	return len(p), nil
}

func (r *readiness) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.got.String()
}
