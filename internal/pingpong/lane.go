// Package pingpong measures the round trip between two peers of a link, and
// checks every message on the way.
//
// Each peer has a lane: one cache line in its own output section, or in its
// share of the R/W section on a link without output sections, or on a strict
// one, whose guests read the others' slowly. A message is one word. The peer
// with the lower ID pings.
package pingpong

import (
	"fmt"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// laneSize is the size of a lane in bytes; its first word is the message.
const laneSize = 64

// lanes are both directions of a pair.
type lanes struct {
	out shmem.Words
	in  shmem.ReadWords
}

func openLanes(d *ivshmem.Device, peer uint32) (l lanes, err error) {
	in, out, err := findLanes(d, peer)
	if err != nil {
		return l, err
	}
	if l.in, err = in.Words(); err != nil {
		return l, err
	}
	l.out, err = out.Words()
	return l, err
}

func findLanes(d *ivshmem.Device, peer uint32) (in *shmem.ReadOnly, out *shmem.ReadWrite, err error) {
	s := d.Sections()
	shares := s.Layout.ReadWrite >= laneSize*uint64(d.MaxPeers())
	if s.Layout.Output >= laneSize && !(d.InputsTrap() && shares) {
		if in, err = s.Input(peer); err != nil {
			return nil, nil, err
		}
		if in, err = in.View(0, laneSize); err != nil {
			return nil, nil, err
		}
		out, err = s.Output.View(0, laneSize)
		return in, out, err
	}
	if shares {
		other, err := s.ReadWrite.View(laneSize*uint64(peer), laneSize)
		if err != nil {
			return nil, nil, err
		}
		out, err = s.ReadWrite.View(laneSize*uint64(d.ID()), laneSize)
		return other.ReadOnly(), out, err
	}
	return nil, nil, fmt.Errorf("%w: expected output sections, or an R/W section of at least %d bytes, found neither", ivshmem.ErrNotSupported, laneSize*uint64(d.MaxPeers()))
}

// word is a message: the sequence number in the lower 48 bits, and above them
// bits made of it and of the direction, so that a message that is stale or
// echoed by accident does not match.
func word(seq uint64, pong bool) uint64 {
	x := seq
	if pong {
		x = ^x
	}
	x *= 0x9e3779b97f4a7c15
	x ^= x >> 29
	return x<<48 | seq&endOfRun
}
