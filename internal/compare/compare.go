// Package compare has what two processes of one machine could use instead of a
// link: plain memory, futexes, eventfds, pipes and sockets, each as well as
// ordinary Go code does it, to be measured beside a link.
//
// A contestant's descriptors are made by one process and inherited by the two
// that use them, see Open and Attach.
package compare

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// How an end waits for a message.
const (
	Poll   = "poll"   // looks at the memory all the time
	Thread = "thread" // a thread that is blocked in the kernel
	Poller = "poller" // a goroutine that is parked in Go's poller
)

// End is one process's end of a contestant. It is for one goroutine.
type End interface {
	Send(p []byte) error
	// Receive receives one message into the whole of p.
	Receive(p []byte) error
	Close() error
}

// Contestant is one way to exchange messages of one size, both ways.
type Contestant struct {
	Name string
	What string // a few words for a table
	Mode string // Poll, Thread or Poller

	// RoundTrips and OneWay say what it makes sense to measure: where a
	// message is a whole wake-up, streaming them would measure only that.
	RoundTrips, OneWay bool
	// Least and Most are the sizes of messages in bytes; 0 is no limit.
	Least, Most int

	open   func(size int) (pair, error)
	attach func(*Side) (End, error)
}

// pair is the descriptors of both ends.
type pair [2][]*os.File

// Side is what an end is attached to.
type Side struct {
	Index int // 0 or 1
	Size  int // of a message in bytes
	// Files are the descriptors that Open returned for this end: they are the
	// End's afterwards, also if Attach fails.
	Files []int
	// Yield says that both ends have to share a CPU, so that looking must not
	// keep it.
	Yield bool
}

// Contestants is all there are. The first that polls and the first that blocks
// a thread are what the machine can do at all.
var Contestants = []*Contestant{
	{Name: "line", What: "a word in a cache line", Mode: Poll, RoundTrips: true, Least: 8, Most: 8, open: memory, attach: attachLine},
	{Name: "memory", What: "copy through shared memory", Mode: Poll, RoundTrips: true, OneWay: true, open: memory, attach: attachMemory(looks)},
	{Name: "eventfd", What: "memory and an eventfd", Mode: Thread, RoundTrips: true, open: memoryEventfds, attach: attachMemory(eventfds)},
	{Name: "futex", What: "memory and a futex", Mode: Thread, RoundTrips: true, open: memory, attach: attachMemory(futexes)},
	{Name: "eventfd-go", What: "memory and an eventfd", Mode: Poller, RoundTrips: true, open: memoryEventfds, attach: attachMemory(pollerEventfds)},
	{Name: "pipe", What: "a pipe each way", Mode: Thread, RoundTrips: true, OneWay: true, open: pipes, attach: attachBytes},
	{Name: "unix", What: "Unix stream socket", Mode: Thread, RoundTrips: true, OneWay: true, open: sockets(unix.SOCK_STREAM), attach: attachBytes},
	{Name: "unix-go", What: "net.UnixConn", Mode: Poller, RoundTrips: true, OneWay: true, open: sockets(unix.SOCK_STREAM), attach: attachConn},
	// The kernel's default buffer of a socket holds no larger message.
	{Name: "seqpacket", What: "Unix seqpacket socket", Mode: Thread, RoundTrips: true, OneWay: true, Most: 128 << 10, open: sockets(unix.SOCK_SEQPACKET), attach: attachPackets},
	{Name: "tcp", What: "TCP over loopback", Mode: Thread, RoundTrips: true, OneWay: true, open: tcp, attach: attachBytes},
	{Name: "tcp-go", What: "net.TCPConn over loopback", Mode: Poller, RoundTrips: true, OneWay: true, open: tcp, attach: attachConn},
}

// Find returns the contestant of a name.
func Find(name string) (*Contestant, error) {
	for _, c := range Contestants {
		if c.Name == name {
			return c, nil
		}
	}
	return nil, fmt.Errorf("no contestant %q", name)
}

// Takes reports whether messages of a size can be sent.
func (c *Contestant) Takes(size int) bool {
	return size >= c.Least && (c.Most == 0 || size <= c.Most)
}

// Open makes the descriptors of both ends, for messages of a size in bytes.
func (c *Contestant) Open(size int) ([2][]*os.File, error) {
	p, err := c.open(size)
	if err != nil {
		p.close()
		return pair{}, fmt.Errorf("%s: %w", c.Name, err)
	}
	return p, nil
}

// Attach makes an end of its descriptors.
func (c *Contestant) Attach(s Side) (End, error) {
	e, err := c.attach(&s)
	if err != nil {
		for _, fd := range s.Files {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
		return nil, fmt.Errorf("%s: %w", c.Name, err)
	}
	return e, nil
}

// take takes a descriptor away from what Attach closes.
func (s *Side) take(i int) int {
	fd := s.Files[i]
	s.Files[i] = -1
	return fd
}

func (p *pair) add(side, fd int, name string) {
	p[side] = append(p[side], os.NewFile(uintptr(fd), name))
}

func (p *pair) close() {
	for _, files := range p {
		for _, f := range files {
			f.Close()
		}
	}
}
