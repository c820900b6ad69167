package ports

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func peers(t *testing.T) []*ivshmem.Device {
	t.Helper()
	return ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8003, ReadWrite: 1 << 20})
}

// tempDir is a short one.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "p")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// served is a service with its directory.
type served struct {
	*Service
	t   *testing.T
	ctx context.Context
	dir string
	// failures are what Failed was told.
	failures chan error
	stop     func()

	mu    sync.Mutex
	paths []string // that Ready was told
}

// readied are the paths that Ready was told.
func (s *served) readied() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.paths)
}

// serve serves the ports of a console until the test ends, or stop is called.
func serve(t *testing.T, c Console, config Config) *served {
	t.Helper()
	if config.Dir == "" {
		config.Dir = tempDir(t)
	}
	s := &served{t: t, dir: config.Dir, failures: make(chan error, 1000)}
	config.Gone = func(string) {}
	config.Ready = func(path string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.paths = append(s.paths, path)
	}
	config.Failed = func(err error) { s.failures <- err }
	var err error
	if s.Service, err = New(config); err != nil {
		t.Fatal(err)
	}
	var cancel context.CancelFunc
	s.ctx, cancel = context.WithTimeout(context.Background(), 120*time.Second)
	s.Use(c)
	ended := make(chan struct{})
	run, end := context.WithCancel(context.Background())
	go func() {
		defer close(ended)
		s.Run(run)
	}()
	stopped := false
	s.stop = func() {
		if !stopped {
			stopped = true
			end()
			<-ended
			s.Close()
			cancel()
		}
	}
	t.Cleanup(s.stop)
	return s
}

// wait waits for what List says of a file.
func (s *served) wait(file string, f func(Status) bool) Status {
	s.t.Helper()
	for {
		for _, st := range s.List() {
			if st.Path != "" && filepath.Base(st.Path) == file && f(st) {
				return st
			}
		}
		if s.ctx.Err() != nil {
			s.t.Fatalf("%s: never: %+v", file, s.List())
		}
		time.Sleep(time.Millisecond)
	}
}

func there(Status) bool      { return true }
func hereOpen(s Status) bool { return s.OpenHere }

func (s *served) path(file string) string { return filepath.Join(s.dir, file) }

// dial connects to a port's socket when it is there.
func (s *served) dial(file string) *net.UnixConn {
	s.t.Helper()
	for {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.path(file), Net: "unix"})
		if err == nil {
			s.t.Cleanup(func() { c.Close() })
			c.SetDeadline(time.Now().Add(120 * time.Second))
			return c
		}
		if s.ctx.Err() != nil {
			s.t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
}

// both is a device and its driver, and a service on the device's side.
type both struct {
	t      *testing.T
	ctx    context.Context
	device *console.Device
	driver *console.Driver
	s      *served
}

func newBoth(t *testing.T, c console.Config, files Config, all ...console.PortConfig) *both {
	t.Helper()
	p := peers(t)
	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	t.Cleanup(cancel)
	b := &both{t: t, ctx: ctx}
	var err error
	if b.device, err = console.NewDevice(p[0], c); err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		if _, err := b.device.AddPort(c); err != nil {
			t.Fatal(err)
		}
	}
	serving, end := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.device.Serve(serving) }()
	t.Cleanup(func() {
		end()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	if b.driver, err = console.Open(ctx, p[1], c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.driver.Close() })
	b.s = serve(t, b.device, files)
	return b
}

// far is the driver's end of a port, open.
func (b *both) far(name string) *console.Port {
	b.t.Helper()
	p, err := b.driver.WaitPort(b.ctx, name)
	if err == nil {
		err = p.Open()
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return p
}

func (b *both) say(p *console.Port, s string) {
	b.t.Helper()
	if err := p.WaitOpen(b.ctx); err != nil {
		b.t.Fatal(err)
	}
	if _, err := p.WriteAll(b.ctx, []byte(s)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *both) hear(r io.Reader, want string) {
	b.t.Helper()
	if p, ok := r.(*console.Port); ok {
		r = reopened{p, b.ctx}
	}
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); string(got) != want {
		b.t.Fatalf("got %.40q, %d bytes, %v; want %.40q", got[:n], n, err, want)
	}
}

// reopened is a port whose ends of file are not told: the other side opens it
// again.
type reopened struct {
	*console.Port
	ctx context.Context
}

func (r reopened) Read(b []byte) (int, error) {
	for {
		if _, err := r.Wait(r.ctx, console.In); err != nil {
			return 0, err
		}
		n, err := r.TryRead(b)
		if err != io.EOF && err != console.ErrWouldBlock {
			return n, err
		}
		changed := r.Changes()
		if r.PeerOpen() || r.Unread() > 0 {
			continue
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
			return 0, r.ctx.Err()
		}
	}
}

// closed waits until the other side has closed.
func (b *both) closed(p *console.Port) {
	b.t.Helper()
	for p.PeerOpen() {
		changed := p.Changes()
		if !p.PeerOpen() {
			return
		}
		select {
		case <-changed:
		case <-b.ctx.Done():
			b.t.Fatal("never closed")
		}
	}
}

var log = console.PortConfig{Name: "log"}

func write(t *testing.T, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
}

func atEnd(t *testing.T, r io.Reader) {
	t.Helper()
	if b, err := io.ReadAll(r); len(b) > 0 || err != nil {
		t.Fatalf("expected the end of file, got %.40q, %v", b, err)
	}
}
