package main

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// logWriter passes on what is written to it, and never makes the writer wait:
// a service must go on when nobody reads its log. Each Write is a record;
// records for which there is no room are counted, and the count is told when
// there is room again.
type logWriter struct {
	records chan []byte
	lost    atomic.Uint64
	end     chan struct{}
	ended   chan struct{}
}

func newLogWriter(w io.Writer) *logWriter {
	l := &logWriter{records: make(chan []byte, 256), end: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		for {
			select {
			case r := <-l.records:
				l.pass(w, r)
				continue
			default:
			}
			select {
			case r := <-l.records:
				l.pass(w, r)
			case <-l.end:
				return
			}
		}
	}()
	return l
}

func (l *logWriter) pass(w io.Writer, record []byte) {
	if n := l.lost.Swap(0); n > 0 {
		fmt.Fprintf(w, "%d log records were lost, as nobody read them\n", n)
	}
	w.Write(record)
}

// Write implements [io.Writer]. It always succeeds.
func (l *logWriter) Write(p []byte) (int, error) {
	select {
	case l.records <- bytes.Clone(p):
	default:
		l.lost.Add(1)
	}
	return len(p), nil
}

// Close waits for the records that are left, but not for a reader who does not
// read.
func (l *logWriter) Close() {
	close(l.end)
	select {
	case <-l.ended:
	case <-time.After(time.Second):
	}
}
