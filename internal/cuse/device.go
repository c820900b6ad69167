package cuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// maxWaiting is how many requests may wait, each from a thread of its own. The
// kernel's messages have to be read in any case, since interrupts are among
// them.
const maxWaiting = 64

// errOver says that the port was removed and the file closed.
var errOver = errors.New("the port was removed")

// device is a character device. What cannot be answered at once waits in it, and
// is looked at again whenever the port has changed; so nothing ever blocks but
// the two goroutines that wait for messages and for changes.
type device struct {
	kernel *os.File
	port   *console.Port
	node   string
	gone   func() // the node was taken away
	left   func() // the file was closed

	mu sync.Mutex
	// Below: with mu held.
	files   uint64 // how many were opened: the last one's number
	open    bool
	removed bool
	// Requests that wait, in the order in which they came.
	reads, writes []*request
	poll          poll
	answer        []byte // where answers are put together
}

// request is a READ or WRITE.
type request struct {
	unique uint64
	size   int    // of a READ
	data   []byte // of a WRITE: what is not yet taken
	done   int    // bytes taken
	err    error  // why it waits
	now    bool   // it must not wait
}

func newDevice(kernel *os.File, port *console.Port, node string) *device {
	return &device{kernel: kernel, port: port, node: node, gone: func() {}, left: func() {}, answer: make([]byte, outHeaderSize+maxTransfer)}
}

// init answers the kernel's first message.
func (d *device) init(name string) error {
	b := make([]byte, messageSize)
	n, err := d.kernel.Read(b)
	if err != nil {
		return err
	}
	m, err := parse(b[:n])
	if err != nil {
		return err
	}
	if m.op != opInit || len(m.body) < initInSize {
		return fmt.Errorf("message of the kernel's CUSE: expected INIT (%d) first, found %d with %d bytes", opInit, m.op, len(m.body))
	}
	major, minor := native.Uint32(m.body), native.Uint32(m.body[4:])
	if major != protocolMajor || minor < protocolLeast {
		return fmt.Errorf("the kernel's CUSE has version %d.%d, expected %d.%d or newer: use Linux 3.9 or newer", major, minor, protocolMajor, protocolLeast)
	}
	return d.reply(m.unique, initAnswer(min(minor, protocolMinor), name))
}

// run serves the device until ctx ends, the port is removed and the file closed,
// or the kernel ends it. It closes the connection to the kernel.
func (d *device) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 2)
	var all sync.WaitGroup
	all.Go(func() { ended <- d.listen() })
	all.Go(func() { ended <- d.watch(ctx) })
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
	}
	cancel()
	d.mu.Lock()
	d.fail(unix.ENODEV)
	d.mu.Unlock()
	d.kernel.Close()
	all.Wait()
	if d.open {
		d.port.Close()
	}
	if err == errOver {
		return nil
	}
	return err
}

// listen handles messages until the connection is closed.
func (d *device) listen() error {
	b := make([]byte, messageSize)
	for {
		n, err := d.kernel.Read(b)
		if errors.Is(err, unix.ENOENT) {
			continue // it was taken back while it was read
		}
		if err != nil {
			return fmt.Errorf("the kernel has ended the character device %s: %w", d.node, err)
		}
		m, err := parse(b[:n])
		if err != nil {
			return err
		}
		if err := d.handle(m); err != nil {
			return err
		}
	}
}

// watch looks at what waits whenever the port has changed.
func (d *device) watch(ctx context.Context) error {
	for {
		changed := d.port.Changes()
		if err := d.look(); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

func (d *device) look() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	// One that the other side has closed is ready for In, too.
	if !d.removed && d.port.Ready() == console.HangUp {
		d.removed = true
		// Nobody else comes to it; the kernel would keep it for the open file.
		if err := os.Remove(d.node); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		d.gone()
	}
	if err := d.advance(); err != nil {
		return err
	}
	return d.over()
}

// over says whether there is nothing left to do. The caller holds mu.
func (d *device) over() error {
	if d.removed && !d.open {
		return errOver
	}
	return nil
}

// handle answers a message or lets it wait.
func (d *device) handle(m message) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	size, known := bodySizes[m.op]
	switch {
	case !known:
		// Of FLUSH and FSYNC, which CUSE does not send, it means that there
		// is nothing to do.
		return d.refuse(m.unique, unix.ENOSYS)
	case len(m.body) < size:
		return d.refuse(m.unique, unix.EINVAL)
	case m.op == opOpen:
		return d.handleOpen(m)
	case m.op == opInterrupt:
		return d.interrupt(native.Uint64(m.body))
	case !d.open || native.Uint64(m.body) != d.files:
		return d.refuse(m.unique, unix.EBADF)
	}
	switch m.op {
	case opRead:
		return d.handleRead(m)
	case opWrite:
		return d.handleWrite(m)
	case opPoll:
		return d.handlePoll(m)
	case opIoctl:
		return d.handleIoctl(m)
	}
	return d.handleRelease(m)
}

// The callers of all that follow hold mu.

func (d *device) handleOpen(m message) error {
	if err := d.port.Open(); err != nil {
		return d.refuse(m.unique, number(err))
	}
	d.files++
	d.open, d.poll = true, poll{}
	b := make([]byte, 16)
	native.PutUint64(b, d.files)
	native.PutUint32(b[8:], openDirectIO|openNonSeekable)
	return d.reply(m.unique, b)
}

func (d *device) handleRelease(m message) error {
	if err := d.fail(unix.EBADF); err != nil { // the kernel has seen to it that there are none
		return err
	}
	d.open = false
	d.port.Close()
	d.left()
	if err := d.reply(m.unique, nil); err != nil {
		return err
	}
	return d.over()
}

func (d *device) handleRead(m message) error {
	size := native.Uint32(m.body[readSize:])
	if size > maxTransfer {
		return d.refuse(m.unique, unix.EINVAL)
	}
	r := &request{unique: m.unique, size: int(size), err: console.ErrWouldBlock}
	// The kernel goes on where a long read was filled up to here. What is there
	// is not to wait for more.
	r.now = mayNotWait(m.body) || native.Uint64(m.body[readOffset:]) != 0
	d.reads = append(d.reads, r)
	d.poll.told &^= console.In
	return d.settle(r, &d.reads)
}

func (d *device) handleWrite(m message) error {
	data := m.body[writeInSize:]
	if uint64(native.Uint32(m.body[readSize:])) != uint64(len(data)) {
		return d.refuse(m.unique, unix.EINVAL)
	}
	r := &request{unique: m.unique, data: data, err: console.ErrWouldBlock, now: mayNotWait(m.body)}
	d.writes = append(d.writes, r)
	d.poll.told &^= console.Out
	return d.settle(r, &d.writes)
}

func mayNotWait(body []byte) bool { return native.Uint32(body[readFlags:])&unix.O_NONBLOCK != 0 }

// settle answers a request that has come last, or lets it wait.
func (d *device) settle(r *request, queue *[]*request) error {
	if err := d.advance(); err != nil {
		return err
	}
	switch {
	case !slices.Contains(*queue, r):
		return nil
	case r.now:
		return d.end(queue, r, number(r.err))
	case len(d.reads)+len(d.writes) > maxWaiting:
		return d.end(queue, r, unix.ENOMEM)
	}
	r.data = slices.Clone(r.data) // the message's place is needed for the next one
	return nil
}

// advance answers all that can be answered.
func (d *device) advance() error {
	for len(d.reads) > 0 {
		r := d.reads[0]
		n, err := d.port.TryRead(d.answer[outHeaderSize:][:r.size])
		if errors.Is(err, console.ErrWouldBlock) {
			break
		}
		d.reads = slices.Delete(d.reads, 0, 1)
		if err == nil || errors.Is(err, io.EOF) {
			err = d.send(r.unique, 0, n)
		} else {
			err = d.refuse(r.unique, number(err))
		}
		if err != nil {
			return err
		}
	}
	for len(d.writes) > 0 {
		r := d.writes[0]
		n, err := d.port.TryWrite(r.data)
		r.data, r.done, r.err = r.data[n:], r.done+n, err
		if err == nil && len(r.data) > 0 {
			continue
		}
		if errors.Is(err, console.ErrWouldBlock) || errors.Is(err, console.ErrStalled) {
			break
		}
		if err := d.end(&d.writes, r, number(err)); err != nil {
			return err
		}
	}
	return d.notify()
}

// end ends a request that waits: with success if something of it was done.
func (d *device) end(queue *[]*request, r *request, errno unix.Errno) error {
	i := slices.Index(*queue, r)
	*queue = slices.Delete(*queue, i, i+1)
	if r.done == 0 && errno != 0 {
		return d.refuse(r.unique, errno)
	}
	b := make([]byte, 8)
	native.PutUint32(b, uint32(r.done))
	return d.reply(r.unique, b)
}

// interrupt ends the request with a number, if it still waits.
func (d *device) interrupt(unique uint64) error {
	for _, queue := range []*[]*request{&d.reads, &d.writes} {
		for _, r := range *queue {
			if r.unique == unique {
				return d.end(queue, r, unix.EINTR)
			}
		}
	}
	return nil
}

// fail ends all requests that wait.
func (d *device) fail(errno unix.Errno) error {
	for _, queue := range []*[]*request{&d.reads, &d.writes} {
		for len(*queue) > 0 {
			if err := d.end(queue, (*queue)[0], errno); err != nil {
				return err
			}
		}
	}
	return nil
}

// number is what a program gets for an error of the port.
func number(err error) unix.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, console.ErrWouldBlock):
		return unix.EAGAIN
	case errors.Is(err, console.ErrThrottled):
		return unix.ENOSPC
	case errors.Is(err, console.ErrBusy):
		return unix.EBUSY
	}
	return unix.ENODEV // whatever the reason why the port is gone
}

func (d *device) refuse(unique uint64, errno unix.Errno) error { return d.send(unique, errno, 0) }

func (d *device) reply(unique uint64, body []byte) error {
	return d.send(unique, 0, copy(d.answer[outHeaderSize:], body))
}

// send answers with n bytes that are in their place already.
func (d *device) send(unique uint64, errno unix.Errno, n int) error {
	b := d.answer[:outHeaderSize+n]
	put(b, errno, unique)
	return d.write(b)
}

func (d *device) write(b []byte) error {
	// Nobody may wait for it any more, or have it open.
	if _, err := d.kernel.Write(b); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("answer to the kernel's CUSE: %w", err)
	}
	return nil
}
