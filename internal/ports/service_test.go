package ports

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

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
	open, group, others := tempDir(t), tempDir(t), tempDir(t)
	os.Chmod(open, 0o777)
	os.Chmod(group, 0o770)
	os.Chmod(others, 0o702)
	file := filepath.Join(tempDir(t), "file")
	os.WriteFile(file, nil, 0o600)
	for _, dir := range []string{open, group, others, file, filepath.Join(file, "x"), "/tmp/" + string(bytes.Repeat([]byte("x"), 60))} {
		if s, err := New(Config{Dir: dir}); err == nil {
			s.Close()
			t.Errorf("%s: accepted", dir)
		}
	}
}

// parent is a context that counts those that are made of it and not cancelled.
type parent struct {
	context.Context
	children atomic.Int32
}

func (p *parent) Value(any) any { return nil } // so that AfterFunc is asked

func (p *parent) AfterFunc(f func()) func() bool {
	p.children.Add(1)
	stop := context.AfterFunc(p.Context, f)
	return func() bool {
		p.children.Add(-1)
		return stop()
	}
}

// A port whose file is not served any more, whatever the reason, leaves nothing
// behind in the service.
func TestContextsEnd(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log, console.PortConfig{Name: "bad"})
	s, err := New(Config{Dir: tempDir(t), Settings: map[string]Settings{"bad": {Form: "none"}},
		Ready: func(string) {}, Gone: func(string) {}, Failed: func(error) {}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(b.ctx)
	family := &parent{Context: ctx}
	s.Use(b.driver)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.Run(family)
	}()
	defer func() {
		cancel()
		<-ended
	}()
	b.eventually("one served, one failed", func() bool {
		good, bad := false, false
		for _, st := range s.List() {
			good = good || st.Name == "log" && st.Path != ""
			bad = bad || st.Name == "bad" && st.Error != ""
		}
		return good && bad
	})
	b.eventually("the context of the one that is served", func() bool { return family.children.Load() == 1 })
}
