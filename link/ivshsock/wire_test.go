package ivshsock

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/link"
)

// The bytes are those of the protocol page's tables.
func TestMessages(t *testing.T) {
	c := link.Config{Peers: 0x203, Vectors: 0x30, Protocol: 0x8003, Output: 0x1122334455}
	for _, m := range []struct {
		name string
		got  []byte
		want string
	}{
		{"INIT", appendInit(nil, c, 0x102), "00000000 28000000 02000000 02000000 02010000 03020000 30000000 03800000 5544332211000000"},
		{"INIT of ID 0", appendInit(nil, c, 0)[28:32], "03c00000"},
		{"EVENT_FD", appendEventFD(nil, 0x102, 3), "01000000 10000000 02010000 03000000"},
		{"PEER_GONE", appendPeerGone(nil, 0x102), "02000000 0c000000 02010000"},
	} {
		if got, want := hex.EncodeToString(m.got), strings.ReplaceAll(m.want, " ", ""); got != want {
			t.Errorf("%s: got %s, want %s", m.name, got, want)
		}
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name   string
		config link.Config
		want   string // in the error; "": none
	}{
		{"fits", link.Config{Peers: 2, Vectors: 1, ReadWrite: 60 << 10}, ""},
		{"the most", link.Config{Peers: 1024, Vectors: 1024, ReadWrite: 4096, Output: 0}, ""},
		{"outputs", link.Config{Peers: 2, Vectors: 1, ReadWrite: 520192, Output: 256 << 10}, ""},
		{"8 GiB", link.Config{Peers: 2, Vectors: 1, ReadWrite: 8<<30 - 4096}, ""},
		{"too many peers", link.Config{Peers: 1025, Vectors: 1, ReadWrite: 8 << 10}, "at most 1024 peers"},
		{"too many vectors", link.Config{Peers: 2, Vectors: 1025, ReadWrite: 60 << 10}, "at most 1024 vectors"},
		{"State Table", link.Config{Peers: 2, Vectors: 1, StateTable: 8192, ReadWrite: 56 << 10}, "State Table of 4096 bytes"},
		{"no R/W section", link.Config{Peers: 3, Vectors: 1, Output: 4096}, "make the R/W section 16384 = 32768 - 4096 - 12288"},
		{"no power of two", link.Config{Peers: 2, Vectors: 1, ReadWrite: 1 << 20, Output: 256 << 10},
			"found 1576960 bytes (State Table 4096 + R/W section 1048576 + 2 output sections x 262144): make the R/W section 1568768 = 2097152 - 4096 - 524288"},
		{"no layout", link.Config{Peers: 1, Vectors: 1}, "Maximum Peers"},
	} {
		switch err := Check(c.config); {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got %v, want %q in it", c.name, err, c.want)
		}
	}
}

func TestReadWrite(t *testing.T) {
	for _, c := range []struct {
		peers                 uint32
		output, atLeast, want uint64
	}{
		{2, 0, 0, 4096}, // of 8192: never 0
		{2, 0, 4096, 4096},
		{2, 0, 4097, 12288},
		{2, 256 << 10, 0, 520192},
		{3, 4096, 0, 16384},
		{1024, 1 << 40, 1 << 50, 1<<52 - 1<<50 - 4096 - 1<<51 + 1<<50 + 1<<51 - 1<<50},
	} {
		got, err := ReadWrite(c.peers, c.output, c.atLeast)
		total := 4096 + uint64(c.peers)*c.output + got
		if err != nil || total&(total-1) != 0 || got < c.atLeast || got == 0 {
			t.Errorf("%+v: got %d (%d in all), %v", c, got, total, err)
		}
		if c.atLeast < 1<<40 && got != c.want {
			t.Errorf("%+v: got %d", c, got)
		}
	}
	for _, c := range [][3]uint64{{2, 1 << 63, 0}, {2, 1 << 61, 0}, {2, 0, 1 << 63}} {
		if got, err := ReadWrite(uint32(c[0]), c[1], c[2]); err == nil {
			t.Errorf("%d: got %d", c, got)
		}
	}
}

// trickle is a socket that takes a byte at a time.
type trickle struct {
	bytes.Buffer
	oob  []string
	full int // times to have too many descriptors on their way
}

func (w *trickle) WriteMsgUnix(b, oob []byte, _ *net.UnixAddr) (int, int, error) {
	if w.full > 0 {
		w.full--
		return 0, 0, &net.OpError{Op: "write", Err: unix.ETOOMANYREFS}
	}
	w.oob = append(w.oob, string(oob))
	n := min(len(b), len(w.oob)%2) // nothing, now and then
	w.Write(b[:n])
	return n, len(oob), nil
}

// TestPartialWrites: the rest follows, and the descriptor is sent once.
func TestPartialWrites(t *testing.T) {
	w := &trickle{full: 3}
	if err := send(w, appendEventFD(nil, 1, 2), []byte("fd"), nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.Bytes(), appendEventFD(nil, 1, 2)) {
		t.Errorf("sent %x", w.Bytes())
	}
	if got := strings.Join(w.oob, ""); got != "fd" {
		t.Errorf("descriptors sent: %q", w.oob)
	}
	// Whom there is no room for in the end.
	stop := make(chan struct{})
	close(stop)
	if err := send(&trickle{full: 1 << 30}, appendEventFD(nil, 1, 2), []byte("fd"), stop); !errors.Is(err, unix.ETOOMANYREFS) {
		t.Errorf("got %v, want ETOOMANYREFS", err)
	}
}

// TestQueueIsBounded: however often peers come and go, a client that takes
// nothing is told only of what is then.
func TestQueueIsBounded(t *testing.T) {
	c := &client{wake: make(chan struct{}, 1), ended: make(chan struct{})}
	c.push(event{id: 1})
	if e, ok := c.next(); !ok || e.id != 1 || e.gone { // told
		t.Fatalf("%+v, %v", e, ok)
	}
	await := newTold()
	for range 1000 {
		c.push(event{id: 1, gone: true})
		await.expect()
		c.push(event{id: 1, told: await})
		c.push(event{id: 2})
		c.push(event{id: 2, gone: true})
		if len(c.queue) > 2 {
			t.Fatalf("queue: %+v", c.queue)
		}
	}
	for _, gone := range []bool{true, false} {
		e, ok := c.next()
		if !ok || e.id != 1 || e.gone != gone {
			t.Fatalf("%+v, %v, want gone %v", e, ok, gone)
		}
		e.told.done()
	}
	select {
	case <-await.all():
	default:
		t.Error("somebody is waited for who has been told, or never will be")
	}
}
