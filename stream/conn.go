package stream

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Conn is a connection with another peer. It carries bytes (Read, Write) and
// messages (Send, Receive); both ends have to use the same of the two at a
// time. It implements [net.Conn], and is safe for concurrent use.
//
// Errors are [net.OpError]s of [io.EOF] (as it is) after the peer closed and
// everything was read, [net.ErrClosed], [os.ErrDeadlineExceeded],
// ECONNRESET when the peer left or violated the protocol (then with a
// [ViolationError]), or EPIPE for writing to a peer that has closed.
type Conn struct {
	ep         *Endpoint
	peer       *remote
	id         uint64
	slot       uint32 // own
	peerSlot   uint32
	localPort  uint32
	remotePort uint32
	answered   atomic.Uint32 // the state that a dialed peer answered by

	read, write half
	rx          receiver // of read.mu
	packed      []byte   // of read.mu: messages of a packed record that were not read yet
	packing     []byte   // where they are copied to
	tx          sender   // of write.mu
	need        uint64   // free space that a writer waits for

	// Below: with ep.mu held.
	connected  bool
	peerClosed bool
	pending    bool // nobody has accepted it, or it was refused
	finished   bool // nobody uses the own end any more
	released   bool // the slot is not this connection's any more
	err        error
}

// half is one direction of a connection: one at a time uses it.
type half struct {
	waiter
	mu sync.Mutex
	deadline
	arm func() // tells the peer to ring, bound once
}

var _ net.Conn = (*Conn)(nil)

// newConn takes a free slot. The caller holds ep.mu.
func (ep *Endpoint) newConn(r *remote, id uint64, localPort, remotePort uint32) (*Conn, error) {
	if len(ep.free) == 0 {
		return nil, fmt.Errorf("%w: the own area has slots for %d", ErrTooMany, len(ep.conns))
	}
	c := &Conn{ep: ep, peer: r, id: id, slot: ep.free[0], localPort: localPort, remotePort: remotePort}
	if err := c.open(); err != nil {
		return nil, err
	}
	ep.free = ep.free[1:]
	ep.conns[c.slot] = c
	return c, nil
}

// open sets the own half up.
func (c *Conn) open() error {
	ep := c.ep
	v, err := ep.areas.own.View(ep.geo.blocksOffset()+uint64(c.slot)*slotSize, slotSize)
	if err != nil {
		return err
	}
	block, err := v.Words()
	if err != nil {
		return err
	}
	c.tx.size = ep.geo.ring
	if c.tx.ring, err = ep.areas.own.View(ep.geo.ringsOffset()+uint64(c.slot)*ep.geo.ring, ep.geo.ring); err != nil {
		return err
	}
	if c.tx.words, err = c.tx.ring.Words(); err != nil {
		return err
	}
	c.rx.block, c.tx.block = block, block
	c.tx.words.Store(0, 0)
	block.Store(slotHead, 0)
	block.Store(slotDataEvent, 0)
	block.Store(slotSpaceEvent, 0)
	c.read.init(ep, c.rx.ready)
	c.write.init(ep, c.hasSpace)
	c.read.rx = &c.rx
	c.read.arm = func() { block.Store(slotDataEvent, c.rx.head+1) }
	c.write.arm = func() { block.Store(slotSpaceEvent, c.tx.tail+c.need-c.tx.size) }
	return nil
}

// connect sets the peer's half up. The caller holds ep.mu.
func (c *Conn) connect(slot uint32) error {
	r := c.peer
	if r.conns[slot] != nil {
		return fmt.Errorf("%w: the peer's slot %d is in use", syscall.ECONNRESET, slot)
	}
	block, err := r.block(slot)
	if err != nil {
		return err
	}
	c.rx.size = r.geo.ring
	if c.rx.ring, err = r.area.View(r.geo.ringsOffset()+uint64(slot)*r.geo.ring, r.geo.ring); err != nil {
		return err
	}
	if c.rx.words, err = c.rx.ring.Words(); err != nil {
		return err
	}
	c.rx.peer, c.tx.peer = block, block
	delete(r.dialing, c)
	c.peerSlot, c.connected = slot, true
	r.conns[slot] = c
	return nil
}

// describe writes the own descriptor; the ID is what makes it valid.
func (c *Conn) describe(d descriptor) {
	d.id, d.peer, d.epoch = c.id, c.peer.id, c.peer.epoch
	w := d.words()
	for i := len(w) - 1; i >= 0; i-- {
		c.tx.block.Store(uint64(i), w[i])
	}
}

// update takes the peer's state over. The caller holds ep.mu.
func (c *Conn) update(state uint32) {
	if state == slotClosed && !c.peerClosed {
		c.peerClosed = true
		c.write.stop.Or(stopRefusing)
		c.reap()
	}
	for _, w := range []*waiter{&c.read.waiter, &c.write.waiter} {
		if w.asleep && w.done() {
			c.ep.rouse(w)
		}
	}
}

// breakOff ends the connection by an error. The caller holds ep.mu.
func (c *Conn) breakOff(err error) { c.end(err, stopBroken) }

// end ends the connection by an error; reading may go on as far as it can. The
// caller holds ep.mu.
func (c *Conn) end(err error, reading uint32) {
	if c.finished || c.err != nil && c.read.stop.Load()&reading != 0 {
		return
	}
	if c.err == nil {
		c.err = err
		c.ep.stats.Resets++
	}
	c.read.stop.Or(reading)
	c.write.stop.Or(stopBroken)
	c.ep.rouse(&c.read.waiter)
	c.ep.rouse(&c.write.waiter)
}

// reap gives the slot back once nobody needs it: the own side has closed, and
// the peer has, too, or is not there any more. The caller holds ep.mu.
func (c *Conn) reap() {
	if !c.finished || c.released {
		return
	}
	if c.connected && c.err == nil && !c.peer.gone {
		d, ok := c.peer.describe(c.peerSlot)
		if !ok || d.id == c.id && d.state != slotClosed {
			return
		}
	}
	c.release()
}

// release gives the slot back. The peer sees it as a reset unless it has
// closed. The caller holds ep.mu.
func (c *Conn) release() {
	if c.released {
		return
	}
	ep, r := c.ep, c.peer
	c.finished, c.released = true, true
	if ep.err != nil { // the area may be another endpoint's already
		return
	}
	c.tx.block.Store(slotID, 0)
	ep.conns[c.slot] = nil
	ep.free = append(ep.free, c.slot)
	delete(r.dialing, c)
	if c.connected {
		r.conns[c.peerSlot] = nil
	}
	if !r.gone {
		ep.notify(r, c.slot)
	}
	c.settle()
	for _, other := range ep.remotes {
		if other.unanswered {
			other.unanswered = false
			other.scan(ep)
		}
	}
}

// settle ends the time in which the connection was pending. The caller holds
// ep.mu.
func (c *Conn) settle() {
	if !c.pending {
		return
	}
	r := c.peer
	c.pending = false
	r.pending--
	if r.unanswered {
		r.unanswered = false
		r.scan(c.ep)
	}
}

// hasSpace is the condition of a waiting writer.
func (c *Conn) hasSpace() bool {
	// What is no position makes the writer look, and find out.
	return c.tx.peer.Load(slotHead)-(c.tx.tail+c.need-c.tx.size) < 1<<63
}

// fault is the error of an operation that has to stop, nil if it has not.
func (c *Conn) fault(h *half) error {
	stop := h.stop.Load()
	switch {
	case stop == 0:
		return nil
	case stop&stopClosed != 0:
		return net.ErrClosed
	case stop&stopDeadline != 0:
		return os.ErrDeadlineExceeded
	case stop == stopLost && h == &c.read && (len(c.packed) > 0 || c.rx.remains()):
		return nil
	case stop&(stopBroken|stopLost) != 0:
		c.ep.mu.Lock()
		defer c.ep.mu.Unlock()
		return c.err
	}
	return syscall.EPIPE
}

// violate breaks the connection because of what the peer wrote.
func (c *Conn) violate(err error) error {
	c.ep.mu.Lock()
	defer c.ep.unlock()
	if c.peer.present() && c.rx.peer.Load(slotID) == c.id {
		err = fmt.Errorf("%w: %w", syscall.ECONNRESET, c.ep.violation(c.peer.id, err))
	} else { // a successor of the peer wrote it
		err = syscall.ECONNRESET
	}
	c.breakOff(err)
	return err
}

func (c *Conn) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: Addr{}.Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// ring rings the peer for something that it waits for.
func (c *Conn) ring() {
	c.ep.mu.Lock()
	if !c.released && c.ep.err == nil {
		c.ep.notify(c.peer, c.slot)
	}
	c.ep.mu.Unlock()
}

// LocalAddr is the own end, an [Addr].
func (c *Conn) LocalAddr() net.Addr { return Addr{c.ep.dev.ID(), c.localPort} }

// RemoteAddr is the peer's end, an [Addr].
func (c *Conn) RemoteAddr() net.Addr { return Addr{c.peer.id, c.remotePort} }

// SetDeadline sets the deadlines for reading and writing; the zero time is
// none.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline sets the deadline for reading.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.read, t) }

// SetWriteDeadline sets the deadline for writing.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.write, t) }

func (c *Conn) setDeadline(h *half, t time.Time) error {
	if h.stop.Load()&stopClosed != 0 {
		return c.opError("set", net.ErrClosed)
	}
	h.setDeadline(&h.waiter, t)
	return nil
}

// CloseWrite tells the peer that nothing more comes: it reads io.EOF behind
// what was written.
func (c *Conn) CloseWrite() error {
	c.write.mu.Lock()
	defer c.write.mu.Unlock()
	switch stop := c.write.stop.Load(); {
	case stop&stopClosed != 0:
		return c.opError("close", net.ErrClosed)
	case stop&stopFinished == 0:
		c.finish()
	}
	return nil
}

// finish writes the last record, for which there is always room: the word
// behind the last one. The caller holds write.mu.
func (c *Conn) finish() {
	if c.write.stop.Or(stopFinished)&(stopFinished|stopBroken) != 0 {
		return
	}
	c.tx.stageHeader(0, recordFin)
	if c.tx.commit() {
		c.ring()
	}
}

// Close closes the connection. What was written stays for the peer to read.
func (c *Conn) Close() error {
	if c.read.stop.Or(stopClosed)&stopClosed != 0 {
		return c.opError("close", net.ErrClosed)
	}
	c.write.stop.Or(stopClosed)
	c.read.setDeadline(&c.read.waiter, time.Time{})
	c.write.setDeadline(&c.write.waiter, time.Time{})
	c.read.halt(stopClosed)
	c.write.halt(stopClosed)
	// Whoever reads or writes is on the way out.
	c.read.mu.Lock()
	defer c.read.mu.Unlock()
	c.write.mu.Lock()
	defer c.write.mu.Unlock()
	c.finish()
	c.ep.mu.Lock()
	defer c.ep.unlock()
	if c.released {
		return nil
	}
	c.finished = true
	if c.err == nil && c.ep.err == nil {
		c.describe(descriptor{state: slotClosed, slot: c.peerSlot, port: c.remotePort})
		if c.reap(); !c.released {
			c.ep.notify(c.peer, c.slot)
		}
		return nil
	}
	c.release()
	return nil
}
