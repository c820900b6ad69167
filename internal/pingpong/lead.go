package pingpong

import (
	"fmt"
	"runtime"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// longest is the longest round trip that can be recorded.
const longest = time.Hour

// lead is the leading process's side of a task.
type lead struct {
	Link
	res   *Outcome
	p, p2 []byte

	own     usage
	mallocs uint64
	begin   time.Time
}

func (l *lead) run() error {
	t := &l.res.Task
	switch t.Measure {
	case Idle:
		if l.Idle == nil {
			return fmt.Errorf("measure %s: expected a stream", t.Measure)
		}
		if err := l.start(); err != nil {
			return err
		}
		l.Idle(t.Duration)
		return l.finish()
	case Latency:
		l.res.RTT = hdrhistogram.New(1, int64(longest), 3)
	}
	if _, err := l.pass(1, t.Warmup, 0, false); err != nil {
		return err
	}
	if err := l.start(); err != nil {
		return err
	}
	n, err := l.pass(t.Warmup+1, t.Messages, t.Duration, true)
	if err != nil {
		return err
	}
	l.res.Messages = n
	if l.res.Measure == Latency {
		l.account()
	}
	stamp(l.p, endOfRun)
	if err := l.Data.Send(l.p); err != nil {
		return err
	}
	return l.finish()
}

// start begins what counts, and the other side's account too.
func (l *lead) start() error {
	var turn struct{}
	if err := l.Control.enc.Encode(turn); err != nil {
		return err
	}
	if err := l.Control.dec.Decode(&turn); err != nil {
		return err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	l.own, l.mallocs, l.begin = l.spent(), m.Mallocs, time.Now()
	return nil
}

// finish ends it: what goes one way ends when the other side has everything,
// and says so.
func (l *lead) finish() error {
	if l.res.Measure == Idle {
		l.account()
	}
	if err := l.Control.enc.Encode(struct{}{}); err != nil {
		return err
	}
	var other usage
	if err := l.Control.dec.Decode(&other); err != nil {
		return err
	}
	if l.res.Measure != Latency && l.res.Measure != Idle {
		l.account()
	}
	l.res.CPU += other.CPU
	l.res.Doorbells += other.Doorbells
	return nil
}

func (l *lead) account() {
	l.res.Elapsed = time.Since(l.begin)
	u := l.spent().since(l.own)
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	l.res.CPU, l.res.Doorbells, l.res.Allocations = u.CPU, u.Doorbells, m.Mallocs-l.mallocs
}

// pass sends messages, of which the first has the number from, up to a number
// or for a time, and returns how many. A limit of 0 is none, but for what does
// not count.
func (l *lead) pass(from, n uint64, d time.Duration, counts bool) (uint64, error) {
	if !counts && n == 0 {
		return 0, nil
	}
	switch l.res.Measure {
	case Latency:
		return l.trips(from, n, d, counts)
	case Rate:
		return l.batches(from, n, d)
	}
	// Reading the clock takes as long as a small message.
	every := uint64(64)
	if l.res.Size >= 16<<10 {
		every = 1
	}
	begin := time.Now()
	for i := uint64(0); ; {
		stamp(l.p, from+i)
		if err := l.Data.Send(l.p); err != nil {
			return i, err
		}
		if i++; i == n || d > 0 && i%every == 0 && time.Since(begin) >= d {
			return i, nil
		}
	}
}

func (l *lead) batches(from, n uint64, d time.Duration) (uint64, error) {
	all := make([][]byte, rateBatch)
	for i := range all {
		all[i] = make([]byte, l.res.Size)
	}
	begin := time.Now()
	for done := uint64(0); ; {
		batch := all
		if n > 0 {
			batch = all[:min(n-done, rateBatch)]
		}
		for i, p := range batch {
			stamp(p, from+done+uint64(i))
		}
		if err := l.sendAll(batch); err != nil {
			return done, err
		}
		done += uint64(len(batch))
		if done == n || d > 0 && time.Since(begin) >= d {
			return done, nil
		}
	}
}

func (l *lead) sendAll(batch [][]byte) error {
	if s, ok := l.Data.(batchSender); ok {
		_, err := s.SendAll(batch)
		return err
	}
	for _, p := range batch {
		if err := l.Data.Send(p); err != nil {
			return err
		}
	}
	return nil
}

func (l *lead) trips(from, n uint64, d time.Duration, counts bool) (uint64, error) {
	t := &l.res.Task
	batch := max(t.Batch, 1)
	paced := t.Rate > 0 && counts
	var pace pacer
	if paced {
		batch, pace = 1, newPacer(t.Rate)
	}
	base := time.Now() // so that the clock is read once for a time
	sent := time.Since(base)
	for i := uint64(0); ; {
		if paced {
			sent = pace.wait(i).Sub(base)
		}
		stamp(l.p, from+i)
		if err := l.Data.Send(l.p); err != nil {
			return i, err
		}
		if err := l.Data.Receive(l.p2); err != nil {
			return i, err
		}
		if err := check(l.p2, from+i); err != nil {
			return i, err
		}
		i++
		var now time.Duration
		if i%batch == 0 {
			now = time.Since(base)
			if counts {
				if err := l.res.RTT.RecordValue(max(1, int64(now-sent)/int64(batch))); err != nil {
					return i, err
				}
			}
			sent = now
			if batch == 1 && !paced { // what recording took is no part of the next one
				sent = time.Since(base)
			}
		}
		if i == n || d > 0 && now >= d {
			return i, nil
		}
	}
}
