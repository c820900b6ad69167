package pingpong

import (
	"encoding/binary"
	"fmt"
)

const (
	// minSize is the least size of a message in bytes: its number.
	minSize = 8
	// maxSize is the largest message that a follower makes room for.
	maxSize = 64 << 20
	// line is the step in bytes from one mark in a message to the next.
	line = 64
)

// MessageError is a message that is not the one that was due.
type MessageError struct {
	Field           string
	Expected, Found uint64
}

func (e *MessageError) Error() string {
	return fmt.Sprintf("message: %s: expected %#x, found %#x", e.Field, e.Expected, e.Found)
}

// stamp makes p message seq: each of its cache lines begins with a word made
// of the number and the line's position. So the sender touches every line of
// every message, and so does the receiver, who checks.
func stamp(p []byte, seq uint64) {
	for at := 0; at+8 <= len(p); at += line {
		binary.LittleEndian.PutUint64(p[at:], seq^uint64(at)<<32)
	}
}

// check checks that p is message seq, or the one that ends a run: then it
// returns errEnd.
func check(p []byte, seq uint64) error {
	if got := binary.LittleEndian.Uint64(p); got != seq {
		if got == endOfRun {
			return errEnd
		}
		return &MessageError{Field: "sequence number", Expected: seq, Found: got}
	}
	for at := line; at+8 <= len(p); at += line {
		if got, want := binary.LittleEndian.Uint64(p[at:]), seq^uint64(at)<<32; got != want {
			return &MessageError{Field: fmt.Sprintf("word at byte %d", at), Expected: want, Found: got}
		}
	}
	return nil
}
