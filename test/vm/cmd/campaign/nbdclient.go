package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// nbdClient is a client of NBD (the NBD protocol document, "Newstyle
// negotiation" and "Simple reply message") that has many requests under way.
type nbdClient struct {
	conn net.Conn

	mu      sync.Mutex // of writing, and of waiting
	next    uint64
	waiting map[uint64]*nbdRequest
	failed  error
}

type nbdRequest struct {
	into []byte // of a read
	done chan error
}

const (
	nbdRead  = 0
	nbdWrite = 1
)

// dialNBD uses an export.
func dialNBD(path, export string) (*nbdClient, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	hello := make([]byte, 18)
	if _, err := io.ReadFull(conn, hello); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if string(hello[:16]) != "NBDMAGICIHAVEOPT" {
		return nil, errors.Join(fmt.Errorf("NBD: expected a server, found %q", hello), conn.Close())
	}
	b := binary.BigEndian.AppendUint32(nil, 3)                     // fixed newstyle, no zeroes
	b = binary.BigEndian.AppendUint32(append(b, "IHAVEOPT"...), 1) // EXPORT_NAME
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(export))), export...)
	if _, err := conn.Write(b); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if _, err := io.ReadFull(conn, hello[:10]); err != nil { // size and flags
		return nil, errors.Join(fmt.Errorf("NBD: no export %q: %w", export, err), conn.Close())
	}
	c := &nbdClient{conn: conn, waiting: map[uint64]*nbdRequest{}}
	go c.receive()
	return c, nil
}

func (c *nbdClient) receive() {
	in := bufio.NewReaderSize(c.conn, 64<<10)
	header := make([]byte, 16)
	fail := func(err error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.failed = err
		for _, r := range c.waiting {
			r.done <- err
		}
		clear(c.waiting)
	}
	for {
		if _, err := io.ReadFull(in, header); err != nil {
			fail(err)
			return
		}
		handle, code := binary.BigEndian.Uint64(header[8:]), binary.BigEndian.Uint32(header[4:])
		c.mu.Lock()
		r := c.waiting[handle]
		delete(c.waiting, handle)
		c.mu.Unlock()
		if binary.BigEndian.Uint32(header) != 0x67446698 || r == nil {
			fail(fmt.Errorf("NBD: expected a simple reply, found % x", header))
			return
		}
		var err error
		if code != 0 {
			err = fmt.Errorf("NBD: error %d", code)
		} else if _, err = io.ReadFull(in, r.into); err != nil {
			fail(err)
		}
		r.done <- err
	}
}

func (c *nbdClient) do(kind uint16, offset int64, n int, out, into []byte) error {
	r := &nbdRequest{into: into, done: make(chan error, 1)}
	c.mu.Lock()
	if c.failed != nil {
		defer c.mu.Unlock()
		return c.failed
	}
	c.next++
	c.waiting[c.next] = r
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(append(b, 0, 0), kind)
	b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, c.next), uint64(offset))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	_, err := (&net.Buffers{b, out}).WriteTo(c.conn)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	return <-r.done
}

// ReadAt reads all of p.
func (c *nbdClient) ReadAt(p []byte, offset int64) (int, error) {
	return len(p), c.do(nbdRead, offset, len(p), nil, p)
}

// WriteAt writes all of p.
func (c *nbdClient) WriteAt(p []byte, offset int64) (int, error) {
	return len(p), c.do(nbdWrite, offset, len(p), p, nil)
}

func (c *nbdClient) Close() error { return c.conn.Close() }
