package ports

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

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

// A program opens the port, both talk, and its leaving closes the port.
func TestSocket(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	far := b.far("log")
	for range 3 {
		c := b.s.dial("log")
		write(t, c, "to the driver")
		b.hear(far, "to the driver")
		b.say(far, "to the device")
		b.hear(c, "to the device")
		c.Close()
		b.closed(far)
	}
}

// What was written comes before the end of file, in both directions.
func TestSocketEnds(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	big := string(bytes.Repeat([]byte("0123456789abcdef"), 64<<10))
	far := b.far("log")
	c := b.s.dial("log")
	go func(c *net.UnixConn) {
		io.WriteString(c, big)
		c.Close()
	}(c)
	b.hear(far, big)
	if n, err := far.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Error(n, err)
	}
	c = b.s.dial("log")
	b.stuffConn(c, stream(4<<20)) // which nobody reads
	go func() {
		far.WaitOpen(b.ctx)
		far.WriteAll(b.ctx, []byte(big))
		far.Close()
	}()
	b.hear(c, big)
	atEnd(t, c)
}

// What a program said is not lost when it leaves without having read.
func TestSocketLastWords(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{Limit: 1 << 10}, Config{}, log)
	far := b.far("log")
	c := b.s.dial("log")
	data := stream(4 << 20)
	b.stuff(far, data) // the program's own socket is full, too
	n := b.stuffConn(c, data)
	c.Close()
	b.hear(far, string(data[:n]))
}

// A program that has nothing more to say can listen.
func TestSocketHalfClosed(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	far := b.far("log")
	c := b.s.dial("log")
	write(t, c, "question")
	c.CloseWrite()
	b.hear(far, "question")
	b.say(far, "answer")
	b.hear(c, "answer")
	if !far.PeerOpen() {
		t.Error("closed")
	}
	c.Close()
	b.closed(far)
}

// One program at a time, but a second one right behind the first is no second.
func TestSocketOneAtATime(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	far := b.far("log")
	c := b.s.dial("log")
	b.s.wait("log", hereOpen)
	second := b.s.dial("log")
	atEnd(t, second)
	if err := <-b.s.failures; err == nil {
		t.Error("nobody was told")
	}
	b.say(far, "still there")
	b.hear(c, "still there")
	for range 100 {
		c.Close()
		c = b.s.dial("log")
		write(t, c, "x")
	}
	b.hear(far, "x")
	select {
	case err := <-b.s.failures:
		t.Error(err)
	default:
	}
}

// A program that leaves before the other side came leaves nothing.
func TestSocketLeavesEarly(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	c := b.s.dial("log")
	b.s.wait("log", hereOpen)
	write(t, c, "for nobody")
	c.Close()
	b.s.wait("log", func(s Status) bool { return !s.OpenHere })
	far := b.far("log")
	c = b.s.dial("log")
	write(t, c, "for somebody")
	b.hear(far, "for somebody")
}

// stream is bytes of which no two pieces are alike.
func stream(n int) []byte {
	b := make([]byte, 0, n)
	for i := uint64(0); len(b) < n; i++ {
		b = binary.BigEndian.AppendUint64(b, i)
	}
	return b
}

// stuff writes until nothing more is taken for a while.
func (b *both) stuff(p *console.Port, s []byte) (n int) {
	b.t.Helper()
	if err := p.WaitOpen(b.ctx); err != nil {
		b.t.Fatal(err)
	}
	for n < len(s) {
		ctx, cancel := context.WithTimeout(b.ctx, 300*time.Millisecond)
		m, err := p.WriteAll(ctx, s[n:])
		cancel()
		n += m
		if m == 0 {
			return n
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			b.t.Fatal(err)
		}
	}
	b.t.Fatalf("%d bytes, and nothing throttles the writer", n)
	return 0
}

// stuffConn is stuff of a program.
func (b *both) stuffConn(c *net.UnixConn, s []byte) (n int) {
	b.t.Helper()
	for n < len(s) {
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		m, err := c.Write(s[n:])
		n += m
		if m == 0 {
			return n
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			b.t.Fatal(n, err)
		}
	}
	b.t.Fatalf("%d bytes, and nothing throttles the program", n)
	return 0
}

// The slower side sets the pace, and nothing is in between without a bound.
func TestFlowControl(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{Limit: 1 << 10}, Config{}, log)
	far := b.far("log")
	c := b.s.dial("log")
	b.s.wait("log", hereOpen)
	data := stream(4 << 20)
	n := b.stuff(far, data)
	got := make([]byte, n)
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data[:n]) {
		t.Fatal("not what was sent", err)
	}
	// And back.
	n = b.stuffConn(c, data)
	got = make([]byte, n)
	if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, data[:n]) {
		t.Fatal("not what was sent", err)
	}
}

// With cache, what a program did not take is for the next one, except what its
// socket held; without, it is dropped.
func TestSocketCache(t *testing.T) {
	t.Parallel()
	for _, cache := range []bool{false, true} {
		b := newBoth(t, console.Config{}, Config{Others: Settings{Cache: cache}}, log)
		far := b.far("log")
		c := b.s.dial("log")
		data := stream(4 << 20)
		b.stuff(far, data)
		held := queued(t, c)
		c.Close()
		b.closed(far)
		far.Close()
		if !cache {
			b.s.wait("log", func(s Status) bool { return s.Unread == 0 && !s.OpenHere && !s.OpenThere })
			far.Open()
			c = b.s.dial("log")
			b.say(far, "new")
			b.hear(c, "new")
			continue
		}
		c = b.s.dial("log")
		got, err := io.ReadAll(c)
		if err != nil || len(got) < 64<<10 || !bytes.Equal(got, data[held:held+len(got)]) {
			t.Errorf("%d bytes behind %d, %v: not the next ones", len(got), held, err)
		}
	}
}

// queued is how many bytes a connection has not read.
func queued(t *testing.T, c *net.UnixConn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A port that is removed takes its file and its program along; one that is
// added gets a file.
func TestAddRemoveRename(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	path, err := b.s.Add(b.ctx, console.PortConfig{Name: "a/b"}, &Settings{Form: PTY, Cache: true, Limit: 7})
	if want := b.s.path("a%2Fb"); err != nil || path != want {
		t.Fatalf("%q, %v, want %q", path, err, want)
	}
	if to, err := os.Readlink(path); err != nil || filepath.Dir(to) != "/dev/pts" {
		t.Error(to, err)
	}
	if _, err := b.s.Add(b.ctx, console.PortConfig{Name: "log"}, nil); err == nil {
		t.Error("twice")
	}
	far := b.far("log")
	c := b.s.dial("log")
	b.s.wait("log", hereOpen)
	if _, err := b.s.Rename(b.ctx, "log", "trace"); !errors.Is(err, console.ErrBusy) {
		t.Error(err)
	}
	if err := b.s.Remove(b.ctx, "log"); err != nil {
		t.Fatal(err)
	}
	atEnd(t, c)
	if _, err := os.Lstat(b.s.path("log")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := far.Read(make([]byte, 1)); err == nil {
		t.Error("still there")
	}
	for _, name := range []string{"", "log", "nothing"} {
		if err := b.s.Remove(b.ctx, name); !errors.Is(err, ErrNoPort) {
			t.Errorf("%q: %v", name, err)
		}
	}
	// Renamed, it is another port with the same settings.
	for _, to := range []string{"a/b", "", "\xff"} {
		if _, err := b.s.Rename(b.ctx, "a%2Fb", to); err == nil {
			t.Errorf("to %q", to)
		}
	}
	path, err = b.s.Rename(b.ctx, "a%2Fb", "c")
	if want := b.s.path("c"); err != nil || path != want {
		t.Fatalf("%q, %v, want %q", path, err, want)
	}
	if st := b.s.wait("c", there); st.Form != PTY || st.Name != "c" || st.OpenHere {
		t.Errorf("%+v", st)
	}
	if _, err := b.driver.WaitPort(b.ctx, "c"); err != nil {
		t.Error(err)
	}
	if all := b.s.List(); len(all) != 1 {
		t.Errorf("%+v", all)
	}
}

// What a wire cannot do is said, and everything stays as it was.
func TestManageOtherWires(t *testing.T) {
	t.Parallel()
	for _, w := range []console.Wire{console.Single, console.Original} {
		b := newBoth(t, console.Config{Wire: w}, Config{}, console.PortConfig{Name: "con", Console: true})
		b.s.wait("con", there)
		if err := b.s.Remove(b.ctx, "con"); !errors.Is(err, console.ErrNotCarried) {
			t.Errorf("%v: %v", w, err)
		}
		if _, err := b.s.Rename(b.ctx, "con", "x"); !errors.Is(err, console.ErrNotCarried) {
			t.Errorf("%v: %v", w, err)
		}
		_, err := b.s.Add(b.ctx, console.PortConfig{Name: "y"}, nil)
		if w == console.Single && !errors.Is(err, console.ErrTooMany) || w == console.Original && err != nil {
			t.Errorf("%v: %v", w, err)
		}
		c := b.s.dial("con")
		far := b.driver.Port(0)
		if err := far.Open(); err != nil {
			t.Fatal(err)
		}
		write(t, c, "works")
		b.hear(far, "works")
	}
	driver := serve(t, &noConsole{}, Config{})
	if err := driver.Remove(driver.ctx, "x"); !errors.Is(err, ErrNotHere) {
		t.Error(err)
	}
}

// noConsole has no ports.
type noConsole struct{}

func (noConsole) Ports() []*console.Port   { return nil }
func (noConsole) Changes() <-chan struct{} { return nil }

// The driver's side finds the ports, also when they come later.
func TestDriverSide(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log, console.PortConfig{}, console.PortConfig{Name: "port-2"})
	d := serve(t, b.driver, Config{Settings: map[string]Settings{"late": {Form: PTY}, "port-2": {Cache: true, Form: PTY}}})
	d.wait("log", there)
	d.wait("port-2", func(s Status) bool { return s.Name == "" && s.Form == PTY })
	d.wait("%70ort-2", there)
	if _, err := b.s.Add(b.ctx, console.PortConfig{Name: "late", Console: true}, nil); err != nil {
		t.Fatal(err)
	}
	if st := d.wait("late", there); st.Form != PTY || !st.Console {
		t.Errorf("%+v", st)
	}
	near, far := b.s.dial("log"), d.dial("log")
	write(t, near, "through")
	b.hear(far, "through")
	if err := b.s.Remove(b.ctx, "log"); err != nil {
		t.Fatal(err)
	}
	atEnd(t, far)
	for {
		if _, err := os.Lstat(d.path("log")); errors.Is(err, os.ErrNotExist) {
			break
		}
	}
}

// What a service that was killed left is replaced or removed; what is not a
// service's stays. One service at a time has a directory, and nothing is left
// of it.
func TestDirectory(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(tempDir(t), "run", "ports")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ControlFile, "log", "old"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	os.Symlink("/dev/pts/99999", filepath.Join(dir, "tty"))
	os.Symlink("elsewhere", filepath.Join(dir, "link"))
	for _, name := range []string{"file", "file2"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b := newBoth(t, console.Config{MaxPorts: 8}, Config{Dir: dir, Settings: map[string]Settings{"file2": {Form: PTY}}},
		log, console.PortConfig{Name: "file"}, console.PortConfig{Name: "file2"}, console.PortConfig{Name: "link"})
	b.s.wait("log", there)
	b.s.dial("log").Close()
	for _, name := range []string{"file", "link", "file2"} {
		b.s.wait(name, func(s Status) bool { return s.Error != "" })
	}
	if _, err := New(Config{Dir: dir}); !errors.Is(err, ivshmem.ErrBusy) {
		t.Error(err)
	}
	b.s.stop()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	if want := []string{"file", "file2", "link"}; !slices.Equal(names, want) {
		t.Errorf("left %q, want %q", names, want)
	}
}

func TestDirectoryComesAndGoes(t *testing.T) {
	t.Parallel()
	top := tempDir(t)
	b := newBoth(t, console.Config{}, Config{Dir: filepath.Join(top, "ivshmem", "ports")}, log, console.PortConfig{Name: "tty"})
	b.s.wait("log", there)
	b.s.stop()
	if all, err := os.ReadDir(top); err != nil || len(all) > 0 {
		t.Error(all, err)
	}
}

func TestDirectoryRefused(t *testing.T) {
	t.Parallel()
	open := tempDir(t)
	os.Chmod(open, 0o777)
	file := filepath.Join(tempDir(t), "file")
	os.WriteFile(file, nil, 0o600)
	for _, dir := range []string{open, file, filepath.Join(file, "x"), "/tmp/" + string(bytes.Repeat([]byte("x"), 60))} {
		if s, err := New(Config{Dir: dir}); err == nil {
			s.Close()
			t.Errorf("%s: accepted", dir)
		}
	}
}
