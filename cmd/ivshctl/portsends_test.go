package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/ports"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

var consoleConfig = link.Config{Peers: 2, Vectors: 2, Protocol: 0x8003, ReadWrite: 1 << 20}

// The driver's side of `ports serve` ends when it cannot go on.
func TestFollowPortsEnds(t *testing.T) {
	t.Run("wrong usage", func(t *testing.T) {
		t.Parallel()
		l := newConsoleLink(t)
		l.open(0)
		x := inTerminal(t, "ports", "serve", "-d", l.path, "--dir", shortDir(t), "--max-ports", "200")
		x.ended(exitFailed)
		x.until("the reason", func() bool { return x.shows("200") })
	})
	for _, device := range []bool{false, true} {
		t.Run(fmt.Sprint("the link ends, device ", device), func(t *testing.T) {
			t.Parallel()
			path, stop := ivshmemtest.ServeUntil(t, consoleConfig, pcidev.Options{})
			l := newConsoleLink(t)
			l.path = path
			dir := shortDir(t)
			if device {
				l.device()
			} else {
				l.open(0)
			}
			x := inTerminal(t, "ports", "serve", "-d", path, "--dir", dir)
			if device {
				x.until("ready", func() bool { return x.shows("ready " + dir + "/con") })
			} else {
				x.until("the directory", func() bool { _, err := os.Stat(filepath.Join(dir, ports.ControlFile)); return err == nil })
			}
			stop()
			x.ended(exitGone)
		})
	}
}

// A device that makes no sense is not the end: the next may.
func TestFollowPortsWaits(t *testing.T) {
	t.Parallel()
	l := newConsoleLink(t)
	dev := l.open(0)
	// F_MULTIPORT, and max_nr_ports is 0.
	hostile, err := virtio.NewBackEnd(dev, virtio.Device{
		ID: 3, Features: 1 << 1, Config: make([]byte, 12), Queues: []int{4, 4, 4, 4},
		Run: func(ctx context.Context, _ *virtio.Session) error {
			<-ctx.Done()
			return ctx.Err()
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	stop := l.serve(hostile.Serve)
	dir := shortDir(t)
	x := inTerminal(t, "ports", "serve", "-d", l.path, "--dir", dir)
	x.until("a warning", func() bool {
		return x.shows("max_nr_ports: expected at least 1, found 0: waiting for the next device")
	})
	stop()
	d, err := console.NewDevice(dev, console.Config{})
	if err == nil {
		_, err = d.AddPort(console.PortConfig{Name: "good"})
	}
	if err != nil {
		t.Fatal(err)
	}
	l.serve(d.Serve)
	x.until("ready", func() bool { return x.shows("ready " + dir + "/good") })
}

func TestOfDevice(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{&virtio.ViolationError{}, true},
		{&console.MessageError{}, true},
		{virtio.ErrBackEndGone, true},
		{virtio.ErrNeedsReset, true},
		{ivshmem.ErrGone, false},
		{context.Canceled, false},
		{&virtio.SpaceError{}, false},
	} {
		if got := ofDevice(fmt.Errorf("queue: %w", c.err)); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
	if ofDevice(nil) {
		t.Error("no error")
	}
}

// fakeList answers for the list until the test ends. asked counts how often.
func fakeList(t *testing.T, dir string, list func() []ports.Status) (asked *atomic.Int64) {
	t.Helper()
	asked = new(atomic.Int64)
	l, err := net.Listen("unix", filepath.Join(dir, ports.ControlFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			asked.Add(1)
			var r controlRequest
			json.NewDecoder(c).Decode(&r)
			json.NewEncoder(c).Encode(controlAnswer{Ports: list()})
			c.Close()
		}
	}()
	return asked
}

// A character device is at its end of file before the other side opens the port,
// too. /dev/null, which always is, stands for one.
func TestAttachCharWaits(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	var there atomic.Bool
	path := filepath.Join(dir, "x")
	asked := fakeList(t, dir, func() []ports.Status { return []ports.Status{{Name: "x", Path: path, OpenThere: there.Load()}} })
	if err := os.Symlink("/dev/null", path); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("ivshctl", "ports", "attach", "--dir", dir, "x")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for asked.Load() < 20 {
		select {
		case err := <-ended:
			t.Fatalf("ended (%v) before the other side opened the port", err)
		case <-time.After(time.Millisecond):
		}
	}
	there.Store(true)
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(60 * time.Second):
		cmd.Process.Kill()
		t.Error("the end of file is not the end")
	}
}

// ends has an end of file before each piece, and behind.
type ends struct {
	io.ReadWriteCloser
	pieces []string
	ended  bool
}

func (e *ends) Read(b []byte) (int, error) {
	if e.ended = !e.ended; e.ended || len(e.pieces) == 0 {
		return 0, io.EOF
	}
	n := copy(b, e.pieces[0])
	e.pieces = e.pieces[1:]
	return n, nil
}

// Data says that the other side was there, too.
func TestCharDeviceEnds(t *testing.T) {
	c := &charDevice{&ends{pieces: []string{"first", "not this"}}, func() bool { return false }}
	if b, err := io.ReadAll(c); string(b) != "first" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// answering answers in a directory until the test ends. Who connects may ask for
// everything as soon as own says so.
func answering(t *testing.T, patience time.Duration) (dir string, own *atomic.Bool) {
	t.Helper()
	dir, own = filepath.Join(shortDir(t), "ports"), new(atomic.Bool)
	s, err := ports.New(ports.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		ended <- answerAll(ctx, s, func(error) {}, func(*net.UnixConn) bool { return own.Load() }, patience)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		s.Close()
	})
	return dir, own
}

// silent connects, and says nothing.
func silent(t *testing.T, dir string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", filepath.Join(dir, ports.ControlFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Who may ask for the list only keeps nobody else from asking.
func TestSilentClients(t *testing.T) {
	t.Parallel()
	dir, own := answering(t, time.Hour)
	for range mostAsking {
		silent(t, dir)
	}
	// The service itself has looked whether somebody listens, and may have had a
	// place for a moment.
	for n := 0; ; n++ {
		silent(t, dir)
		if _, err := listPorts(dir); errors.Is(err, ivshmem.ErrBusy) {
			break
		} else if err != nil || n > mostAsking {
			t.Fatalf("%v, want that it is in use", err)
		}
	}
	own.Store(true)
	if _, err := askPorts(dir, controlRequest{Do: "add", Name: "x"}); !errors.Is(err, ivshmem.ErrNotSupported) { // there is no console
		t.Error(err)
	}
}

// Their places are free again long before a client gives up.
func TestSilentClientLeaves(t *testing.T) {
	t.Parallel()
	dir, _ := answering(t, requestPatience)
	c := silent(t, dir)
	c.SetReadDeadline(time.Now().Add(controlPatience / 2))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("%d bytes, %v; want that it is closed", n, err)
	}
}

func TestMayAll(t *testing.T) {
	dir := shortDir(t)
	l, err := net.Listen("unix", filepath.Join(dir, "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", filepath.Join(dir, "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if !mayAll(a.(*net.UnixConn)) {
		t.Error("not of this process's user")
	}
}

// A port is found by its name, and by the name of its file, of whatever form.
func TestOpenByFile(t *testing.T) {
	dir := shortDir(t)
	long := strings.Repeat("../long", 100)
	for _, c := range []struct{ name, file string }{
		{"x", "x"},
		{"x#2", "x#2"},
		{"a b", "a%20b"},
		{"a%20b", "a%20b"},
		{long, ports.File(long, 0)},
		{ports.File(long, 0), ports.File(long, 0)},
		{strings.Repeat("y", 300), ports.File(strings.Repeat("y", 300), 0)},
	} {
		l, err := net.Listen("unix", filepath.Join(dir, c.file))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		if f, err := openPort(ctx, dir, c.name); err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else {
			f.Close()
		}
		cancel()
		l.Close()
	}
	for name, want := range map[string]int{"": 1, ".control": 1, "..": 1, "a/b": 1, "/": 1, "x": 1, "x#2": 2, strings.Repeat("y", 300): 1} {
		if got := filesOf(name); len(got) != want {
			t.Errorf("%q: %q", name, got)
		}
	}
}

// In JSON nothing is for the terminal, and all the names are whole.
func TestPrintNames(t *testing.T) {
	for name, raw := range map[string]bool{"plain": true, "\u00e9\u4e2d\U0001f600": true, "\u009b31m": false, "\x1b[31m": false, "\x7f": false, "\u202e": false, "\U000e0041": false} {
		var b bytes.Buffer
		var got []string
		if err := printNames(&b, []string{name}); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(b.String(), name) != raw {
			t.Errorf("%q: %s", name, b.String())
		}
		if err := json.Unmarshal(b.Bytes(), &got); err != nil || got[0] != name {
			t.Errorf("%q: %q, %v", name, got, err)
		}
	}
}
