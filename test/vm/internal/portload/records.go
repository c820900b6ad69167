package portload

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
)

// Two programs, one at each end of a port, send each other numbered records,
// and acknowledge them. The port is a pipe that breaks: a program that loses its
// file begins anew, with a hello that says what it has, and the other one
// welcomes it and goes on from there. What the contract of the ports says shows
// in what a program has to accept:
//
//   - While its own file works, all that arrives is without a gap. A record may be
//     cut in its middle only where the other side began anew.
//   - Closing the own file, and opening it again, changes nothing of that, if the
//     other side is gone in between: what had arrived is kept (cache).
//   - A program that has lost its file knows nothing of what was on the way, and
//     waits for its welcome.
//
// All records are of one size, so that the hello that follows a cut one is long
// enough to find its end.

const (
	recordSize = 1024
	headerSize = 40
	// window is how many records are sent and not acknowledged.
	window = 128
	// batch is how many are put together for a write.
	batch = 4

	magic = 0x7c5eb0a1
)

type kind uint32

const (
	hello   kind = 1 + iota // I began anew; ack is what I wait for
	welcome                 // to the hello with this epoch; ack likewise
	data
	ack
)

// record is the head of one. Behind it there are words.
type record struct {
	kind  kind
	epoch uint32 // of the one that began anew
	seq   uint64 // number of data
	ack   uint64 // the next number that is expected
}

func (r record) bytes(stream uint32) []byte {
	b := make([]byte, recordSize)
	le := binary.LittleEndian
	le.PutUint32(b, magic)
	le.PutUint32(b[8:], uint32(r.kind))
	le.PutUint32(b[12:], r.epoch)
	le.PutUint64(b[16:], r.seq)
	le.PutUint64(b[24:], r.ack)
	le.PutUint32(b[32:], stream)
	Fill(b[headerSize:], stream, r.seq*recordSize/8)
	le.PutUint32(b[4:], crc32.ChecksumIEEE(b[8:]))
	return b
}

func parse(b []byte, stream uint32) (r record, ok bool) {
	le := binary.LittleEndian
	if le.Uint32(b) != magic || le.Uint32(b[4:]) != crc32.ChecksumIEEE(b[8:recordSize]) || le.Uint32(b[32:]) != stream {
		return r, false
	}
	r = record{kind(le.Uint32(b[8:])), le.Uint32(b[12:]), le.Uint64(b[16:]), le.Uint64(b[24:])}
	return r, Check(b[headerSize:recordSize], stream, r.seq*recordSize/8) == nil
}

// Counts is what became of the records of an end.
type Counts struct {
	Acked    uint64 `json:"acked"`    // own ones that the other side has
	Received uint64 `json:"received"` // each once, and in order
	Repeated uint64 `json:"repeated"` // own ones that were sent again
	Cut      uint64 `json:"cut"`      // in their middle, where the other side began anew
	Begun    uint64 `json:"begun"`    // how often this end did
	Kept     uint64 `json:"kept"`     // bytes since the last opening, up to the other side's end
}

// End is one end.
type End struct {
	out, in uint32 // streams
	counts  Counts

	epoch   uint32
	joining bool   // it waits for its welcome
	next    uint64 // the next record to send
	told    uint64 // the last acknowledgement
	control []record
	pending []byte // of a record that is being written
	buf     []byte // what was read, and is not a whole record
	skipped int    // bytes of a record that was cut

	opening bool // Kept counts
	finish  bool // no new records
}

// NewEnd is an end of a port with a name.
func NewEnd(name string, end int) *End {
	return &End{out: Stream(name, end), in: Stream(name, 1-end)}
}

// Anew says that the file was lost, and that there is another one.
func (e *End) Anew() {
	e.counts.Begun++
	e.epoch++
	e.joining = true
	e.pending, e.buf, e.skipped = nil, nil, 0
	e.control = []record{{kind: hello, epoch: e.epoch}}
}

// Reopened says that the file was closed and is open again.
func (e *End) Reopened() { e.counts.Kept, e.opening = 0, true }

// Ended says that there is the end of file.
func (e *End) Ended() { e.opening = false }

// Opening says whether there was neither that nor a hello since Reopened.
func (e *End) Opening() bool { return e.opening }

// Counts is what became of it until now.
func (e *End) Counts() Counts { return e.counts }

// Finish says that there are no new records.
func (e *End) Finish() { e.finish = true }

// Idle says whether all is acknowledged.
func (e *End) Idle() bool {
	return e.finish && !e.joining && e.next == e.counts.Acked && e.told == e.counts.Received && len(e.pending) == 0 && len(e.control) == 0
}

// Output is what is to be written now; Wrote says how much was.
func (e *End) Output() []byte {
	for len(e.pending) < batch*recordSize {
		r, ok := e.say()
		if !ok {
			break
		}
		r.ack = e.counts.Received
		e.told = r.ack
		e.pending = append(e.pending, r.bytes(e.out)...)
	}
	return e.pending
}

// say is the next record to be written.
func (e *End) say() (r record, ok bool) {
	switch {
	case len(e.control) > 0:
		r, e.control = e.control[0], e.control[1:]
	case e.joining:
		return r, false
	case e.next < e.counts.Acked+window && !e.finish:
		r.kind, r.seq = data, e.next
		e.next++
	case e.told != e.counts.Received:
		r.kind = ack
	default:
		return r, false
	}
	return r, true
}

// Wrote says how much of Output was written.
func (e *End) Wrote(n int) { e.pending = e.pending[n:] }

// Input takes what was read.
func (e *End) Input(b []byte) error {
	if e.opening {
		e.counts.Kept += uint64(len(b))
	}
	e.buf = append(e.buf, b...)
	for len(e.buf) >= recordSize {
		r, ok := parse(e.buf, e.in)
		if !ok {
			e.buf = e.buf[1:]
			if e.skipped++; e.skipped >= recordSize && !e.joining {
				return fmt.Errorf("behind record %d: %d bytes that are none", e.counts.Received, e.skipped)
			}
			continue
		}
		if err := e.take(r); err != nil {
			return err
		}
		e.buf = e.buf[recordSize:]
	}
	e.buf = slices.Clone(e.buf)
	return nil
}

// take takes a record.
func (e *End) take(r record) error {
	skipped := e.skipped
	e.skipped = 0
	if r.kind == hello {
		if e.opening {
			e.opening = false
			e.counts.Kept -= uint64(len(e.buf)) // that is of its new life
		}
		if skipped > 0 {
			e.counts.Cut++
		}
		e.control = append(e.control, record{kind: welcome, epoch: r.epoch})
		return e.resume(r.ack)
	}
	if r.kind == welcome {
		if r.epoch != e.epoch || !e.joining {
			return nil // of a life before
		}
		e.joining = false
		return e.resume(r.ack)
	}
	if e.joining {
		return nil
	}
	if skipped > 0 {
		return fmt.Errorf("before record %d: %d bytes that are none, and the other side did not begin anew", r.seq, skipped)
	}
	if err := e.acked(r.ack); err != nil || r.kind != data {
		return err
	}
	if r.seq != e.counts.Received {
		return fmt.Errorf("record %d came, expected %d", r.seq, e.counts.Received)
	}
	e.counts.Received++
	return nil
}

// resume goes on with what the other side waits for.
func (e *End) resume(from uint64) error {
	if err := e.acked(from); err != nil {
		return err
	}
	e.counts.Repeated += e.next - from
	e.next = from
	return nil
}

// acked is what the other side has.
func (e *End) acked(n uint64) error {
	if n < e.counts.Acked || n > e.next {
		return fmt.Errorf("the other side has %d records, expected from %d to %d", n, e.counts.Acked, e.next)
	}
	e.counts.Acked = n
	return nil
}
