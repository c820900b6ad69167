package vfiouser_test

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

// TestClientVersion is what a server may answer to the first message.
func TestClientVersion(t *testing.T) {
	for _, c := range []struct {
		name  string
		reply func(id uint16) []byte
		fds   int
		want  string
	}{
		{"no json", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(1)) }, 0, ""},
		{"libvfio-user", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(1), `{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}`, byte(0))
		}, 0, ""},
		{"large transfers", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(0), `{"capabilities":{"max_data_xfer_size":4294967295}}`, byte(0))
		}, 0, ""},
		{"major 1", func(id uint16) []byte { return answer(id, 1, uint16(1), uint16(0)) }, 0, "version 0.0 or 0.1"},
		{"minor 2", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(2)) }, 0, "version 0.0 or 0.1"},
		{"cut", func(id uint16) []byte { return answer(id, 1, uint16(0)) }, 0, "well-formed"},
		{"no NUL", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(0), "{}") }, 0, "well-formed"},
		{"no JSON", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(0), "]\x00") }, 0, "well-formed"},
		{"max_msg_fds", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(0), `{"capabilities":{"max_msg_fds":-1}}`, byte(0))
		}, 0, "well-formed"},
		{"transfers too small", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(0), `{"capabilities":{"max_data_xfer_size":7}}`, byte(0))
		}, 0, "at least 8"},
		{"twin socket", func(id uint16) []byte {
			return answer(id, 1, uint16(0), uint16(0), `{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}`, byte(0))
		}, 0, "twin socket"},
		{"descriptor", func(id uint16) []byte { return answer(id, 1, uint16(0), uint16(0)) }, 1, "at most 0 descriptors"},
		{"too long", func(id uint16) []byte { return answer(id, 1, make([]byte, 4081)) }, 0, "a size of 16 to 4096"},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkLeaks(t)
			peer, conn := newPair(t)
			s := &scripted{rawPeer: peer}
			var client *vfiouser.Client
			err := s.during(func() (err error) { client, err = vfiouser.NewClient(conn); return err }, func() {
				fds := make([]int, c.fds)
				for i := range fds {
					fds[i] = eventfd(t, 0)
				}
				s.write(c.reply(s.request(1, uint16(0), uint16(1), ourJSON, byte(0))), fds...)
			})
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				client.Close()
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			s.expectClosed()
		})
	}
}

func TestClientRefused(t *testing.T) {
	checkLeaks(t)
	peer, conn := newPair(t)
	s := &scripted{rawPeer: peer}
	err := s.during(func() error { _, err := vfiouser.NewClient(conn); return err }, func() {
		s.write(errorAnswer(s.request(1, uint16(0), uint16(1), ourJSON, byte(0)), 1, unix.EBUSY))
	})
	if !errors.Is(err, vfiouser.ErrRefused) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("%v, want ErrRefused and EBUSY", err)
	}
	s.expectClosed()
}

func TestClientWithoutDescriptors(t *testing.T) {
	s := newScripted(t, `{"capabilities":{"max_msg_fds":0}}`)
	err := s.client.SetIRQs(vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQTrigger, Count: 1, EventFD: true, FDs: []int{eventfd(t, 0)}})
	if !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("%v, want EOPNOTSUPP", err)
	}
}

// TestDialErrors: the message names the path and what to do.
func TestDialErrors(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	packets := filepath.Join(dir, "packets")
	other, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: packets, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	full := filepath.Join(dir, "full")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: full}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	filler, err := net.Dial("unix", full)
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	long := filepath.Join(dir, strings.Repeat("x", 108-len(dir)-1))
	for _, c := range []struct {
		path string
		want error
		text string
	}{
		{filepath.Join(dir, "nothing"), unix.ENOENT, "start the server"},
		{stale, unix.ECONNREFUSED, "nobody listens"},
		{packets, unix.EPROTOTYPE, "not a stream socket"},
		{full, unix.EAGAIN, "queue is full"},
		{long, unix.ENAMETOOLONG, "107"},
	} {
		_, err := vfiouser.Dial(context.Background(), c.path)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.path) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%v, want %v with %q and the path %s", err, c.want, c.text, c.path)
		}
	}
	if len(long) != 108 {
		t.Fatalf("a path of %d bytes", len(long))
	}
	// One byte less is a path like any other.
	if _, err := vfiouser.Dial(context.Background(), long[:107]); !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v, want ENOENT", err)
	}
}

// TestDialContext: the context ends the wait for a server that accepts and
// says nothing.
func TestDialContext(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		_, err := vfiouser.Dial(ctx, path)
		done <- err
	}()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, 16)); err != nil { // it waits for the reply now
		t.Fatal(err)
	}
	start := time.Now()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	if d := time.Since(start); d >= vfiouser.DefaultTimeout {
		t.Errorf("returned %v later, so not because of the context", d)
	}
}
