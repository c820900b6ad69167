// Package capture writes frames in the format pcapng, which Wireshark and
// tcpdump read.
package capture

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// Writer writes a capture. Its methods are safe for concurrent use, and none but
// Close waits for what it writes to: who is slow misses frames, and is told how
// many.
type Writer struct {
	out *bufio.Writer
	ng  *pcapgo.NgWriter

	mu     sync.Mutex
	change sync.Cond // there is something to write, or nothing more to come
	queue  []record
	bytes  int    // in queue
	lost   uint64 // since the last one in queue
	closed bool
	err    error
	done   sync.WaitGroup
}

// record is a frame on its way.
type record struct {
	data    []byte
	at      time.Time
	sent    bool
	dropped string
	lost    uint64 // before it
}

// queueLimit is how much may be on its way, in bytes; a frame counts for
// frameCost more than its length.
const (
	queueLimit = 8 << 20
	frameCost  = 128
)

// New begins a capture of an interface. Who reads it while it is made sees each
// frame as soon as it was written.
func New(w io.Writer, name, description string) (*Writer, error) {
	c := &Writer{out: bufio.NewWriterSize(w, 256<<10)}
	c.change.L = &c.mu
	var err error
	intf := pcapgo.NgInterface{Name: name, Description: description, LinkType: layers.LinkTypeEthernet, TimestampResolution: 9} // nanoseconds
	options := pcapgo.NgWriterOptions{SectionInfo: pcapgo.NgSectionInfo{Application: "ivshctl"}}
	if c.ng, err = pcapgo.NewNgWriterInterface(c.out, intf, options); err != nil {
		return nil, err
	}
	if err := c.flush(); err != nil {
		return nil, err
	}
	c.done.Go(c.run)
	return c, nil
}

func (c *Writer) flush() error { return errors.Join(c.ng.Flush(), c.out.Flush()) }

// Observe writes a frame: its direction, and why it was dropped as a comment.
// After an error nothing is written any more; Close tells.
func (c *Writer) Observe(f vnet.Frame) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	size := len(f.Data) + frameCost
	if c.err != nil || c.closed || c.bytes+size > queueLimit {
		c.lost++
		return
	}
	c.queue = append(c.queue, record{bytes.Clone(f.Data), now, f.Sent, f.Dropped, c.lost})
	c.bytes += size
	c.lost = 0
	c.change.Signal()
}

// run writes what is in the queue.
func (c *Writer) run() {
	var batch []record
	for {
		c.mu.Lock()
		for len(c.queue) == 0 && !c.closed {
			c.change.Wait()
		}
		if len(c.queue) == 0 {
			c.mu.Unlock()
			return
		}
		batch, c.queue = c.queue, batch[:0]
		c.bytes = 0
		c.mu.Unlock()
		err := c.write(batch)
		clear(batch)
		if err != nil {
			c.mu.Lock()
			c.err, c.queue = err, nil
			c.mu.Unlock()
		}
	}
}

func (c *Writer) write(batch []record) error {
	for _, r := range batch {
		direction := pcapgo.NgEpbFlagDirectionInbound
		if r.sent {
			direction = pcapgo.NgEpbFlagDirectionOutbound
		}
		options := pcapgo.NgPacketOptions{Flags: &pcapgo.NgEpbFlags{Direction: direction}}
		if r.dropped != "" {
			options.Comments = []string{"dropped: " + r.dropped}
		}
		if r.lost > 0 {
			options.DropCount = &r.lost
		}
		info := gopacket.CaptureInfo{Timestamp: r.at, CaptureLength: len(r.data), Length: len(r.data)}
		if err := c.ng.WritePacketWithOptions(info, r.data, options); err != nil {
			return err
		}
	}
	return c.flush()
}

// Close writes what is left, and returns the first error.
func (c *Writer) Close() error {
	c.mu.Lock()
	c.closed = true
	c.change.Signal()
	c.mu.Unlock()
	c.done.Wait()
	return c.err
}
