package stream

import (
	"encoding/binary"
	"errors"
	"io"
	"syscall"
)

// chunk is the most of a Write that makes one record: small enough for the
// peer to read one while the next is written.
const chunk = 16 << 10

// fill waits for a record with something to read. It returns io.EOF behind the
// last one. The caller holds read.mu.
func (c *Conn) fill() error {
	for {
		// What is almost always so, first.
		if ok, _ := c.rx.next(); ok && c.rx.flags&(recordPadding|recordFin) == 0 && c.read.stop.Load() == 0 {
			return nil
		}
		if err := c.fault(&c.read); err != nil {
			return err
		}
		if c.rx.fin {
			return io.EOF
		}
		ok, err := c.rx.next()
		if err != nil {
			return c.violate(err)
		}
		if !ok {
			if c.rx.tell() {
				c.ring()
			}
			c.read.wait(c.read.arm)
			continue
		}
		if c.rx.flags&recordPadding != 0 {
			c.endRecord()
			continue
		}
		if c.rx.flags&recordFin != 0 {
			if err := c.same(); err != nil {
				return err
			}
			c.rx.fin = true
			return io.EOF
		}
		return nil
	}
}

func (c *Conn) endRecord() {
	if c.rx.done() {
		c.ring()
	}
}

// same checks that what was read was this connection's: whoever takes the
// peer's slot, or its place, takes the ID or the epoch out before it writes
// anything else.
func (c *Conn) same() error {
	if !tellLate {
		c.rx.block.Store(slotHead, c.rx.told) // nothing new, but see tellLate
	}
	if c.peer.present() && c.rx.peer.Load(slotID) == c.id {
		return nil
	}
	return c.lost()
}

func (c *Conn) lost() error {
	c.ep.mu.Lock()
	defer c.ep.unlock()
	c.breakOff(syscall.ECONNRESET)
	return c.err
}

// Read reads bytes, at least one.
func (c *Conn) Read(p []byte) (int, error) {
	c.read.mu.Lock()
	defer c.read.mu.Unlock()
	n := 0
	for {
		if len(p) == n && n > 0 {
			return n, nil
		}
		if n > 0 && !c.rx.ready() {
			return n, nil
		}
		if err := c.fill(); err != nil {
			if n > 0 { // the error stays for the next Read
				return n, nil
			}
			return 0, c.opError("read", err)
		}
		if c.rx.flags&recordPacked != 0 {
			return n, c.opError("read", c.violate(&ViolationError{Field: "record", Value: c.rx.flags >> 32, Bound: "bytes, not packed messages"}))
		}
		m := c.rx.copy(p[n:])
		if c.rx.off == c.rx.n {
			c.endRecord()
		}
		if err := c.same(); err != nil {
			return 0, c.opError("read", err)
		}
		n += m
		if len(p) == 0 {
			return 0, nil
		}
	}
}

// Receive reads a message into p and returns its length. A message that is
// longer than p is lost from there on, with [io.ErrShortBuffer].
func (c *Conn) Receive(p []byte) (int, error) {
	c.read.mu.Lock()
	n, err := c.receive(p)
	c.read.mu.Unlock()
	if err != nil {
		err = c.opError("receive", err)
	}
	return n, err
}

func (c *Conn) receive(p []byte) (n int, err error) {
	short := false
	for {
		if len(c.packed) > 0 {
			if err := c.fault(&c.read); err != nil {
				return 0, err
			}
			return c.unpack(p)
		}
		if err := c.fill(); err != nil {
			if n > 0 && err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		if c.rx.flags&recordPacked != 0 && n == 0 {
			if err := c.takePacked(); err != nil {
				return 0, err
			}
			continue
		}
		n += c.rx.copy(p[n:])
		short = short || c.rx.off < c.rx.n
		end := c.rx.flags&recordEnd != 0
		c.endRecord()
		if err := c.same(); err != nil {
			return 0, err
		}
		switch {
		case !end:
		case short:
			return n, io.ErrShortBuffer
		default:
			return n, nil
		}
	}
}

// takePacked copies a packed record as it is: its messages are then looked at
// where the peer cannot change them.
func (c *Conn) takePacked() error {
	if cap(c.packing) == 0 {
		c.packing = make([]byte, maxPacked)
	}
	c.packed = c.packing[:c.rx.copy(c.packing)]
	c.endRecord()
	return c.same()
}

// unpack reads a message of a packed record.
func (c *Conn) unpack(p []byte) (int, error) {
	n := uint64(len(c.packed))
	if n >= 8 {
		n = binary.LittleEndian.Uint64(c.packed)
	}
	if n > uint64(len(c.packed)) || pad(n)+8 > uint64(len(c.packed)) {
		c.packed = nil
		return 0, c.violate(&ViolationError{Field: "length of a packed message", Value: n, Bound: "to stay inside its record"})
	}
	m := c.packed[8 : 8+n]
	c.packed = c.packed[8+pad(n):]
	copy(p, m)
	if len(p) < len(m) {
		return len(p), io.ErrShortBuffer
	}
	return len(m), nil
}

// await waits until need bytes are free in the ring. The caller holds write.mu.
func (c *Conn) await(need uint64) error {
	for {
		if err := c.fault(&c.write); err != nil {
			return err
		}
		if c.tx.free() >= need {
			return nil
		}
		if err := c.tx.refresh(); err != nil {
			return c.violate(err)
		}
		if c.tx.free() >= need {
			return nil
		}
		// The peer has to see what it is to make room for.
		c.flush()
		c.need = need
		c.write.wait(c.write.arm)
	}
}

func (c *Conn) flush() {
	if c.tx.commit() {
		c.ring()
	}
}

// stage stages p as one record if there is nothing in the way.
func (c *Conn) stage(p []byte, flags uint64) bool {
	n := uint64(len(p))
	if c.write.stop.Load() != 0 || n > chunk || n > c.tx.room()-recordHeader || pad(n)+2*recordHeader > c.tx.free() {
		return false
	}
	c.tx.stage(p, flags)
	return true
}

// put stages p as one message, or a part of the stream, in as many records as
// it takes, and returns how much of it was staged.
func (c *Conn) put(p []byte, end uint64) (int, error) {
	most := min(chunk, c.tx.size/4)
	n := 0
	for {
		want := min(uint64(len(p)-n), most)
		if err := c.await(2*recordHeader + pad(want)); err != nil {
			return n, err
		}
		fit := min(want, c.tx.room()-recordHeader)
		flags := uint64(0)
		if n+int(fit) == len(p) {
			flags = end
		}
		c.tx.stage(p[n:n+int(fit)], flags)
		n += int(fit)
		if n == len(p) {
			return n, nil
		}
		c.flush()
	}
}

// Write writes bytes. When it fails it may have written some of them.
func (c *Conn) Write(p []byte) (int, error) {
	c.write.mu.Lock()
	defer c.write.mu.Unlock()
	if len(p) == 0 {
		return 0, c.opError("write", c.fault(&c.write))
	}
	if c.stage(p, 0) {
		c.flush()
		return len(p), nil
	}
	n, err := c.put(p, 0)
	c.flush()
	return n, c.opError("write", err)
}

// Send writes a message. When it fails, for want of time for instance, the
// peer may have seen the start of one: the connection is of no more use for
// messages.
func (c *Conn) Send(p []byte) error {
	c.write.mu.Lock()
	var err error
	if !c.stage(p, recordEnd) {
		_, err = c.put(p, recordEnd)
	}
	c.flush()
	c.write.mu.Unlock()
	if err != nil {
		err = c.opError("send", err)
	}
	return err
}

// SendAll writes messages, many at once where they are short: much faster than
// one by one. It returns how many were written.
func (c *Conn) SendAll(messages [][]byte) (int, error) {
	c.write.mu.Lock()
	defer c.write.mu.Unlock()
	for i := 0; i < len(messages); {
		if n := c.pack(messages[i:]); n > 0 {
			i += n
		} else if _, err := c.put(messages[i], recordEnd); err != nil {
			c.flush()
			return i, c.opError("send", err)
		} else {
			i++
		}
		c.flush()
	}
	return len(messages), nil
}

// pack stages a packed record of as many messages as fit right now, and
// returns how many.
func (c *Conn) pack(messages [][]byte) int {
	t := &c.tx
	if c.write.stop.Load() != 0 {
		return 0
	}
	if t.free() < t.size/2 {
		if t.refresh() != nil { // put will say so
			return 0
		}
	}
	room := min(maxPacked, t.size/4, t.room()-recordHeader, t.free()-min(t.free(), 2*recordHeader))
	at := t.tail + recordHeader
	used := uint64(0)
	n := 0
	for _, m := range messages {
		need := 8 + pad(uint64(len(m)))
		if need > room-used {
			break
		}
		t.words.StoreRelaxed((at+used)/8, uint64(len(m)))
		t.words.Write(m, at+used+8)
		used += need
		n++
	}
	if n > 0 {
		t.stageHeader(used, recordPacked)
	}
	return n
}

// ErrMessageTooLong says that something does not fit a ring in one piece.
var ErrMessageTooLong = errors.New("longer than a quarter of the ring")

// UnsafeReserve gives room for a message of up to n bytes in the shared memory
// itself, so that it need not be copied, and keeps others from writing until
// UnsafeCommit. The peer can see and change the bytes already, and on arm64
// they may be device memory, which unaligned accesses, and those that clear
// memory, fault on. The slice must not be used after UnsafeCommit or Close.
func (c *Conn) UnsafeReserve(n int) ([]byte, error) {
	c.write.mu.Lock()
	p, err := c.reserve(n)
	if err != nil {
		c.write.mu.Unlock()
		return nil, c.opError("send", err)
	}
	return p, nil
}

func (c *Conn) reserve(n int) ([]byte, error) {
	if n < 0 || uint64(n) > c.tx.size/4 {
		return nil, ErrMessageTooLong
	}
	if room := c.tx.room() - recordHeader; uint64(n) > room {
		if err := c.await(room + 2*recordHeader); err != nil {
			return nil, err
		}
		c.tx.stageHeader(room, recordPadding)
	}
	if err := c.await(pad(uint64(n)) + 2*recordHeader); err != nil {
		return nil, err
	}
	return c.tx.ring.UnsafeBytes(c.tx.tail&(c.tx.size-1)+recordHeader, uint64(n))
}

// UnsafeCommit sends the first n bytes of what UnsafeReserve gave as a message.
func (c *Conn) UnsafeCommit(n int) error {
	defer c.write.mu.Unlock()
	if c.write.stop.Load()&stopBroken != 0 { // the ring may be another's already
		return c.opError("send", c.fault(&c.write))
	}
	c.tx.stageHeader(uint64(n), recordEnd)
	c.flush()
	return nil
}

// UnsafePeek gives the rest of the next record in the shared memory itself: a
// message that was sent by UnsafeCommit, or a part of what was written (not
// what SendAll sends: that resets the connection). It keeps others from reading
// until UnsafeRelease. The peer can change the bytes at any time: check no byte
// that is looked at again. The slice must not be used after UnsafeRelease or
// Close.
func (c *Conn) UnsafePeek() (p []byte, end bool, err error) {
	c.read.mu.Lock()
	if err = c.fill(); err == nil && c.rx.flags&recordPacked != 0 {
		err = c.violate(&ViolationError{Field: "record", Value: c.rx.flags >> 32, Bound: "one message, not packed ones"})
	}
	if err == nil {
		p, err = c.rx.ring.UnsafeBytes(c.rx.head&(c.rx.size-1)+recordHeader+c.rx.off, c.rx.n-c.rx.off)
	}
	if err != nil {
		c.read.mu.Unlock()
		return nil, false, c.opError("receive", err)
	}
	return p, c.rx.flags&recordEnd != 0, nil
}

// UnsafeRelease gives what UnsafePeek gave back. An error says that the bytes
// were not the peer's of this connection.
func (c *Conn) UnsafeRelease() error {
	defer c.read.mu.Unlock()
	c.endRecord()
	return c.opError("receive", c.same())
}
