package pingpong

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// Over is what messages go over.
type Over string

// The layers.
const (
	Section  Over = "section"  // a word in a section, see Run
	Messages Over = "messages" // stream.Conn's messages
	Conn     Over = "conn"     // stream.Conn as net.Conn
)

// Measure is what is measured.
type Measure string

// Measures.
const (
	Latency    Measure = "latency"    // round trips
	Throughput Measure = "throughput" // one way, a message at a time
	Rate       Measure = "rate"       // one way, 64 messages at a time
	Idle       Measure = "idle"       // a connection on which nothing happens
)

// rateBatch is how many messages Rate sends at a time.
const rateBatch = 64

// Task is one measurement between two processes. The leading one's holds for
// both.
type Task struct {
	Over    Over    `json:"over"`
	Measure Measure `json:"measure"`
	Size    int     `json:"size"` // of a message in bytes
	// Messages and Duration end a run, whichever is reached first. 0 is no
	// limit. Idle has a Duration only.
	Messages uint64        `json:"messages"`
	Duration time.Duration `json:"duration"`
	Warmup   uint64        `json:"warmup"` // messages before those that count
	// Batch is how many round trips make a sample. 0 is 1.
	Batch uint64 `json:"batch"`
	// Rate is messages per second of an open loop, for Latency; 0 is a closed
	// loop: each message when the answer to the last one is there.
	Rate  float64 `json:"rate"`
	Conns int     `json:"conns"` // idle connections besides, over streams
	// Read says that somebody waits for something to read on each of those:
	// not where waiting is looking all the time.
	Read bool `json:"read"`
	// More says that another task follows.
	More bool `json:"more"`
}

// Check checks what a peer may have sent.
func (t *Task) Check() error {
	if t.Size < minSize || t.Size > maxSize {
		return fmt.Errorf("size %d: expected %d to %d bytes", t.Size, minSize, maxSize)
	}
	if t.Messages == 0 && t.Duration == 0 {
		return errors.New("expected a number of messages or a duration")
	}
	return nil
}

// Outcome is what the leading process found.
type Outcome struct {
	Task
	Messages uint64 // that were counted
	Elapsed  time.Duration
	RTT      *hdrhistogram.Histogram // nanoseconds; Latency only
	// CPU is what both processes used, in seconds.
	CPU float64
	// Doorbells rung by both sides, and memory allocations of this one.
	Doorbells, Allocations uint64
}

// Channel carries messages of one size, both ways.
type Channel interface {
	Send(p []byte) error
	// Receive receives one message into the whole of p.
	Receive(p []byte) error
}

// batchSender is a Channel that sends several messages by less than a call for
// each.
type batchSender interface {
	SendAll(messages [][]byte) (int, error)
}

// Link is one process's end of what is measured.
type Link struct {
	Data Channel
	// Control carries what both have to tell each other beside the messages.
	Control *Control
	// Doorbells returns how many were rung so far; nil: there are none.
	Doorbells func() uint64
	// Idle lets nothing happen for a time; nil: it cannot be measured.
	Idle func(time.Duration)
}

// Control carries values, as JSON.
type Control struct {
	enc *json.Encoder
	dec *json.Decoder
}

// NewControl makes a control connection of one that carries bytes.
func NewControl(rw io.ReadWriter) *Control {
	return &Control{json.NewEncoder(rw), json.NewDecoder(rw)}
}

// usage is what a process spent.
type usage struct {
	CPU       float64 `json:"cpu"`
	Doorbells uint64  `json:"doorbells"`
}

func (l *Link) spent() usage {
	var r unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &r)
	u := usage{CPU: float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9}
	if l.Doorbells != nil {
		u.Doorbells = l.Doorbells()
	}
	return u
}

func (u usage) since(before usage) usage {
	return usage{CPU: u.CPU - before.CPU, Doorbells: u.Doorbells - before.Doorbells}
}

// LeadTask measures over a link whose other end answers by FollowTask.
func LeadTask(link Link, t Task) (*Outcome, error) {
	if err := t.Check(); err != nil {
		return nil, err
	}
	l := &lead{Link: link, res: &Outcome{Task: t}, p: make([]byte, t.Size), p2: make([]byte, t.Size)}
	return l.res, l.run()
}

// FollowTask answers. It returns when the leading process has what it needs.
func FollowTask(link Link, t Task) error {
	if err := t.Check(); err != nil {
		return err
	}
	p := make([]byte, t.Size)
	if t.Measure != Idle {
		for seq := uint64(1); seq <= t.Warmup; seq++ {
			if err := answer(link.Data, t, p, seq); err != nil {
				return err
			}
		}
	}
	var turn struct{}
	if err := link.Control.dec.Decode(&turn); err != nil {
		return err
	}
	before := link.spent()
	if err := link.Control.enc.Encode(turn); err != nil {
		return err
	}
	for seq := t.Warmup + 1; t.Measure != Idle; seq++ {
		err := answer(link.Data, t, p, seq)
		if errors.Is(err, errEnd) {
			break
		}
		if err != nil {
			return err
		}
	}
	if err := link.Control.dec.Decode(&turn); err != nil {
		return err
	}
	if err := link.Control.enc.Encode(link.spent().since(before)); err != nil {
		return err
	}
	link.Control.dec.Decode(&turn) // until the leading one has read it, and leaves
	return nil
}

// answer takes message seq, and sends it back if it is a round trip.
func answer(c Channel, t Task, p []byte, seq uint64) error {
	if err := c.Receive(p); err != nil {
		return err
	}
	if err := check(p, seq); err != nil {
		return err
	}
	if t.Measure == Latency {
		return c.Send(p)
	}
	return nil
}
