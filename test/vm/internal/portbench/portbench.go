// Package portbench measures a connection of bytes between two programs, of
// which one leads and says what is to be done. Every 64th byte carries a number
// that the receiver checks.
package portbench

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"time"
)

// Measure is what is measured.
type Measure uint64

const (
	RoundTrip  Measure = 1 + iota // messages that come back
	FromLeader                    // bytes to the one that follows
	ToLeader                      // and from it
)

// Measures has the names of measures.
var Measures = map[string]Measure{"round trip": RoundTrip, "from the guest": FromLeader, "to the guest": ToLeader}

// Figures is what was found.
type Figures struct {
	P50       float64 `json:"p50"`         // of round trips, in ns
	BytesPerS float64 `json:"bytes_per_s"` // one way
	Messages  uint64  `json:"messages"`
}

// request is what the leading one says: a measure, the size of a message, and
// how many.
type request struct{ Measure, Size, Count uint64 }

const (
	requestSize = 24
	maxSize     = 1 << 20
	step        = 64
)

func (r request) bytes() []byte {
	b := binary.LittleEndian.AppendUint64(nil, r.Measure)
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(b, r.Size), r.Count)
}

func stamp(p []byte, seq uint64) {
	for at := 0; at+8 <= len(p); at += step {
		binary.LittleEndian.PutUint64(p[at:], seq^uint64(at)<<32)
	}
}

func check(p []byte, seq uint64) error {
	for at := 0; at+8 <= len(p); at += step {
		if got, want := binary.LittleEndian.Uint64(p[at:]), seq^uint64(at)<<32; got != want {
			return fmt.Errorf("message %d: expected %#x at byte %d, found %#x", seq, want, at, got)
		}
	}
	return nil
}

func send(w io.Writer, p []byte, count uint64) error {
	for seq := range count {
		stamp(p, seq)
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

func receive(r io.Reader, p []byte, count uint64) error {
	for seq := range count {
		if _, err := io.ReadFull(r, p); err != nil {
			return err
		}
		if err := check(p, seq); err != nil {
			return err
		}
	}
	return nil
}

// Follow does what the leading one says, until the connection ends.
func Follow(rw io.ReadWriter) error {
	b := make([]byte, requestSize)
	for {
		if _, err := io.ReadFull(rw, b); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		r := request{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])}
		if r.Size < 8 || r.Size > maxSize {
			return fmt.Errorf("request %+v: expected messages of 8 to %d bytes", r, maxSize)
		}
		p := make([]byte, r.Size)
		var err error
		switch Measure(r.Measure) {
		case RoundTrip:
			for seq := range r.Count {
				if err = receive(rw, p, 1); err == nil {
					_, err = rw.Write(p)
				}
				if err != nil {
					return fmt.Errorf("round trip %d: %w", seq, err)
				}
			}
		case FromLeader:
			if err = receive(rw, p, r.Count); err == nil {
				_, err = rw.Write(p[:8])
			}
		case ToLeader:
			err = send(rw, p, r.Count)
		default:
			err = fmt.Errorf("request %+v: unknown", r)
		}
		if err != nil {
			return err
		}
	}
}

// Lead measures for about as long as it is told.
func Lead(rw io.ReadWriter, m Measure, size int, limit time.Duration) (f Figures, err error) {
	p := make([]byte, size)
	var took time.Duration
	var trips []float64
	run := func(count uint64) error {
		if _, err := rw.Write(request{uint64(m), uint64(size), count}.bytes()); err != nil {
			return err
		}
		trips = trips[:0]
		begin := time.Now()
		defer func() { took = time.Since(begin) }()
		switch m {
		case RoundTrip:
			for range count {
				sent := time.Now()
				if err := send(rw, p, 1); err != nil {
					return err
				}
				if err := receive(rw, p, 1); err != nil {
					return err
				}
				trips = append(trips, float64(time.Since(sent)))
			}
			return nil
		case FromLeader:
			if err := send(rw, p, count); err != nil {
				return err
			}
			_, err := io.ReadFull(rw, p[:8])
			return err
		}
		return receive(rw, p, count)
	}
	// The first ones warm up, and tell how many there is time for.
	const first = 16
	if err := run(first); err != nil {
		return f, err
	}
	count := max(first, uint64(first*float64(limit)/float64(max(took, time.Microsecond))))
	if err := run(count); err != nil {
		return f, err
	}
	f.Messages = count
	f.BytesPerS = float64(count) * float64(size) / took.Seconds()
	if len(trips) > 0 {
		slices.Sort(trips)
		f.P50 = trips[len(trips)/2]
	}
	return f, nil
}
