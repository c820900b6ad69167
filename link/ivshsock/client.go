package ivshsock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/link"
)

const (
	// maxStalled is how many peers may come and go while a client does not take
	// a single message. After that it is disconnected.
	maxStalled = 16384
	// toldPatience bounds how long a new client waits for its own eventfds
	// because another does not take those of the new one.
	toldPatience = 100 * time.Millisecond
	// readGrace is for a client that is about to leave recvmsg(2).
	readGrace = time.Millisecond
)

// client is a connected client: a queue of what it is to be told, and the
// goroutines that watch and write its socket.
type client struct {
	link *link.Link
	conn *net.UnixConn
	raw  syscall.RawConn
	id   uint32
	// joined says that the client is a peer. Guarded by the server's lock.
	joined bool

	stalled atomic.Int32 // events since a message was taken
	wake    chan struct{}
	ended   chan struct{}

	mu     sync.Mutex
	queue  []event // at most two for each peer ID, see push
	isOver bool
	reason error

	alone bool // what was sent last must have been read before more is sent
}

// event is the arrival of a peer, or its departure.
type event struct {
	id    uint32
	gone  bool
	told  *told // told when the arrival has been sent
	await *told // to be waited for, before the client's own eventfds are sent
}

func newClient(l *link.Link, conn *net.UnixConn) (*client, error) {
	raw, err := conn.SyscallConn()
	return &client{
		link: l, conn: conn, raw: raw,
		wake: make(chan struct{}, 1), ended: make(chan struct{}),
	}, err
}

// run serves the client until its end. The error is why it was disconnected;
// nil if it left, or the service ends.
func (c *client) run() error {
	var writer sync.WaitGroup
	writer.Go(func() { c.end(c.write()) })
	// The client has nothing to say: what comes is its end. Descriptors that a
	// plain read does not ask for are dropped by the kernel.
	var b [1]byte
	n, err := c.conn.Read(b[:])
	if n > 0 {
		err = errors.New("it sent data: expected none, as only the server sends")
	}
	c.end(err)
	writer.Wait()
	return c.reason
}

// end closes the connection. The first reason counts; that the client has gone
// is none.
func (c *client) end(reason error) {
	for _, left := range []error{io.EOF, unix.EPIPE, unix.ECONNRESET, net.ErrClosed} {
		if errors.Is(reason, left) {
			reason = nil
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isOver {
		return
	}
	c.isOver, c.reason = true, reason
	close(c.ended)
	c.conn.Close()
	for _, e := range c.queue {
		e.told.done()
	}
	c.queue = nil
}

// push adds an event to the queue. It does not block. A departure removes the
// arrival that the client has not been told of yet, so that the queue never
// has more than a departure and an arrival of each peer ID.
func (c *client) push(e event) {
	if c.stalled.Add(1) == maxStalled+1 {
		c.end(fmt.Errorf("it did not take a message while peers came or went %d times", maxStalled))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isOver {
		e.told.done()
		return
	}
	if e.gone {
		for i := len(c.queue) - 1; i >= 0; i-- {
			if q := c.queue[i]; q.id == e.id && !q.gone {
				q.told.done()
				c.queue = append(c.queue[:i], c.queue[i+1:]...)
				return
			}
		}
	}
	c.queue = append(c.queue, e)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// next waits for an event; it is false at the end.
func (c *client) next() (event, bool) {
	for {
		c.mu.Lock()
		if len(c.queue) > 0 {
			e := c.queue[0]
			if c.queue = c.queue[1:]; len(c.queue) == 0 {
				c.queue = nil // the room that a long queue took
			}
			c.mu.Unlock()
			return e, true
		}
		c.mu.Unlock()
		select {
		case <-c.wake:
		case <-c.ended:
			return event{}, false
		}
	}
}

// write sends the events of the queue.
func (c *client) write() error {
	var b []byte
	for {
		e, ok := c.next()
		if !ok {
			return nil
		}
		if e.gone {
			b = appendPeerGone(b[:0], e.id)
			if err := c.send(b, nil); err != nil {
				return err
			}
			c.alone = true
			continue
		}
		err := c.introduce(e)
		e.told.done()
		if err != nil {
			return err
		}
	}
}

// introduce sends the doorbell eventfds of a peer, in the order of the
// vectors.
func (c *client) introduce(e event) error {
	if e.await != nil {
		// Whom this client rings may ring back at once, which takes its
		// eventfds; but those who do not read hold up nobody for long.
		select {
		case <-e.await.all():
		case <-c.ended:
		case <-time.After(toldPatience):
		}
	}
	var b []byte
	for v := range c.link.Config().Vectors {
		fd, err := c.link.DoorbellFD(uint16(e.id), v)
		if err != nil {
			return err
		}
		b = appendEventFD(b[:0], e.id, uint32(v))
		if err := c.send(b, unix.UnixRights(fd)); err != nil {
			return err
		}
	}
	return nil
}

// send sends one message, however long the client takes.
func (c *client) send(b, oob []byte) error {
	if c.alone {
		if err := c.awaitRead(); err != nil {
			return err
		}
		c.alone = false
	}
	err := send(c.conn, b, oob, c.ended)
	if err == nil {
		c.stalled.Store(0)
	}
	return err
}

// awaitRead waits until the client has read everything that was sent.
//
// The device of 2020 handles one message for each read, and takes a descriptor
// for each. Messages with descriptors are always read alone, as descriptors are
// a barrier to reading on a stream (unix(7)); but what follows a message
// without one would be read together with it, and misunderstood. So such a
// message, PEER_GONE, must have been read before anything else is sent.
//
// The socket becomes writable, also for Go's edge-triggered poller, whenever
// the client has read a message (Linux, unix_write_space). Of what is charged
// to the socket then, one may be left for a moment (sock_wfree).
func (c *client) awaitRead() error {
	var err error
	if e := c.raw.Write(func(fd uintptr) bool {
		var n int
		n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
		return err != nil || n <= 1
	}); e != nil {
		return e
	}
	if err == nil {
		// The kernel frees a message before it looks whether to go on reading.
		time.Sleep(readGrace)
	}
	return err
}

// told counts the clients that are yet to be sent the eventfds of a new one. A
// nil told counts nothing.
type told struct {
	left atomic.Int32
	none chan struct{}
}

func newTold() *told {
	t := &told{none: make(chan struct{})}
	t.left.Store(1) // for the one who waits
	return t
}

func (t *told) expect() { t.left.Add(1) }

func (t *told) done() {
	if t != nil && t.left.Add(-1) == 0 {
		close(t.none)
	}
}

// all is closed when all have been told. It is called once, by the waiter.
func (t *told) all() <-chan struct{} {
	t.done()
	return t.none
}
