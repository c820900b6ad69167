package pingpong

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"syscall"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/stream"
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
	Throughput Measure = "throughput" // one way, by Write or Send
	Rate       Measure = "rate"       // one way, 64 messages at a time
	Idle       Measure = "idle"       // a connection on which nothing happens
)

// StreamConfig is a run over streams. The leading peer's holds for both.
type StreamConfig struct {
	Over     Over          `json:"over"`
	Measure  Measure       `json:"measure"`
	Size     int           `json:"size"`     // of a message, bytes
	Messages uint64        `json:"messages"` // that count
	Warmup   uint64        `json:"warmup"`   // before them
	Batch    uint64        `json:"batch"`    // round trips that make a sample
	Duration time.Duration `json:"duration"` // of Idle
	Conns    int           `json:"conns"`    // idle connections besides
	// Read says that somebody waits for something to read on each of those:
	// not where waiting is looking all the time.
	Read bool `json:"read"`
}

// StreamResult is what the leading peer found.
type StreamResult struct {
	StreamConfig
	Elapsed time.Duration
	RTT     *hdrhistogram.Histogram // nanoseconds; Latency only
	// CPU is what both processes used, in seconds.
	CPU float64
	// Doorbells rung by both sides, and memory allocations of this one.
	Doorbells, Allocations uint64
}

// Ports of a run.
const (
	controlPort = 1
	idlePort    = 2
	dataPort    = 3
)

const (
	// minSize is the least size of a message: its sequence number.
	minSize = 8
	// rateBatch is how many messages are sent at a time.
	rateBatch = 64
)

// usage is what a peer spent.
type usage struct {
	CPU       float64 `json:"cpu"`
	Doorbells uint64  `json:"doorbells"`
	Error     string  `json:"error,omitempty"`
}

func spent(ep *stream.Endpoint) usage {
	var r unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &r)
	return usage{CPU: float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9, Doorbells: ep.Stats().Doorbells}
}

func (u usage) since(before usage) usage {
	return usage{CPU: u.CPU - before.CPU, Doorbells: u.Doorbells - before.Doorbells}
}

// Lead runs a measurement with a peer that follows.
func Lead(ctx context.Context, ep *stream.Endpoint, peer uint32, c StreamConfig) (*StreamResult, error) {
	if c.Size < minSize {
		return nil, fmt.Errorf("size %d: expected at least %d bytes", c.Size, minSize)
	}
	control, err := dial(ctx, ep, peer, controlPort)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	if err := sendJSON(control, c); err != nil {
		return nil, err
	}
	for range c.Conns {
		idle, err := dial(ctx, ep, peer, idlePort)
		if err != nil {
			return nil, err
		}
		defer idle.Close()
		if c.Read {
			go idle.Read(make([]byte, 1))
		}
	}
	data, err := dial(ctx, ep, peer, dataPort)
	if err != nil {
		return nil, err
	}
	defer data.Close()
	stop := context.AfterFunc(ctx, func() { data.Close(); control.Close() })
	defer stop()
	// The thread is kept, as waking another one costs more than the wait.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	res := &StreamResult{StreamConfig: c}
	l := &lead{ep: ep, data: data, control: control, res: res, p: make([]byte, c.Size), p2: make([]byte, c.Size)}
	if err := l.run(); err != nil {
		return res, errors.Join(context.Cause(ctx), err)
	}
	return res, nil
}

// dial dials until the peer listens.
func dial(ctx context.Context, ep *stream.Endpoint, peer, port uint32) (*stream.Conn, error) {
	for {
		c, err := ep.Dial(ctx, peer, port)
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EHOSTUNREACH) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func sendJSON(c *stream.Conn, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.Send(b)
}

func receiveJSON(c *stream.Conn, v any) error {
	b := make([]byte, 4096)
	n, err := c.Receive(b)
	if err != nil {
		return err
	}
	return json.Unmarshal(b[:n], v)
}

type lead struct {
	ep            *stream.Endpoint
	data, control *stream.Conn
	res           *StreamResult
	p, p2         []byte

	own     usage
	mallocs uint64
	begin   time.Time
}

// start begins what counts, and the peer's account too.
func (l *lead) start() error {
	if err := sendJSON(l.control, usage{}); err != nil {
		return err
	}
	var ready usage
	if err := receiveJSON(l.control, &ready); err != nil {
		return err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	l.own, l.mallocs, l.begin = spent(l.ep), m.Mallocs, time.Now()
	return nil
}

// finish ends it: one way runs end when the peer has everything, and says so.
func (l *lead) finish() error {
	oneWay := l.res.Measure == Throughput || l.res.Measure == Rate
	if !oneWay {
		l.account()
	}
	if err := sendJSON(l.control, usage{}); err != nil {
		return err
	}
	var peer usage
	if err := receiveJSON(l.control, &peer); err != nil {
		return err
	}
	if peer.Error != "" {
		return fmt.Errorf("peer: %s", peer.Error)
	}
	if oneWay {
		l.account()
	}
	l.res.CPU += peer.CPU
	l.res.Doorbells += peer.Doorbells
	return nil
}

func (l *lead) account() {
	l.res.Elapsed = time.Since(l.begin)
	u := spent(l.ep).since(l.own)
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	l.res.CPU, l.res.Doorbells, l.res.Allocations = u.CPU, u.Doorbells, m.Mallocs-l.mallocs
}

func (l *lead) run() error {
	c := l.res.StreamConfig
	if c.Measure == Idle {
		if err := l.start(); err != nil {
			return err
		}
		l.data.SetReadDeadline(time.Now().Add(c.Duration))
		l.data.Read(l.p)
		return l.finish()
	}
	if c.Measure == Latency {
		l.res.RTT = hdrhistogram.New(1, int64(time.Minute), 3)
	}
	if err := l.pass(1, c.Warmup, false); err != nil {
		return err
	}
	if err := l.start(); err != nil {
		return err
	}
	if err := l.pass(c.Warmup+1, c.Messages, true); err != nil {
		return err
	}
	return l.finish()
}

// pass sends n messages, of which the first has the number from.
func (l *lead) pass(from, n uint64, counts bool) error {
	c := l.res.StreamConfig
	switch c.Measure {
	case Latency:
		return l.trips(from, n, counts)
	case Rate:
		batch := make([][]byte, rateBatch)
		for i := range batch {
			batch[i] = make([]byte, c.Size)
		}
		for done := uint64(0); done < n; {
			b := batch[:min(n-done, rateBatch)]
			for i := range b {
				binary.LittleEndian.PutUint64(b[i], from+done+uint64(i))
			}
			if _, err := l.data.SendAll(b); err != nil {
				return err
			}
			done += uint64(len(b))
		}
		return nil
	}
	for seq := from; seq < from+n; seq++ {
		binary.LittleEndian.PutUint64(l.p, seq)
		if err := give(l.data, c.Over, l.p); err != nil {
			return err
		}
	}
	return nil
}

func (l *lead) trips(from, n uint64, counts bool) error {
	c := l.res.StreamConfig
	batch := max(c.Batch, 1)
	base := time.Now() // so that the clock is read once for a time
	sent := time.Since(base)
	for i := uint64(1); i <= n; i++ {
		binary.LittleEndian.PutUint64(l.p, from+i-1)
		if err := give(l.data, c.Over, l.p); err != nil {
			return err
		}
		if err := take(l.data, c.Over, l.p2, from+i-1); err != nil {
			return err
		}
		if i%batch != 0 {
			continue
		}
		now := time.Since(base)
		if counts {
			if err := l.res.RTT.RecordValue(max(1, int64(now-sent)/int64(batch))); err != nil {
				return err
			}
		}
		if batch == 1 { // what recording took is no part of the next one
			now = time.Since(base)
		}
		sent = now
	}
	return nil
}

// give sends a message.
func give(c *stream.Conn, over Over, p []byte) error {
	if over == Messages {
		return c.Send(p)
	}
	_, err := c.Write(p)
	return err
}

// take receives the message that is due.
func take(c *stream.Conn, over Over, p []byte, seq uint64) error {
	n := len(p)
	var err error
	if over == Messages {
		n, err = c.Receive(p)
	} else {
		_, err = io.ReadFull(c, p)
	}
	if err != nil {
		return err
	}
	if n != len(p) {
		return &MessageError{Field: "length", Expected: uint64(len(p)), Found: uint64(n)}
	}
	if got := binary.LittleEndian.Uint64(p); got != seq {
		return &MessageError{Field: "sequence number", Expected: seq, Found: got}
	}
	return nil
}
