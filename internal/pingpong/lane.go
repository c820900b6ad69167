// Package pingpong measures the round trip between two peers of a link, and
// checks every message on the way.
//
// Each peer has a lane: one cache line in its own output section, or, on a
// link without output sections, in its share of the R/W section. A message is
// a sequence number and a check word made of it. Peer with the lower ID pings.
package pingpong

import (
	"fmt"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Offsets in a lane, in bytes. Both words lie in one cache line.
const (
	laneSize  = 64
	laneSeq   = 0
	laneCheck = 8
)

// lanes are both directions of a pair.
type lanes struct {
	out *shmem.ReadWrite
	in  *shmem.ReadOnly
}

func openLanes(d *ivshmem.Device, peer uint32) (l lanes, err error) {
	s := d.Sections()
	if s.Layout.Output >= laneSize {
		in, err := s.Input(peer)
		if err != nil {
			return l, err
		}
		if l.in, err = in.View(0, laneSize); err != nil {
			return l, err
		}
		l.out, err = s.Output.View(0, laneSize)
		return l, err
	}
	if s.Layout.ReadWrite >= laneSize*uint64(d.MaxPeers()) {
		in, err := s.ReadWrite.View(laneSize*uint64(peer), laneSize)
		if err != nil {
			return l, err
		}
		l.in = in.ReadOnly()
		l.out, err = s.ReadWrite.View(laneSize*uint64(d.ID()), laneSize)
		return l, err
	}
	return l, fmt.Errorf("%w: expected output sections, or an R/W section of at least %d bytes, found neither", ivshmem.ErrNotSupported, laneSize*uint64(d.MaxPeers()))
}

// check is the check word of a sequence number in one direction: a message
// that is torn, stale or echoed by accident does not match.
func check(seq uint64, pong bool) uint64 {
	x := seq
	if pong {
		x = ^x
	}
	x *= 0x9e3779b97f4a7c15
	return x ^ x>>29
}

// send publishes a message: the check word first, then the sequence number.
func (l *lanes) send(seq uint64, pong bool) error {
	if err := l.out.Store64(laneCheck, check(seq, pong)); err != nil {
		return err
	}
	return l.out.Store64(laneSeq, seq)
}

func (l *lanes) clear() error { return l.send(0, false) }

// verify checks the message that the sequence number seq was found of.
func (l *lanes) verify(seq uint64, pong bool) error {
	c, err := l.in.Load64(laneCheck)
	if err != nil {
		return err
	}
	if want := check(seq, pong); c != want {
		return &MessageError{Field: "check word", Expected: want, Found: c}
	}
	return nil
}

// MessageError is a message that is not the one that was due.
type MessageError struct {
	Field           string
	Expected, Found uint64
}

func (e *MessageError) Error() string {
	return fmt.Sprintf("message: %s: expected %#x, found %#x", e.Field, e.Expected, e.Found)
}
