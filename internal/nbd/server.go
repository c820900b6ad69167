package nbd

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Disk is what clients see. Its methods are called at the same time, inside its
// size only.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	// Size is the size in bytes, which does not change.
	Size() int64
	ReadOnly() bool
	// Flush returns when all that was written before is on stable storage.
	Flush() error
	// CanZero and CanDiscard report whether Zero and Discard do anything.
	CanZero() bool
	CanDiscard() bool
	// Zero makes n bytes zeros, and may give up their space if unmap says so.
	Zero(offset, n int64, unmap bool) error
	// Discard says that nobody wants n bytes any more.
	Discard(offset, n int64) error
}

// flags are the transmission flags of a disk.
func flags(d Disk) uint16 {
	f := uint16(flagHasFlags | flagFlush | flagFUA | flagMultiConn)
	if d.ReadOnly() {
		return f | flagReadOnly
	}
	if d.CanZero() {
		f |= flagWriteZeroes
	}
	if d.CanDiscard() {
		f |= flagTrim
	}
	return f
}

const (
	// workers is how many requests of a client are worked on at a time.
	workers = 8
	// small is how many bytes of data each of them may have; of larger ones
	// there is one at a time.
	small = 1 << 20
)

// transmission is the phase of requests.
type transmission struct {
	conn net.Conn
	disk Disk

	// Who has read waits for the next request; then another does.
	read   sync.Mutex
	in     *bufio.Reader
	ending error // with read held: why nothing is read any more

	write  sync.Mutex
	failed error // with write held: why the client is told nothing any more
}

// errDisconnected says that the client has said goodbye.
var errDisconnected = errors.New("disconnected")

// serve answers requests until the client goes, which it returns nil for, or
// the context ends.
func serve(ctx context.Context, conn net.Conn, d Disk) error {
	t := &transmission{conn: conn, disk: d, in: bufio.NewReader(conn)}
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	var all sync.WaitGroup
	for range workers {
		all.Go(t.work)
	}
	all.Wait()
	err := t.ending
	if t.failed != nil {
		err = t.failed
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case gone(err):
		return nil
	}
	return err
}

// gone reports whether the client has ended the connection, as it may.
func gone(err error) bool {
	return errors.Is(err, errDisconnected) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// work answers one request after the other.
func (t *transmission) work() {
	var buf []byte
	for {
		t.read.Lock()
		q, data, err := t.next(&buf)
		if err != nil {
			t.ending = err
			t.read.Unlock()
			return
		}
		// A large request keeps the others from being read.
		alone := len(data) > replySize+small
		if !alone {
			t.read.Unlock()
		}
		t.answer(q, data)
		if alone {
			buf = nil
			t.read.Unlock()
		}
	}
}

// next reads a request, and its data to behind the place for a reply. The
// caller holds read.
func (t *transmission) next(buf *[]byte) (q request, data []byte, err error) {
	if t.ending != nil {
		return q, nil, t.ending
	}
	if q, err = readRequest(t.in); err != nil {
		return q, nil, err
	}
	if q.kind == commandDisconnect {
		return q, nil, errDisconnected
	}
	n := replySize + int(q.payload())
	if q.check(t.disk) == 0 {
		n += int(q.answer())
	}
	if cap(*buf) < n {
		*buf = make([]byte, n)
	}
	data = (*buf)[:n]
	if q.payload() > 0 {
		if _, err := io.ReadFull(t.in, data[replySize:]); err != nil {
			return q, nil, err
		}
	}
	return q, data, nil
}

// answer does a request and writes the reply.
func (t *transmission) answer(q request, data []byte) {
	e := q.check(t.disk)
	if e == 0 {
		e = t.do(q, data[replySize:])
	}
	n := replySize
	if e == 0 {
		n += int(q.answer())
	}
	putReply(data, q.cookie, e)
	t.write.Lock()
	defer t.write.Unlock()
	if _, err := t.conn.Write(data[:n]); err != nil && t.failed == nil {
		t.failed = err
		t.conn.SetDeadline(time.Unix(1, 0)) // whoever reads ends
	}
}

// do does a request that is right.
func (t *transmission) do(q request, data []byte) errno {
	offset, n := int64(q.offset), int64(q.length)
	var err error
	switch q.kind {
	case commandRead:
		_, err = t.disk.ReadAt(data, offset)
		if err == io.EOF { // at the very end
			err = nil
		}
	case commandWrite:
		_, err = t.disk.WriteAt(data, offset)
	case commandFlush:
		err = t.disk.Flush()
	case commandTrim:
		err = t.disk.Discard(offset, n)
	case commandWriteZeroes:
		err = t.disk.Zero(offset, n, q.flags&commandNoHole == 0)
	}
	if err == nil && q.flags&commandFUA != 0 && q.kind != commandRead && q.kind != commandFlush {
		err = t.disk.Flush()
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errors.ErrUnsupported):
		return errNotSupported
	}
	return errIO
}
