package nbd_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ivshmem-go/ivshmem/internal/nbd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// disk is a disk in memory that says what it is asked for.
type disk struct {
	readOnly, simple bool
	block            chan struct{} // what reads at sector 7 wait for

	mu   sync.Mutex
	data []byte
	done []string
}

func newDisk(sectors int) *disk {
	d := &disk{data: make([]byte, sectors*512)}
	for i := range d.data {
		d.data[i] = byte(i / 512)
	}
	return d
}

func (d *disk) note(s string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done = append(d.done, s)
}

func (d *disk) Size() int64      { return int64(len(d.data)) }
func (d *disk) ReadOnly() bool   { return d.readOnly }
func (d *disk) CanZero() bool    { return !d.simple }
func (d *disk) CanDiscard() bool { return !d.simple }

func (d *disk) ReadAt(p []byte, offset int64) (int, error) {
	if offset == 7*512 && d.block != nil {
		<-d.block
	}
	if offset == 6*512 {
		return 0, errors.New("a bad sector")
	}
	return copy(p, d.data[offset:]), nil
}

func (d *disk) WriteAt(p []byte, offset int64) (int, error) {
	d.note("write")
	return copy(d.data[offset:], p), nil
}

func (d *disk) Flush() error { d.note("flush"); return nil }

func (d *disk) Zero(offset, n int64, unmap bool) error {
	if d.simple {
		return errors.ErrUnsupported
	}
	d.note(map[bool]string{true: "zero, unmap", false: "zero"}[unmap])
	return nil
}

func (d *disk) Discard(offset, n int64) error { d.note("discard"); return nil }

// client is one end of a connection, as bytes.
type client struct {
	testing.TB
	net.Conn
	served chan error
}

func dial(t testing.TB, d *disk) *client {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(time.Minute))
	ctx, cancel := context.WithCancel(context.Background())
	c := &client{t, conn, make(chan error, 1)}
	go func() { c.served <- nbd.Serve(ctx, server, d) }()
	t.Cleanup(func() {
		cancel()
		conn.Close()
		select {
		case <-c.served:
		default:
		}
	})
	return c
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// say sends bytes.
func (c *client) say(s string) {
	c.Helper()
	if _, err := c.Write(unhex(c, s)); err != nil {
		c.Fatal(err)
	}
}

// hear expects bytes.
func (c *client) hear(s string) {
	c.Helper()
	want := unhex(c, s)
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		c.Fatalf("got %x (%v), want %x", got[:n], err, want)
	}
}

const (
	hello   = "4e42444d41474943 49484156454f5054 0003"
	option  = "49484156454f5054"
	answer  = "0003e889045565a9"
	request = "25609513"
	reply   = "67446698"
)

// shake goes on to requests.
func (c *client) shake(flags string) {
	c.Helper()
	c.hear(hello)
	c.say("00000003" + option + "00000001 00000000")
	c.hear("0000000000001400" + flags)
}

// Handshakes of several kinds, in the bytes of the protocol document.
func TestHandshake(t *testing.T) {
	d := newDisk(10)
	t.Run("export name, with zeroes", func(t *testing.T) {
		c := dial(t, d)
		c.hear(hello)
		c.say("00000001" + option + "00000001 00000000")
		c.hear("0000000000001400 016d" + strings.Repeat("00", 124))
		c.say(request + "0000 0002 0000000000000000 0000000000000000 00000000")
		if err := <-c.served; err != nil {
			t.Error(err)
		}
	})
	t.Run("options", func(t *testing.T) {
		c := dial(t, d)
		c.hear(hello)
		c.say("00000003")
		c.say(option + "00000003 00000000") // LIST
		c.hear(answer + "00000003 00000002 00000004 00000000")
		c.hear(answer + "00000003 00000001 00000000")
		c.say(option + "00000008 00000000") // STRUCTURED_REPLY
		c.hear(answer + "00000008 80000001 00000000")
		c.say(option + "00000005 00000000") // STARTTLS
		c.hear(answer + "00000005 80000001 00000000")
		c.say(option + "00000006 00000007 00000001 78 0000") // INFO of "x"
		c.hear(answer + "00000006 80000006 00000020" + hex.EncodeToString([]byte(`expected export "", the only one`)))
		c.Close()
		<-c.served
	})
	t.Run("go", func(t *testing.T) {
		c := dial(t, d)
		c.hear(hello)
		c.say("00000003")
		for _, bad := range []string{"", "00", "00000000", "00000001 0000", "ffffffff 0000", "00000000 0001", "00000000 0000 00"} {
			n := len(unhex(t, bad))
			c.say(option + "00000007" + hex.EncodeToString([]byte{0, 0, 0, byte(n)}) + bad)
			c.hear(answer + "00000007 80000003 00000000")
		}
		c.say(option + "00000007 00000008 00000000 0001 0003") // GO, BLOCK_SIZE
		c.hear(answer + "00000007 00000003 0000000c 0000 0000000000001400 016d")
		c.hear(answer + "00000007 00000003 0000000e 0003 00000200 00001000 02000000")
		c.hear(answer + "00000007 00000001 00000000")
		c.say(request + "0000 0003 1122334455667788 0000000000000000 00000000")
		c.hear(reply + "00000000 1122334455667788")
	})
	t.Run("abort", func(t *testing.T) {
		c := dial(t, d)
		c.hear(hello)
		c.say("00000003" + option + "00000002 00000000")
		c.hear(answer + "00000002 00000001 00000000")
		if err := <-c.served; err != nil {
			t.Error(err)
		}
	})
	for name, bytes := range map[string]string{
		"flags":             "00000007",
		"magic":             "00000003 49484156454f5055 00000001 00000000",
		"length of an opti": "00000003" + option + "00000001 00010001",
		"wants export":      "00000003" + option + "00000001 00000001 78",
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, d)
			c.hear(hello)
			c.say(bytes)
			if err := <-c.served; err == nil || !strings.Contains(err.Error(), name) {
				t.Error(err)
			}
		})
	}
}

// Requests and replies, in the bytes of the protocol document.
func TestRequests(t *testing.T) {
	sector := func(n string) string { return strings.Repeat(n, 512) }
	const cookie = "0102030405060708"
	for _, c := range []struct {
		name             string
		readOnly, simple bool
		say, hear        string // behind the magic
		done             string
	}{
		{"read", false, false, "0000 0000" + cookie + "0000000000000400 00000200", "00000000" + cookie + sector("02"), ""},
		{"read at the end", false, false, "0000 0000" + cookie + "0000000000001200 00000200", "00000000" + cookie + sector("09"), ""},
		{"read of a part of a sector", false, false, "0000 0000" + cookie + "00000000000003ff 00000002", "00000000" + cookie + "0102", ""},
		{"read of nothing", false, false, "0000 0000" + cookie + "0000000000000000 00000000", "00000000" + cookie, ""},
		{"read beyond the end", false, false, "0000 0000" + cookie + "0000000000001201 00000200", "00000016" + cookie, ""},
		{"read far away", false, false, "0000 0000" + cookie + "fffffffffffffe00 00000200", "00000016" + cookie, ""},
		{"read of too much", false, false, "0000 0000" + cookie + "0000000000000000 ffffffff", "00000016" + cookie, ""},
		{"read of a bad sector", false, false, "0000 0000" + cookie + "0000000000000c00 00000200", "00000005" + cookie, ""},
		{"write", false, false, "0000 0001" + cookie + "0000000000000400 00000200" + sector("ee"), "00000000" + cookie, "write"},
		{"write, FUA", false, false, "0001 0001" + cookie + "0000000000000400 00000200" + sector("ee"), "00000000" + cookie, "write flush"},
		{"write beyond the end", false, false, "0000 0001" + cookie + "0000000000001400 00000001 ee", "0000001c" + cookie, ""},
		{"write to a read-only disk", true, false, "0000 0001" + cookie + "0000000000000400 00000200" + sector("ee"), "00000001" + cookie, ""},
		{"write with a flag of others", false, false, "0002 0001" + cookie + "0000000000000400 00000001 ee", "00000016" + cookie, ""},
		{"flush", false, false, "0000 0003" + cookie + "0000000000000000 00000000", "00000000" + cookie, "flush"},
		{"trim", false, false, "0000 0004" + cookie + "0000000000000400 00000200", "00000000" + cookie, "discard"},
		{"trim, FUA", false, false, "0001 0004" + cookie + "0000000000000400 00000200", "00000000" + cookie, "discard flush"},
		{"trim beyond the end", false, false, "0000 0004" + cookie + "0000000000001400 00000200", "00000016" + cookie, ""},
		{"trim of a part of a sector", false, false, "0000 0004" + cookie + "0000000000000401 00000200", "00000016" + cookie, ""},
		{"trim of a read-only disk", true, false, "0000 0004" + cookie + "0000000000000400 00000200", "00000001" + cookie, ""},
		{"write zeroes", false, false, "0000 0006" + cookie + "0000000000000400 00000200", "00000000" + cookie, "zero, unmap"},
		{"write zeroes, no hole, FUA", false, false, "0003 0006" + cookie + "0000000000000400 00000200", "00000000" + cookie, "zero flush"},
		{"write zeroes beyond the end", false, false, "0000 0006" + cookie + "0000000000000400 ffffffff", "0000001c" + cookie, ""},
		{"write zeroes that cannot be", false, true, "0000 0006" + cookie + "0000000000000400 00000200", "0000005f" + cookie, ""},
		{"write zeroes, fast", false, false, "0010 0006" + cookie + "0000000000000400 00000200", "00000016" + cookie, ""},
		{"a command that nobody knows", false, false, "0000 0063" + cookie + "0000000000000000 00000000", "00000016" + cookie, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDisk(10)
			d.readOnly, d.simple = c.readOnly, c.simple
			k := dial(t, d)
			flags := "016d"
			if c.readOnly {
				flags = "010f"
			} else if c.simple {
				flags = "010d"
			}
			k.shake(flags)
			k.say(request + c.say)
			k.hear(reply + c.hear)
			// Nothing is left over.
			k.say(request + "0000 0002 0000000000000000 0000000000000000 00000000")
			if err := <-k.served; err != nil {
				t.Error(err)
			}
			if got := strings.Join(d.done, " "); got != c.done {
				t.Errorf("done: %q, want %q", got, c.done)
			}
			if written := bytes.Contains(d.data, []byte{0xee}); written != strings.HasPrefix(c.done, "write") {
				t.Errorf("written: %v", written)
			}
		})
	}
}

// What the client must not do ends the connection.
func TestViolations(t *testing.T) {
	for name, bytes := range map[string]string{
		"magic of a request": "25609514 0000 0000 0000000000000000 0000000000000000 00000000",
		"length of a write":  request + "0000 0001 0000000000000000 0000000000000000 02000001",
	} {
		c := dial(t, newDisk(10))
		c.shake("016d")
		c.say(bytes)
		var violation *nbd.ProtocolError
		if err := <-c.served; !errors.As(err, &violation) || violation.Field != name {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A request that takes long holds up none of the others; a client that goes, or
// the end of the context, ends all of them.
func TestConcurrency(t *testing.T) {
	d := newDisk(10)
	d.block = make(chan struct{})
	c := dial(t, d)
	c.shake("016d")
	for range 7 {
		c.say(request + "0000 0000 00000000000000aa 0000000000000e00 00000001") // waits
	}
	c.say(request + "0000 0000 00000000000000bb 0000000000000400 00000001")
	c.hear(reply + "00000000 00000000000000bb 02")
	c.say(request + "0000 0002 0000000000000000 0000000000000000 00000000")
	close(d.block)
	for range 7 {
		c.hear(reply + "00000000 00000000000000aa 07")
	}
	if err := <-c.served; err != nil {
		t.Error(err)
	}
}

// Large requests, one at a time.
func TestLarge(t *testing.T) {
	d := newDisk(16 << 10) // 8 MiB
	c := dial(t, d)
	c.hear(hello)
	c.say("00000003" + option + "00000001 00000000")
	c.hear("0000000000800000 016d")
	data := bytes.Repeat([]byte{0xab}, 4<<20)
	go func() {
		for range 2 {
			c.say(request + "0000 0001 00000000000000aa 0000000000000000 00400000")
			c.Write(data)
			c.say(request + "0000 0000 00000000000000bb 0000000000000000 00400000")
		}
	}()
	for range 2 {
		c.hear(reply + "00000000 00000000000000aa")
		c.hear(reply + "00000000 00000000000000bb")
		got := make([]byte, len(data))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%v", err)
		}
	}
}

// A client that does not take its replies does not keep Serve from ending.
func TestStuck(t *testing.T) {
	d := newDisk(1 << 10)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- nbd.Serve(ctx, server, d) }()
	c := &client{TB: t, Conn: conn}
	c.hear(hello)
	c.say("00000003" + option + "00000001 00000000")
	conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)) // until nothing is read any more
	for err == nil {
		_, err = conn.Write(unhex(t, request+"0000 0000 0000000000000000 0000000000000000 00080000"))
	}
	cancel()
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
