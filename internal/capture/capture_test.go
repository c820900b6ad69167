package capture_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/capture"
	"github.com/ivshmem-go/ivshmem/vnet"
)

// shared is a buffer that one goroutine writes and another reads.
type shared struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *shared) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *shared) bytes() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.b.Bytes())
}

// block is a block of a pcapng file, taken apart by the format's draft (IETF,
// draft-ietf-opsawg-pcapng), sections 3.1 and 4.
type block struct {
	kind uint32
	body []byte
}

func blocks(t *testing.T, p []byte) (all []block) {
	t.Helper()
	for len(p) > 0 {
		if len(p) < 12 {
			t.Fatalf("%d bytes after the last block", len(p))
		}
		n := int(binary.LittleEndian.Uint32(p[4:]))
		if n > len(p) || n%4 != 0 || binary.LittleEndian.Uint32(p[n-4:]) != uint32(n) {
			t.Fatalf("a block of %d bytes, of %d", n, len(p))
		}
		all = append(all, block{binary.LittleEndian.Uint32(p), p[8 : n-4]})
		p = p[n:]
	}
	return all
}

// options reads the options at the end of a block.
func options(t *testing.T, p []byte) map[uint16]string {
	t.Helper()
	all := map[uint16]string{}
	for len(p) >= 4 {
		code, n := binary.LittleEndian.Uint16(p), int(binary.LittleEndian.Uint16(p[2:]))
		if code == 0 {
			break
		}
		all[code] = string(p[4 : 4+n])
		p = p[4+(n+3)&^3:]
	}
	return all
}

func TestCapture(t *testing.T) {
	var out shared
	w, err := capture.New(&out, "ivsh0", "virtual Ethernet, peer 0")
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	frame := []byte("dddddd" + "ssssss" + "\x08\x00" + "payload")
	w.Observe(vnet.Frame{Sent: true, Data: frame})
	w.Observe(vnet.Frame{Data: frame[:14]})
	w.Observe(vnet.Frame{Dropped: "flags of the descriptor"})
	// Who reads along need not wait for the end.
	for len(blocks(t, out.bytes())) < 5 {
		time.Sleep(time.Millisecond)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	all := blocks(t, out.bytes())
	if all[0].kind != 0x0A0D0D0A || binary.LittleEndian.Uint32(all[0].body) != 0x1A2B3C4D {
		t.Errorf("section header %x", all[0])
	}
	if d := all[1]; d.kind != 1 || binary.LittleEndian.Uint16(d.body) != 1 {
		t.Errorf("interface %x, want one of Ethernet", d)
	} else if o := options(t, d.body[8:]); o[2] != "ivsh0" || o[3] != "virtual Ethernet, peer 0" || o[9] != "\x09" {
		t.Errorf("options of the interface %v", o)
	}
	for i, want := range []struct {
		data      []byte
		direction uint32
		comment   string
	}{{frame, 2, ""}, {frame[:14], 1, ""}, {nil, 1, "dropped: flags of the descriptor"}} {
		b := all[2+i]
		if b.kind != 6 {
			t.Fatalf("block %d is of type %d", 2+i, b.kind)
		}
		ns := int64(binary.LittleEndian.Uint32(b.body[4:]))<<32 | int64(binary.LittleEndian.Uint32(b.body[8:]))
		if at := time.Unix(0, ns); at.Before(begin) || at.After(time.Now()) {
			t.Errorf("frame %d at %v", i, at)
		}
		n := int(binary.LittleEndian.Uint32(b.body[12:]))
		o := options(t, b.body[20+(n+3)&^3:])
		if !bytes.Equal(b.body[20:20+n], want.data) || o[1] != want.comment || binary.LittleEndian.Uint32([]byte(o[2])) != want.direction {
			t.Errorf("frame %d: %q, %v", i, b.body[20:20+n], o)
		}
	}
}

type full struct{ after int }

func (f *full) Write(p []byte) (int, error) {
	if f.after -= len(p); f.after < 0 {
		return 0, errors.New("no space")
	}
	return len(p), nil
}

// TestFull has nobody wait, or die, for a file that cannot be written.
func TestFull(t *testing.T) {
	w, err := capture.New(&full{after: 1000}, "", "")
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		w.Observe(vnet.Frame{Data: make([]byte, 1500)})
	}
	if err := w.Close(); err == nil || !strings.Contains(err.Error(), "no space") {
		t.Errorf("close: %v", err)
	}
	if _, err := capture.New(&full{}, "", ""); err == nil {
		t.Error("new: no error")
	}
}

// gated is a reader that reads the beginning, and the rest when the gate opens.
type gated struct {
	shared
	begun atomic.Bool
	gate  chan struct{}
}

func (g *gated) Write(p []byte) (int, error) {
	if g.begun.Swap(true) {
		<-g.gate
	}
	return g.shared.Write(p)
}

// TestSlow has a reader that does not read at first: nobody waits for it, and it
// is told what it missed.
func TestSlow(t *testing.T) {
	out := &gated{gate: make(chan struct{})}
	c, err := capture.New(out, "", "")
	if err != nil {
		t.Fatal(err)
	}
	sent := 20000 // more than are kept
	for range sent {
		c.Observe(vnet.Frame{Data: make([]byte, 1500)})
	}
	close(out.gate)
	// What comes after the gap tells how long it was.
	for ; !bytes.Contains(out.bytes(), []byte("last")); sent++ {
		c.Observe(vnet.Frame{Data: []byte("last")})
		time.Sleep(time.Millisecond)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	seen, missed := 0, 0
	for _, b := range blocks(t, out.bytes()) {
		if b.kind != 6 {
			continue
		}
		seen++
		n := int(binary.LittleEndian.Uint32(b.body[12:]))
		if o := options(t, b.body[20+(n+3)&^3:]); o[4] != "" {
			missed += int(binary.LittleEndian.Uint64([]byte(o[4])))
		}
	}
	if seen+missed != sent || missed == 0 {
		t.Errorf("%d seen and %d missed, want %d together, and some missed", seen, missed, sent)
	}
}
