package virtio

import (
	"fmt"
	"io"
)

// Chain is a buffer of the driver: bytes for the device to read, and bytes to
// write. They are copied, as nothing in them keeps still; each copy fails with
// [ErrReset] when the session is over. Not safe for concurrent use.
type Chain struct {
	q        *Queue
	head     uint16
	held     bool      // with q.mu held
	segments []segment // for reading first, then for writing
	reads    int       // number of those for reading
	readable int
	writable int
	r, w     int // where Read and Write go on
}

type segment struct{ at, n uint64 }

func (c *Chain) clear() {
	c.segments, c.reads, c.readable, c.writable, c.r, c.w = c.segments[:0], 0, 0, 0, 0, 0
}

// Readable is the number of bytes for the device to read.
func (c *Chain) Readable() int { return c.readable }

// Writable is the number of bytes for the device to write.
func (c *Chain) Writable() int { return c.writable }

// Read reads the next bytes of the readable part. It implements [io.Reader].
func (c *Chain) Read(p []byte) (int, error) {
	n, err := c.ReadAt(p, int64(c.r))
	c.r += n
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

// ReadAt reads from a byte of the readable part on. It implements
// [io.ReaderAt].
func (c *Chain) ReadAt(p []byte, offset int64) (int, error) {
	n, err := c.move(c.segments[:c.reads], p, offset, c.q.b.mem.ReadAt)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// Write writes to the next bytes of the writable part. It implements
// [io.Writer]; where there is no room left it fails with [io.ErrShortWrite].
func (c *Chain) Write(p []byte) (int, error) {
	n, err := c.WriteAt(p, int64(c.w))
	c.w += n
	return n, err
}

// WriteAt writes from a byte of the writable part on. It implements
// [io.WriterAt].
func (c *Chain) WriteAt(p []byte, offset int64) (int, error) {
	n, err := c.move(c.segments[c.reads:], p, offset, c.q.b.mem.WriteAt)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return n, err
}

// move copies between p and the segments, from a byte of them on, as far as they
// go.
func (c *Chain) move(segments []segment, p []byte, offset int64, move func(p []byte, at int64) (int, error)) (int, error) {
	if offset < 0 {
		return 0, fmt.Errorf("buffer of virtqueue %d: offset %d", c.q.index, offset)
	}
	c.q.life.RLock()
	defer c.q.life.RUnlock()
	if c.q.dead {
		return 0, ErrReset
	}
	done := 0
	for _, s := range segments {
		if done == len(p) {
			break
		}
		if uint64(offset) >= s.n {
			offset -= int64(s.n)
			continue
		}
		n := int(min(s.n-uint64(offset), uint64(len(p)-done)))
		if _, err := move(p[done:done+n], int64(s.at)+offset); err != nil {
			return done, err
		}
		done, offset = done+n, 0
	}
	return done, nil
}

// maxIndirect is the most descriptors of an indirect table. The specification has
// no more than the queue has entries; Linux makes longer ones, where that is what
// a request takes (virtqueue_use_indirect).
const maxIndirect = 1024

// walk reads the descriptors of a chain, each of them once, and checks them.
// The caller holds q.mu.
func (q *Queue) walk(c *Chain) error {
	table, entries := q.ring.desc, uint64(q.ring.size)
	next := c.head
	if uint64(next) >= entries {
		return q.wrong("head of a buffer", uint64(next), "a descriptor below %d", entries)
	}
	indirect, most := false, int(q.ring.size)
	for {
		var raw [descriptorSize]byte
		if _, err := q.b.mem.ReadAt(raw[:], int64(table+descriptorSize*uint64(next))); err != nil {
			return err
		}
		d := decode(&raw)
		if d.flags&flagIndirect != 0 && q.indirect {
			switch {
			case indirect || d.flags&flagNext != 0:
				return q.wrong("flags of a descriptor", uint64(d.flags), "an indirect one to be the last, and not in a table")
			case d.n == 0 || d.n%descriptorSize != 0 || d.n/descriptorSize > maxIndirect:
				return q.wrong("length of an indirect table", uint64(d.n), "%d bytes for each of 1 to %d descriptors", descriptorSize, maxIndirect)
			case !q.b.mem.holds(q.limit, d.at, uint64(d.n)):
				return q.wrong("address of an indirect table", d.at, "%d bytes from %#x to %#x", d.n, q.limit, q.b.mem.Size())
			}
			indirect = true
			most += int(d.n / descriptorSize)
			table, entries, next = d.at, uint64(d.n/descriptorSize), 0
			continue
		}
		if err := q.take(c, d); err != nil {
			return err
		}
		if d.flags&flagNext == 0 {
			return nil
		}
		if len(c.segments) >= most {
			return q.wrong("length of a chain", uint64(len(c.segments))+1, "at most %d descriptors, as there are", most)
		}
		if next = d.next; uint64(next) >= entries {
			return q.wrong("next descriptor", uint64(next), "a descriptor below %d", entries)
		}
	}
}

// take adds what a descriptor describes to a chain.
func (q *Queue) take(c *Chain, d descriptor) error {
	write := d.flags&flagWrite != 0
	switch {
	case d.flags&^(flagNext|flagWrite) != 0:
		return q.wrong("flags of a descriptor", uint64(d.flags), "NEXT and WRITE, or what was negotiated")
	case d.n == 0:
		return q.wrong("length of a descriptor", 0, "at least 1")
	case !q.b.mem.holds(q.limit, d.at, uint64(d.n)):
		return q.wrong("address of a descriptor", d.at, "%d bytes from %#x to %#x", d.n, q.limit, q.b.mem.Size())
	case !write && c.writable > 0:
		return q.wrong("flags of a descriptor", uint64(d.flags), "none to read behind one to write")
	}
	c.segments = append(c.segments, segment{d.at, uint64(d.n)})
	if write {
		c.writable += int(d.n)
	} else {
		c.readable += int(d.n)
		c.reads++
	}
	return nil
}

func (q *Queue) wrong(field string, v uint64, bound string, args ...any) error {
	return &ViolationError{q.index, field, v, fmt.Sprintf(bound, args...)}
}
