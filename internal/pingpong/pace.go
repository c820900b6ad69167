package pingpong

import (
	"time"

	"golang.org/x/sys/unix"
)

// pacer is the timetable of an open loop: message i, counted from 0, is due at
// begin + i / rate, whatever became of those before. A latency counts from
// there, so a message that had to wait for a slow one is slow too (otherwise
// slow ones would thin themselves out: "coordinated omission").
type pacer struct {
	begin time.Time
	every float64 // nanoseconds
}

func newPacer(rate float64) pacer { return pacer{time.Now(), 1e9 / rate} }

// paceSpin is how long before a message is due the pacer stops sleeping: a
// sleep may take longer than it should.
const paceSpin = 150 * time.Microsecond

// wait waits until message i is due, and returns when that was.
func (p *pacer) wait(i uint64) time.Time {
	due := time.Duration(float64(i) * p.every)
	for {
		left := due - time.Since(p.begin)
		switch {
		case left <= 0:
			return p.begin.Add(due)
		case left > 2*paceSpin:
			// Not time.Sleep: the thread is locked, and changing over to
			// another one would be part of the next message.
			t := unix.NsecToTimespec(int64(left - paceSpin))
			unix.Nanosleep(&t, nil)
		}
	}
}
