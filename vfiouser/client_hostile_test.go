package vfiouser_test

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

// expectViolation requires that err is the end of the connection, for a reason
// that contains text, and that it is the answer to every later call.
func (s *scripted) expectViolation(err error, text string) {
	s.t.Helper()
	var dead *vfiouser.ConnectionError
	var perr *vfiouser.ProtocolError
	if !errors.As(err, &dead) || !errors.As(err, &perr) || perr.Peer != "server" || !strings.Contains(err.Error(), text) {
		s.t.Errorf("%v\nexpected a ProtocolError of the server with %q", err, text)
	}
	if again := s.client.Reset(); again != err {
		s.t.Errorf("the next call says %v", again)
	}
	s.expectClosed()
}

// TestClientHostileReplies: one wrong answer each.
func TestClientHostileReplies(t *testing.T) {
	info := func(c *vfiouser.Client) error { _, err := c.Info(); return err }
	irq := func(c *vfiouser.Client) error { _, err := c.IRQ(2); return err }
	read := func(c *vfiouser.Client) error { return c.ReadRegion(0, 4, make([]byte, 4)) }
	write := func(c *vfiouser.Client) error { return c.WriteRegion(0, 4, make([]byte, 4)) }
	unmap := func(c *vfiouser.Client) error { return c.DMAUnmap(0, 4096) }
	reset := func(c *vfiouser.Client) error { return c.Reset() }
	good := cat(16, 3, 9, 5)
	for _, c := range []struct {
		name  string
		call  func(*vfiouser.Client) error
		reply func(id uint16) []byte
		fds   int
		want  string
	}{
		{"another ID", info, func(id uint16) []byte { return answer(id+1, 4, good) }, 1, "the reply to request"},
		{"another command", info, func(id uint16) []byte { return answer(id, 7, good) }, 1, "the reply to request"},
		{"error with another ID", info, func(id uint16) []byte { return errorAnswer(id-1, 4, 5) }, 0, "the reply to request"},
		{"type 2", info, func(id uint16) []byte { return cat(id, uint16(4), 32, 2, 0, good) }, 1, "message type"},
		{"type 15", info, func(id uint16) []byte { return cat(id, uint16(4), 32, 15, 0, good) }, 0, "message type"},
		{"size 15", info, func(id uint16) []byte { return cat(id, uint16(4), 15, 1, 0) }, 1, "a size of 16 to 32"},
		{"size 0", info, func(id uint16) []byte { return cat(id, uint16(4), 0, 1, 0) }, 0, "a size of 16 to 32"},
		{"size 2^32-1", info, func(id uint16) []byte { return cat(id, uint16(4), max32, 1, 0) }, 0, "a size of 16 to 32"},
		{"size 2^31", info, func(id uint16) []byte { return cat(id, uint16(4), uint32(1<<31), 1, 0) }, 0, "a size of 16 to 32"},
		{"one byte too long", info, func(id uint16) []byte { return answer(id, 4, good, byte(0)) }, 0, "a size of 16 to 32"},
		{"error too long", info, func(id uint16) []byte { return cat(id, uint16(4), 1<<20+33, 0x21, 22) }, 0, "a size of 16 to 1048608"},
		{"too short", info, func(id uint16) []byte { return answer(id, 4, good[:15]) }, 0, "16 bytes"},
		{"nothing", info, func(id uint16) []byte { return answer(id, 4) }, 0, "16 bytes"},
		{"argsz 15", info, func(id uint16) []byte { return answer(id, 4, 15, 3, 9, 5) }, 0, "16 bytes"},
		{"101 regions", info, func(id uint16) []byte { return answer(id, 4, 16, 3, 101, 5) }, 0, "at most 100 regions"},
		{"51 interrupt types", info, func(id uint16) []byte { return answer(id, 4, 16, 3, 9, 51) }, 0, "50 interrupt types"},
		{"descriptors", info, func(id uint16) []byte { return answer(id, 4, good) }, 3, "at most 0 descriptors"},
		{"server command too long", info, func(id uint16) []byte { return cat(id, uint16(11), 1<<20+33, 0, 0) }, 0, "a size of 16 to 1048608"},
		{"server command size 0", info, func(id uint16) []byte { return cat(id, uint16(11), 0, 0, 0) }, 2, "a size of 16 to 1048608"},
		{"another interrupt type", irq, func(id uint16) []byte { return answer(id, 7, 16, 9, 3, 1) }, 0, "interrupt type 2"},
		{"too many vectors", irq, func(id uint16) []byte { return answer(id, 7, 16, 9, 2, 65537) }, 0, "interrupt type 2"},
		{"irq too short", irq, func(id uint16) []byte { return answer(id, 7, 16) }, 0, "interrupt type 2"},
		{"read less", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 0, 2, "ab") }, 0, "all its data"},
		{"read, count without data", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 0, 4, "ab") }, 0, "all its data"},
		{"read more", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 0, 5, "abcde") }, 0, "a size of 16 to 36"},
		{"read, count too large", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 0, 5, "abcd") }, 0, "all its data"},
		{"read elsewhere", read, func(id uint16) []byte { return answer(id, 9, uint64(8), 0, 4, "abcd") }, 0, "all its data"},
		{"read another region", read, func(id uint16) []byte { return answer(id, 9, uint64(4), 1, 4, "abcd") }, 0, "all its data"},
		{"read header only", read, func(id uint16) []byte { return answer(id, 9) }, 0, "all its data"},
		{"wrote less", write, func(id uint16) []byte { return answer(id, 10, uint64(4), 0, 3) }, 0, "all its data"},
		{"wrote elsewhere", write, func(id uint16) []byte { return answer(id, 10, uint64(5), 0, 4) }, 0, "all its data"},
		{"write header only", write, func(id uint16) []byte { return answer(id, 10) }, 0, "all its data"},
		{"unmapped something else", unmap, func(id uint16) []byte { return answer(id, 3, 24, 0, uint64(0), uint64(8192)) }, 0, "4096"},
		{"unmapped elsewhere", unmap, func(id uint16) []byte { return answer(id, 3, 24, 0, uint64(4096), uint64(4096)) }, 0, "4096"},
		{"unmap cut", unmap, func(id uint16) []byte { return answer(id, 3, 24, 0, uint64(0)) }, 0, "4096"},
		{"reset with payload", reset, func(id uint16) []byte { return answer(id, 13, 1) }, 0, "a size of 16 to 16"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScripted(t, `{}`)
			fds := make([]int, c.fds)
			for i := range fds {
				fds[i] = eventfd(t, 0)
			}
			err := s.during(func() error { return c.call(s.client) }, func() {
				header, _, _ := s.read()
				s.write(c.reply(binary.LittleEndian.Uint16(header)), fds...)
			})
			s.expectViolation(err, c.want)
		})
	}
}

// TestClientServerErrors: the connection survives error replies, whatever
// they carry.
func TestClientServerErrors(t *testing.T) {
	s := newScripted(t, `{}`)
	for _, c := range []struct {
		name  string
		reply func(id uint16) []byte
		fds   []int
		errno unix.Errno
	}{
		{"plain", func(id uint16) []byte { return errorAnswer(id, 13, unix.EIO) }, nil, unix.EIO},
		{"with payload", func(id uint16) []byte { return cat(id, uint16(13), 16+5000, 0x21, 1, make([]byte, 5000)) }, nil, unix.EPERM},
		{"with descriptors", func(id uint16) []byte { return errorAnswer(id, 13, unix.EIO) }, []int{eventfd(t, 0)}, unix.EIO},
		{"errno 0", func(id uint16) []byte { return errorAnswer(id, 13, 0) }, nil, unix.EINVAL},
		{"errno 4096", func(id uint16) []byte { return errorAnswer(id, 13, 4096) }, nil, unix.EINVAL},
		{"errno 2^32-1", func(id uint16) []byte { return cat(id, uint16(13), 16, 0x21, max32) }, nil, unix.EINVAL},
		{"errno without a name", func(id uint16) []byte { return errorAnswer(id, 13, 4000) }, nil, 4000},
		{"errno without the error bit", func(id uint16) []byte { return cat(id, uint16(13), 16, 1, 22) }, nil, 0},
		{"reserved flags", func(id uint16) []byte { return cat(id, uint16(13), 16, uint32(0xffffff01)&^0x20, 0) }, nil, 0},
	} {
		err := s.during(s.client.Reset, func() { s.write(c.reply(s.request(13)), c.fds...) })
		if c.errno == 0 {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		var remote *vfiouser.RemoteError
		if !errors.As(err, &remote) || !errors.Is(err, c.errno) || !strings.Contains(err.Error(), "DEVICE_RESET") {
			t.Errorf("%s: %v, want %v", c.name, err, c.errno)
		}
	}
}

// TestClientServerCommands: commands of the server are declined while a reply
// is awaited, their payload skipped.
func TestClientServerCommands(t *testing.T) {
	s := newScripted(t, `{}`)
	err := s.during(s.client.Reset, func() {
		id := s.request(13)
		s.write(message(id, 11, uint64(4096), uint64(64)))
		s.expect(errorAnswer(id, 11, unix.EINVAL))
		s.write(message(5, 12, uint64(4096), uint64(3), "abc"), eventfd(t, 0))
		s.expect(errorAnswer(5, 12, unix.EINVAL))
		posted := message(6, 12, uint64(4096), uint64(3), "abc")
		posted[8] = 0x10
		s.write(cat(posted, message(7, 999), answer(id, 13)))
		s.expect(errorAnswer(7, 999, unix.EINVAL))
	})
	if err != nil {
		t.Error(err)
	}
}

func TestClientOneByteAtATime(t *testing.T) {
	s := newScripted(t, `{}`)
	file := memfd(t, 4096*16)
	var r vfiouser.Region
	err := s.during(func() (err error) { r, err = s.client.Region(2); return err }, func() {
		header, _, _ := s.read()
		reply := answer(binary.LittleEndian.Uint16(header), 5, regionReply(32, 7, 2, 0, 4096*16, 0))
		s.write(reply[:1], file)
		for i := range reply[1:] {
			s.write(reply[i+1 : i+2])
		}
	})
	if err != nil || !sameFile(t, r.FD, file) {
		t.Errorf("%+v, %v", r, err)
	}
	unix.Close(r.FD)
}

// TestClientDeadline: a server that does not answer, or never finishes, costs
// one time limit; a late reply is not taken for another's.
func TestClientDeadline(t *testing.T) {
	for _, part := range []int{0, 1, 15, 16, 31} {
		s := newScripted(t, `{}`)
		if err := s.client.SetTimeout(20 * time.Millisecond); err != nil {
			t.Fatal(err)
		}
		var late []byte
		err := s.during(func() error { _, err := s.client.Info(); return err }, func() {
			header, _, _ := s.read()
			late = answer(binary.LittleEndian.Uint16(header), 4, 16, 3, 9, 5)
			s.write(late[:part])
		})
		var dead *vfiouser.ConnectionError
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &dead) {
			t.Fatalf("%d bytes answered: %v, want os.ErrDeadlineExceeded", part, err)
		}
		s.tryWrite(late[part:])
		if again := s.client.Reset(); again != err {
			t.Errorf("after the time limit: %v", again)
		}
	}
}

// TestClientCommandsWithoutEnd: commands of the server do not extend the time
// limit. All it says lies ready before the request, so that only the look at
// the clock between two messages can notice.
func TestClientCommandsWithoutEnd(t *testing.T) {
	s := newScripted(t, `{}`)
	id := uint16(0)
	if err := s.during(s.client.Reset, func() { id = s.request(13); s.write(answer(id, 13)) }); err != nil {
		t.Fatal(err)
	}
	s.write(cat(message(7, 12, uint64(0), uint64(0)), answer(id+1, 4, 16, 3, 9, 5)))
	if err := s.client.SetTimeout(time.Nanosecond); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Info(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want os.ErrDeadlineExceeded", err)
	}
}

// TestClientServerDoesNotRead: a request that nobody takes is given up too.
func TestClientServerDoesNotRead(t *testing.T) {
	s := newScripted(t, `{}`)
	if err := s.client.SetTimeout(20 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	err := s.client.WriteRegion(0, 0, make([]byte, 1<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want os.ErrDeadlineExceeded", err)
	}
	if d := time.Since(start); d >= vfiouser.DefaultTimeout {
		t.Errorf("given up after %v, not after 20ms", d)
	}
}

// TestClientLargeTransfers: however much a server takes, a message of this end
// has at most 1 MiB of data.
func TestClientLargeTransfers(t *testing.T) {
	s := newScripted(t, `{"capabilities":{"max_data_xfer_size":4294967295}}`)
	err := s.during(func() error { return s.client.WriteRegion(2, 8, make([]byte, 1<<20+4)) }, func() {
		id := s.request(10, uint64(8), 2, 1<<20, make([]byte, 1<<20))
		s.write(answer(id, 10, uint64(8), 2, 1<<20))
		id = s.request(10, uint64(8+1<<20), 2, 4, 0)
		s.write(answer(id, 10, uint64(8+1<<20), 2, 4))
	})
	if err != nil {
		t.Error(err)
	}
}

func TestClientServerEnds(t *testing.T) {
	for part, want := range map[int]error{0: io.EOF, 1: io.ErrUnexpectedEOF, 16: io.ErrUnexpectedEOF, 31: io.ErrUnexpectedEOF} {
		s := newScripted(t, `{}`)
		err := s.during(func() error { _, err := s.client.Info(); return err }, func() {
			header, _, _ := s.read()
			s.write(answer(binary.LittleEndian.Uint16(header), 4, 16, 3, 9, 5)[:part])
			s.close()
		})
		if !errors.Is(err, want) {
			t.Errorf("after %d bytes: %v, want %v", part, err, want)
		}
	}
}
