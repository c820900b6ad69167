package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// nothing is a disk without memory that looks at where it is accessed.
type nothing struct{ t *testing.T }

const nothingSize = 1 << 20

func (n nothing) inside(offset, length int64) error {
	if offset < 0 || length < 0 || offset > nothingSize-length {
		n.t.Errorf("%d bytes at %d", length, offset)
	}
	return nil
}
func (n nothing) Size() int64      { return nothingSize }
func (n nothing) ReadOnly() bool   { return false }
func (n nothing) CanZero() bool    { return true }
func (n nothing) CanDiscard() bool { return true }
func (n nothing) Flush() error     { return nil }
func (n nothing) ReadAt(p []byte, offset int64) (int, error) {
	return len(p), n.inside(offset, int64(len(p)))
}
func (n nothing) WriteAt(p []byte, offset int64) (int, error) {
	return len(p), n.inside(offset, int64(len(p)))
}
func (n nothing) Zero(offset, length int64, unmap bool) error { return n.inside(offset, length) }
func (n nothing) Discard(offset, length int64) error          { return n.inside(offset, length) }

// Whatever a client sends, accesses stay inside, and it ends.
func FuzzClient(f *testing.F) {
	const start = "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00"
	f.Add([]byte(start + "\x25\x60\x95\x13\x00\x00\x00\x00cookie00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x02\x00"))
	f.Add([]byte(start + "\x25\x60\x95\x13\x00\x01\x00\x01cookie00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x04data\x25\x60\x95\x13\x00\x00\x00\x03cookie00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte(start + "\x25\x60\x95\x13\x00\x03\x00\x06cookie00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x02\x00\x25\x60\x95\x13\x00\x00\x00\x04cookie00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x02\x00\x25\x60\x95\x13\x00\x00\x00\x02"))
	f.Add([]byte("\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x08\x00\x00\x00\x00\x00\x01\x00\x03"))
	f.Add([]byte("\x00\x00\x00\x01IHAVEOPT\x00\x00\x00\x06\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00IHAVEOPT\x00\x00\x00\x02\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs, err := socketPair()
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(theirs), "client")
		client, err := net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		go func() {
			client.Write(b)
			client.(*net.UnixConn).CloseWrite()
		}()
		go io.Copy(io.Discard, client)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var violation *ProtocolError
		if err := Serve(ctx, ours, nothing{t}); ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("it does not end: %v", err)
		} else if err != nil && !errors.As(err, &violation) && !strings.Contains(err.Error(), "wants export") {
			t.Error(err)
		}
	})
}
