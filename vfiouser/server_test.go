package vfiouser_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

// QEMU 11.1.3's VERSION request has 214 bytes; a longer reply ends its start.
const qemuJSON = `{"capabilities": {"migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, ` +
	`"max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}`

// served is a server with its raw client.
type served struct {
	*rawPeer
	dev  *fake
	srv  *vfiouser.Server
	done chan error
}

// serve starts a server. No VERSION has been sent.
func serve(t testing.TB, opts vfiouser.ServerOptions, change ...func(*fake)) *served {
	t.Helper()
	checkLeaks(t)
	dev := newFake(t)
	for _, f := range change {
		f(dev)
	}
	peer, conn := newPair(t)
	srv, err := vfiouser.NewServer(conn, func() (vfiouser.Device, error) { return dev, nil }, opts)
	if err != nil {
		t.Fatal(err)
	}
	s := &served{peer, dev, srv, make(chan error, 1)}
	go func() { s.done <- srv.Run(); close(s.done) }()
	t.Cleanup(func() {
		peer.close()
		s.wait(t)
	})
	return s
}

// wait returns what Run returned.
func (s *served) wait(t testing.TB) error {
	t.Helper()
	select {
	case err := <-s.done:
		return err
	case <-time.After(patience):
		t.Fatal("Run does not return")
		return nil
	}
}

// greeted is serve with the VERSION exchange of a QEMU.
func greeted(t testing.TB, change ...func(*fake)) *served {
	t.Helper()
	s := serve(t, vfiouser.ServerOptions{}, change...)
	s.greet(qemuJSON)
	return s
}

func (s *served) greet(json string) {
	s.t.Helper()
	s.write(message(0, 1, uint16(0), uint16(0), json, byte(0)))
	header, payload, fds := s.read()
	if string(header[8:16]) != string(cat(1, 0)) || len(fds) != 0 {
		s.t.Fatalf("VERSION was answered with header %x, payload %q", header, payload)
	}
}

// alive proves that the stream is in step and open.
func (s *served) alive() {
	s.t.Helper()
	s.write(message(0xfffe, 4, 16, 0, 0, 0))
	s.expect(answer(0xfffe, 4, 16, 3, 9, 5))
}

func TestVersion(t *testing.T) {
	reply := func(minor uint16, fds int) []byte {
		return answer(7, 1, uint16(0), minor,
			fmt.Sprintf(`{"capabilities":{"max_msg_fds":%d,"max_data_xfer_size":1048576}}`, fds), byte(0))
	}
	if n := len(reply(0, 16)); n > 214 {
		t.Fatalf("a reply of %d bytes does not fit QEMU's buffer", n)
	}
	for _, c := range []struct {
		name    string
		payload []byte
		reply   []byte
	}{
		{"qemu", cat(uint16(0), uint16(0), qemuJSON, byte(0)), reply(0, 16)},
		{"no json", cat(uint16(0), uint16(1)), reply(1, 16)},
		{"empty json", cat(uint16(0), uint16(1), "{}\x00"), reply(1, 16)},
		{"no capabilities in capabilities", cat(uint16(0), uint16(1), "{\"capabilities\":{}}\x00"), reply(1, 16)},
		{"higher minor", cat(uint16(0), uint16(9), "{}\x00"), reply(1, 16)},
		{"no descriptors", cat(uint16(0), uint16(0), `{"capabilities":{"max_msg_fds":0}}`, byte(0)), reply(0, 16)},
		{"more descriptors than QEMU", cat(uint16(0), uint16(0), `{"capabilities":{"max_msg_fds":64}}`, byte(0)), reply(0, 64)},
		{"more than the kernel passes", cat(uint16(0), uint16(0), `{"capabilities":{"max_msg_fds":1024}}`, byte(0)), reply(0, 253)},
		{"unknown names", cat(uint16(0), uint16(0), `{"x":1,"capabilities":{"y":[{}],"Max_Msg_Fds":-1}}`, byte(0)), reply(0, 16)},
		{"twin socket offered", cat(uint16(0), uint16(0), `{"capabilities":{"twin_socket":{"supported":true}}}`, byte(0)), reply(0, 16)},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, vfiouser.ServerOptions{})
			s.write(cat(uint16(7), uint16(1), 16+len(c.payload), 0, 0, c.payload))
			s.expect(c.reply)
			s.alive()
			// A second VERSION is an error, the connection stays.
			s.write(message(8, 1, uint16(0), uint16(0)))
			s.expect(errorAnswer(8, 1, unix.EINVAL))
			s.alive()
			s.close()
			if err := s.wait(t); err != nil {
				t.Errorf("Run: %v after an orderly end", err)
			}
		})
	}
}

func TestVersionRejected(t *testing.T) {
	version := func(json string) []byte { return message(7, 1, uint16(0), uint16(0), json) }
	caps := func(json string) []byte { return version(`{"capabilities":` + json + "}\x00") }
	for _, c := range []struct {
		name    string
		request []byte
	}{
		{"short_write", message(7, 1)},
		{"three bytes", message(7, 1, uint16(0), byte(0))},
		{"bad_command", message(7, 999, uint16(0), uint16(0))},
		{"another command first", message(7, 4, 16, 0, 0, 0)},
		{"invalid_major", message(7, 1, uint16(999), uint16(0))},
		{"long_write", cat(uint16(7), uint16(1), 1<<20+49, 0, 0)},
		{"longer than any VERSION", cat(uint16(7), uint16(1), 4097, 0, 0)},
		{"json_missing_NUL", version("{}")},
		{"only NUL", version("\x00")},
		{"missing_closing_brace", version("{\x00")},
		{"missing_closing_quote", version("\"\x00")},
		{"top level not an object", version("[]\x00")},
		{"top level null", version("null\x00")},
		{"deep", version(strings.Repeat("[", 4000) + "\x00")},
		{"bad_capabilities_object", caps(`"x"`)},
		{"capabilities null", caps(`null`)},
		{"bad_max_fds1", caps(`{"max_msg_fds":"foo"}`)},
		{"bad_max_fds2", caps(`{"max_msg_fds":-1}`)},
		{"bad_max_fds3", caps(`{"max_msg_fds":1025}`)},
		{"max_fds not whole", caps(`{"max_msg_fds":1.5}`)},
		{"max_fds huge", caps(`{"max_msg_fds":18446744073709551617}`)},
		{"xfer size a string", caps(`{"max_data_xfer_size":"1"}`)},
		{"xfer size negative", caps(`{"max_data_xfer_size":-1}`)},
		{"xfer size 0", caps(`{"max_data_xfer_size":0}`)},
		{"bad_migration_object", caps(`{"migration":"x"}`)},
		{"bad_pgsize", caps(`{"migration":{"pgsize":"x"}}`)},
		{"twin_socket", caps(`{"twin_socket":true}`)},
		{"twin_socket.supported", caps(`{"twin_socket":{"supported":1}}`)},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, vfiouser.ServerOptions{})
			s.write(c.request)
			s.expect(errorAnswer(7, uint16(c.request[2])|uint16(c.request[3])<<8, unix.EINVAL))
			s.expectClosed()
			var perr *vfiouser.ProtocolError
			if err := s.wait(t); !errors.As(err, &perr) {
				t.Errorf("Run: %v, want a ProtocolError", err)
			}
		})
	}
	t.Run("descriptors", func(t *testing.T) {
		s := serve(t, vfiouser.ServerOptions{})
		s.write(message(7, 1, uint16(0), uint16(0)), eventfd(t, 0))
		s.expect(errorAnswer(7, 1, unix.EINVAL))
		s.expectClosed()
	})
}

func TestVersionTimeout(t *testing.T) {
	for _, part := range []int{0, 7, 16, 40} {
		s := serve(t, vfiouser.ServerOptions{VersionTimeout: 20 * time.Millisecond})
		s.write(message(0, 1, uint16(0), uint16(0), qemuJSON, byte(0))[:part])
		if err := s.wait(t); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%d bytes sent: Run: %v, want os.ErrDeadlineExceeded", part, err)
		}
		s.expectClosed()
	}
}

// TestNoTick: once the client has introduced itself, an idle connection costs
// no wake-ups.
func TestNoTick(t *testing.T) {
	s := greeted(t)
	s.alive() // so the loop is beyond VERSION
	value, err := unix.GetsockoptTimeval(s.srv.FD(), unix.SOL_SOCKET, unix.SO_RCVTIMEO)
	if err != nil || value.Nano() != 0 {
		t.Errorf("receive time limit %+v, %v, want none", value, err)
	}
}

func TestClientThatNeverSpeaks(t *testing.T) {
	s := serve(t, vfiouser.ServerOptions{})
	s.close()
	if err := s.wait(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestServerClose(t *testing.T) {
	for _, greet := range []bool{false, true} {
		s := serve(t, vfiouser.ServerOptions{})
		if greet {
			s.greet(qemuJSON) // Run is, or will be, blocked in recvmsg
		}
		s.srv.Close()
		if err := s.wait(t); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Run: %v, want net.ErrClosed", err)
		}
		s.expectClosed()
		s.srv.Close() // again is harmless
	}
}

// TestCloseDuringFlood ends servers while they are busy with requests that
// carry descriptors, some of them malformed.
func TestCloseDuringFlood(t *testing.T) {
	for range 20 {
		s := greeted(t)
		e := eventfd(t, 0)
		flood := make(chan error)
		go func() {
			for {
				for _, m := range [][]byte{
					message(1, 8, 20, trigger|event, 2, 0, 1),
					message(2, 8, 20, trigger|event, 2, 0, 2),
					message(3, 8, 20, trigger|none, 2, 0, 0),
				} {
					if err := s.tryWrite(m, e); err != nil {
						flood <- err
						return
					}
				}
			}
		}()
		s.expect(answer(1, 8)) // the flood has reached the loop
		s.srv.Close()
		if err := s.wait(t); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Run: %v, want net.ErrClosed", err)
		}
		if err := <-flood; err != unix.EPIPE && err != unix.ECONNRESET {
			t.Errorf("the flood ended with %v", err)
		}
	}
}

// TestFraming is what ends a connection, and what must not.
func TestFraming(t *testing.T) {
	for _, c := range []struct {
		name    string
		request []byte
		reply   []byte
	}{
		{"too_small", cat(uint16(5), uint16(4), 15, 0, 0), errorAnswer(5, 4, unix.EINVAL)},
		{"size 0", cat(uint16(5), uint16(4), 0, 0, 0), errorAnswer(5, 4, unix.EINVAL)},
		{"too_large, nothing after it", cat(uint16(5), uint16(4), 1<<20+33, 0, 0), errorAnswer(5, 4, unix.EINVAL)},
		{"size 2^32-1", cat(uint16(5), uint16(10), max32, 0, 0), errorAnswer(5, 10, unix.EINVAL)},
		{"unsolicited_reply", cat(uint16(5), uint16(4), 16, 1, 0), errorAnswer(5, 4, unix.EINVAL)},
		{"type 2", cat(uint16(5), uint16(4), 16, 2, 0), errorAnswer(5, 4, unix.EINVAL)},
		{"type 15", cat(uint16(5), uint16(4), 16, 15, 0), errorAnswer(5, 4, unix.EINVAL)},
		{"too_large, no reply wanted", cat(uint16(5), uint16(4), 1<<20+33, 0x10, 0), nil},
		{"unsolicited_reply, no reply wanted", cat(uint16(5), uint16(4), 16, 0x11, 0), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := greeted(t)
			s.write(c.request)
			if c.reply != nil {
				s.expect(c.reply)
			}
			s.expectClosed()
			var perr *vfiouser.ProtocolError
			if err := s.wait(t); !errors.As(err, &perr) || perr.Peer != "client" {
				t.Errorf("Run: %v, want a ProtocolError", err)
			}
		})
	}
	t.Run("largest message", func(t *testing.T) {
		s := greeted(t)
		s.write(message(5, 999, make([]byte, 16+1<<20)))
		s.expect(errorAnswer(5, 999, unix.EINVAL))
		s.alive()
	})
	t.Run("reserved flags and error field", func(t *testing.T) {
		s := greeted(t)
		s.write(cat(uint16(5), uint16(4), 32, uint32(0xffffffe0), 77, 16, 0, 0, 0))
		s.expect(answer(5, 4, 16, 3, 9, 5))
	})
}

func TestNoPayload(t *testing.T) {
	s := greeted(t)
	for cmd := range uint16(20) {
		s.write(message(cmd, cmd))
		if cmd == 13 {
			s.expect(answer(13, 13))
			continue
		}
		s.expect(errorAnswer(cmd, cmd, unix.EINVAL))
	}
	s.alive()
}

func TestUnknownCommand(t *testing.T) {
	s := greeted(t)
	for _, cmd := range []uint16{0, 11, 12, 14, 15, 16, 17, 18, 19, 999, 0xffff} {
		s.write(message(cmd, cmd, make([]byte, 100)))
		s.expect(errorAnswer(cmd, cmd, unix.EINVAL))
	}
	// Well-formed, but not announced.
	s.write(message(1, 15, uint64(1), uint64(0), 0, 4, uint64(1)))
	s.expect(errorAnswer(1, 15, unix.EINVAL))
	s.alive()
}

func TestStoppedInTheMiddle(t *testing.T) {
	whole := message(3, 10, uint64(0), 0, 4, 1)
	for n := 1; n < len(whole); n++ {
		s := greeted(t)
		s.write(whole[:n])
		s.close()
		if err := s.wait(t); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("after %d of %d bytes: Run: %v, want io.ErrUnexpectedEOF", n, len(whole), err)
		}
		s.dev.state(func() {
			if s.dev.accesses != 0 {
				t.Errorf("half a write was carried out")
			}
		})
	}
}

func TestOneByteAtATime(t *testing.T) {
	s := serve(t, vfiouser.ServerOptions{})
	e := eventfd(t, 0)
	all := cat(
		message(0, 1, uint16(0), uint16(0), qemuJSON, byte(0)),
		message(1, 10, uint64(8), 0, 4, 0x01020304),
	)
	for i := range all {
		s.write(all[i : i+1])
	}
	s.read()
	s.expect(answer(1, 10, uint64(8), 0, 4))
	set := message(2, 8, 20, 4|32, 2, 5, 1)
	s.write(set[:1], e)
	for i := range set[1:] {
		s.write(set[i+1 : i+2])
	}
	s.expect(answer(2, 8))
	s.dev.state(func() { s.dev.raise(2, 5) })
	if counter(e) != 1 {
		t.Error("the descriptor of the first byte did not arrive")
	}
}

func TestManyMessagesInOneWrite(t *testing.T) {
	s := greeted(t)
	const n = 100
	var all []byte
	for i := range uint16(n) {
		all = append(all, message(i, 10, uint64(i)*4, 0, 4, int(i))...)
		all = append(all, message(i, 9, uint64(i)*4, 0, 4)...)
	}
	s.write(all)
	for i := range uint16(n) {
		s.expect(answer(i, 10, uint64(i)*4, 0, 4))
		s.expect(answer(i, 9, uint64(i)*4, 0, 4, int(i)))
	}
	// The same ID outstanding several times is allowed.
	s.write(cat(message(9, 9, uint64(4), 0, 4), message(9, 9, uint64(8), 0, 4)))
	s.expect(answer(9, 9, uint64(4), 0, 4, 1))
	s.expect(answer(9, 9, uint64(8), 0, 4, 2))
}

// TestNoReply: posted writes are carried out before the next reply, and
// nothing that goes wrong is answered either.
func TestNoReply(t *testing.T) {
	s := greeted(t)
	posted := func(id, cmd uint16, payload ...any) []byte {
		m := message(id, cmd, payload...)
		m[8] |= 0x10
		return m
	}
	s.write(cat(
		posted(1, 10, uint64(16), 0, 4, 42),
		posted(2, 10, uint64(16), 99, 4, 42),
		posted(3, 1, uint16(0), uint16(0)),
		posted(4, 999, 1),
		posted(5, 13),
		posted(6, 15, uint64(0)),
		posted(7, 9, uint64(0), 1, 4),
		message(8, 9, uint64(16), 0, 4),
	))
	s.expect(answer(8, 9, uint64(16), 0, 4, 42))
	s.alive()
}

// TestClientThatDoesNotRead ends only its own connection, in bounded time.
func TestClientThatDoesNotRead(t *testing.T) {
	s := serve(t, vfiouser.ServerOptions{SendTimeout: 50 * time.Millisecond})
	s.greet(qemuJSON)
	flood := make(chan error, 1)
	go func() {
		for {
			if err := s.tryWrite(message(1, 9, uint64(0), 2, 4*fakePage)); err != nil {
				flood <- err
				return
			}
		}
	}()
	if err := s.wait(t); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Run: %v, want os.ErrDeadlineExceeded", err)
	}
	if err := <-flood; err != unix.EPIPE && err != unix.ECONNRESET {
		t.Errorf("the flood ended with %v", err)
	}
}

func TestTooManyDescriptors(t *testing.T) {
	s := greeted(t)
	fds := make([]int, 17)
	for i := range fds {
		fds[i] = eventfd(t, 0)
	}
	s.write(message(1, 8, 20, 4|32, 2, 0, 17), fds...)
	s.expectClosed()
	var perr *vfiouser.ProtocolError
	if err := s.wait(t); !errors.As(err, &perr) {
		t.Errorf("Run: %v, want a ProtocolError", err)
	}
}

// TestDescriptorsOnPayload: descriptors that come later than the first byte
// still belong to their message, and count.
func TestDescriptorsOnPayload(t *testing.T) {
	s := greeted(t)
	a, b := eventfd(t, 0), eventfd(t, 0)
	set := message(1, 8, 20, 4|32, 2, 0, 2)
	s.write(set[:16], a)
	s.write(set[16:], b)
	s.expect(answer(1, 8))
	s.dev.state(func() { s.dev.raise(2, 1) })
	if counter(a) != 0 || counter(b) != 1 {
		t.Error("the second descriptor is not vector 1's")
	}
}

// TestRefuse: the device is asked for once, by the client's good VERSION, and
// what it says instead is the answer.
func TestRefuse(t *testing.T) {
	for _, c := range []struct {
		name   string
		bytes  []byte
		asked  int
		answer []byte
		want   error
	}{
		{"full", message(3, 1, uint16(0), uint16(0), qemuJSON, byte(0)), 1, errorAnswer(3, 1, unix.EBUSY), unix.EBUSY},
		{"no reply wanted", cat(uint16(3), uint16(1), 20, 0x10, 0, uint16(0), uint16(0)), 1, nil, unix.EBUSY},
		{"another version", message(3, 1, uint16(1), uint16(0)), 0, errorAnswer(3, 1, unix.EINVAL), nil},
		{"silence", nil, 0, nil, os.ErrDeadlineExceeded},
		{"not all of it", message(3, 1, uint16(0), uint16(0))[:17], 0, nil, os.ErrDeadlineExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkLeaks(t)
			peer, conn := newPair(t)
			asked := 0
			srv, err := vfiouser.NewServer(conn, func() (vfiouser.Device, error) {
				asked++
				return nil, fmt.Errorf("no peer is free: %w", unix.EBUSY)
			}, vfiouser.ServerOptions{VersionTimeout: 20 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- srv.Run() }()
			peer.write(c.bytes)
			if c.answer != nil {
				peer.expect(c.answer)
			}
			peer.expectClosed()
			if err := <-done; err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("Run: %v, want %v", err, c.want)
			}
			if asked != c.asked {
				t.Errorf("the device was asked for %d times, want %d", asked, c.asked)
			}
		})
	}
}

// TestServerNotRun: Close alone gives everything back.
func TestServerNotRun(t *testing.T) {
	checkLeaks(t)
	peer, conn := newPair(t)
	srv, err := vfiouser.NewServer(conn, nil, vfiouser.ServerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	srv.Close()
	peer.expectClosed()
	if err := srv.Run(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Run after Close: %v, want net.ErrClosed", err)
	}
	// A connection that is closed already.
	if err := vfiouser.Serve(conn, newFake(t), vfiouser.ServerOptions{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v, want net.ErrClosed", err)
	}
}
