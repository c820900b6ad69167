package portload

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"testing/iotest"
)

func TestExchange(t *testing.T) {
	for _, test := range []struct {
		name    string
		corrupt bool
		want    string
	}{{"right", false, ""}, {"a bit turned over", true, "word 2048 of the stream"}} {
		t.Run(test.name, func(t *testing.T) {
			a, b := net.Pipe()
			const size = 3*piece + 8
			ended := make(chan error, 1)
			go func() {
				ended <- Exchange(a, "x", 0, size, test.corrupt)
				a.Close()
			}()
			err := Exchange(b, "x", 1, size, false)
			b.Close()
			if other := <-ended; test.want == "" && (err != nil || other != nil) {
				t.Errorf("%v, %v", err, other)
			}
			if test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

func TestReceiveFindsLoss(t *testing.T) {
	b := make([]byte, 4096)
	Fill(b, 5, 0)
	for name, r := range map[string]io.Reader{
		"a word is missing": io.MultiReader(bytes.NewReader(b[:800]), bytes.NewReader(b[808:]), bytes.NewReader(b[:8])),
		"the end":           bytes.NewReader(b[:4088]),
		"another stream":    iotest.OneByteReader(bytes.NewReader(make([]byte, 4096))),
	} {
		if receive(r, 5, 4096) == nil {
			t.Errorf("%s: was not seen", name)
		}
	}
	if err := receive(bytes.NewReader(b), 5, 4096); err != nil {
		t.Error(err)
	}
}

// pipe is a port between two ends: what was written and not read. Its bytes may
// go at any time.
type pipe struct {
	t    *testing.T
	ends [2]*End
	way  [2][]byte // from each end
}

func newPipe(t *testing.T) *pipe {
	p := &pipe{t: t, ends: [2]*End{NewEnd("x", 0), NewEnd("x", 1)}}
	for _, e := range p.ends {
		e.Anew()
	}
	return p
}

// step moves some bytes of an end. It fails with what the other one says to them.
func (p *pipe) step(from, most int) error {
	e := p.ends[from]
	if out := e.Output(); len(p.way[from]) < 1<<16 {
		n := min(len(out), most)
		p.way[from] = append(p.way[from], out[:n]...)
		e.Wrote(n)
	}
	n := min(len(p.way[from]), most)
	err := p.ends[1-from].Input(p.way[from][:n])
	p.way[from] = p.way[from][n:]
	return err
}

// settle lets both ends finish.
func (p *pipe) settle() {
	p.t.Helper()
	for _, e := range p.ends {
		e.Finish()
	}
	for n := 0; !p.ends[0].Idle() || !p.ends[1].Idle(); n++ {
		if n == 1e5 {
			p.t.Fatalf("they do not come to an end: %+v, %+v", p.ends[0], p.ends[1])
		}
		for from := range 2 {
			if err := p.step(from, 4096); err != nil {
				p.t.Fatal(err)
			}
		}
	}
	a, b := p.ends[0].Counts(), p.ends[1].Counts()
	if a.Acked != b.Received || b.Acked != a.Received || a.Acked == 0 || b.Acked == 0 {
		p.t.Errorf("%+v, %+v", a, b)
	}
}

// One end loses its file at random moments: what it was sent is gone, and the end
// of what it wrote.
func TestRecords(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	p := newPipe(t)
	for range 8000 {
		if err := p.step(r.IntN(2), 1+r.IntN(3000)); err != nil {
			t.Fatal(err)
		}
		if r.IntN(100) > 0 {
			continue
		}
		victim := r.IntN(2)
		p.way[victim] = p.way[victim][:r.IntN(len(p.way[victim])+1)]
		p.way[1-victim] = nil
		p.ends[victim].Anew()
		if r.IntN(3) == 0 { // the device: both
			p.way = [2][]byte{}
			p.ends[1-victim].Anew()
		}
	}
	p.settle()
	c := p.ends[0].Counts()
	if c.Repeated == 0 || c.Cut == 0 || c.Begun < 30 {
		t.Errorf("nothing was tried: %+v", c)
	}
}

// What was kept of a life of the other end is counted up to its next one.
func TestKept(t *testing.T) {
	p := newPipe(t)
	for range 100 {
		for from := range 2 {
			if err := p.step(from, 1000); err != nil {
				t.Fatal(err)
			}
		}
	}
	e := p.ends[0]
	for range 3 { // unread
		out := p.ends[1].Output()
		p.way[1] = append(p.way[1], out...)
		p.ends[1].Wrote(len(out))
	}
	unread := uint64(len(p.way[1]) - 100)
	p.way[1] = p.way[1][:unread]
	e.Reopened()
	p.ends[1].Anew()
	p.settle()
	if c := e.Counts(); c.Kept != unread || c.Cut != 1 || e.Opening() {
		t.Errorf("%+v, want %d bytes kept", c, unread)
	}
}

func TestRecordsFindLoss(t *testing.T) {
	for name, lose := range map[string]func([]byte) []byte{
		"a record is missing": func(b []byte) []byte { return b[recordSize:] },
		"a byte is missing":   func(b []byte) []byte { return append(b[:700], b[701:]...) },
		"a bit turned over":   func(b []byte) []byte { b[2000] ^= 1; return b },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPipe(t)
			for range 100 {
				for from := range 2 {
					if err := p.step(from, recordSize); err != nil {
						t.Fatal(err)
					}
				}
			}
			for range 8 {
				out := p.ends[1].Output()
				p.way[1] = append(p.way[1], out...)
				p.ends[1].Wrote(len(out))
			}
			p.way[1] = lose(p.way[1])
			if p.ends[0].Input(p.way[1]) == nil {
				t.Error("was not seen")
			}
		})
	}
}
