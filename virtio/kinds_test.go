package virtio_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/block"
	"github.com/ivshmem-go/ivshmem/virtio/console"
	"github.com/ivshmem-go/ivshmem/virtio/entropy"
)

// kind is a type of device and Linux's driver of it, from the pages alone.
type kind struct {
	name     string
	protocol regs.Protocol
	serve    func(ctx context.Context, dev *ivshmem.Device, p *part) error
	accept   uint64                // feature bits that the driver takes
	queues   func(vectors int) int // that it uses
	silent   int                   // the queue without a callback, -1: none
	work     func(l *linux, tag []byte) error
}

var kinds = []kind{
	{"entropy", 0x8004, serveEntropy, 0, one, -1, readEntropy},
	{"block", 0x8002, serveBlock, everything, one, -1, useDisk},
	{"console", 0x8003, serveConsole(console.Single), 1 << 2, two, -1, useConsole},
	{"ports", 0x8003, serveConsole(console.Multiport), 1<<0 | 1<<1 | 1<<2, portQueues, 3, usePorts},
	{"network", 0x8001, serveNet, netFeatures, two, -1, useNet},
}

func one(int) int { return 1 }
func two(int) int { return 2 }

// ports is how many a device with so many vectors has: Linux's driver cannot
// bind to more where each queue would have a vector.
func ports(vectors int) int {
	if vectors >= 6 {
		return 1
	}
	return 3
}

func portQueues(vectors int) int { return 2*ports(vectors) + 2 }

func serveDevice(ctx context.Context, dev *ivshmem.Device, d virtio.Device) error {
	b, err := virtio.NewBackEnd(dev, d)
	if err != nil {
		return err
	}
	return b.Serve(ctx)
}

func serveEntropy(ctx context.Context, dev *ivshmem.Device, p *part) error {
	if p.Sabotage {
		return serveDevice(ctx, dev, entropy.Device(zeros{}))
	}
	return serveDevice(ctx, dev, entropy.Device(nil))
}

// zeros is no source of random bytes.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func readEntropy(l *linux, _ []byte) error {
	r, err := l.queues[0].request(nil, 64)
	if err == nil && (r.length != 64 || bytes.Equal(r.in, make([]byte, 64))) {
		err = fmt.Errorf("%d random bytes, %x", r.length, r.in)
	}
	return err
}

func serveBlock(ctx context.Context, dev *ivshmem.Device, p *part) error {
	f, err := block.OpenFile(p.Image, false)
	if err != nil {
		return err
	}
	defer f.Close()
	d, err := block.Device(dev, f, block.Config{})
	if err != nil {
		return err
	}
	return serveDevice(ctx, dev, d)
}

// useDisk writes a sector, flushes, and reads it back.
func useDisk(l *linux, tag []byte) error {
	sector := bytes.Repeat(tag, 512/len(tag)+1)[:512]
	at := uint64(sector[0]) % 8
	do := func(kind uint32, out []byte, in ...int) ([]byte, error) {
		h := binary.LittleEndian.AppendUint32(nil, kind)
		h = binary.LittleEndian.AppendUint64(append(h, 0, 0, 0, 0), at)
		segments := [][]byte{h}
		if out != nil {
			segments = append(segments, out)
		}
		r, err := l.queues[0].request(segments, append(in, 1)...)
		if err != nil {
			return nil, err
		}
		if status := r.in[len(r.in)-1]; status != 0 {
			return nil, fmt.Errorf("request %d: status %d", kind, status)
		}
		return r.in[:len(r.in)-1], nil
	}
	if _, err := do(1, sector); err != nil {
		return err
	}
	if _, err := do(4, nil); err != nil {
		return err
	}
	got, err := do(0, nil, 512)
	if err == nil && !bytes.Equal(got, sector) {
		err = fmt.Errorf("read %.20q, want %.20q", got, sector)
	}
	return err
}

// serveConsole has ports that send back what they are sent.
func serveConsole(wire console.Wire) func(context.Context, *ivshmem.Device, *part) error {
	return func(ctx context.Context, dev *ivshmem.Device, part *part) error {
		n := 1
		if wire == console.Multiport {
			n = ports(part.Vectors)
		}
		d, err := console.NewDevice(dev, console.Config{Wire: wire, MaxPorts: n})
		if err != nil {
			return err
		}
		for i := range n {
			p, err := d.AddPort(console.PortConfig{Name: fmt.Sprintf("port %d", i), Console: i == 0})
			if err != nil {
				return err
			}
			if err := p.Open(); err != nil {
				return err
			}
			go echoPort(ctx, p)
		}
		return d.Serve(ctx)
	}
}

func echoPort(ctx context.Context, p *console.Port) {
	b := make([]byte, 256)
	for {
		n, err := p.Read(b)
		switch {
		case err == nil:
			_, err = p.WriteAll(ctx, b[:n])
		case errors.Is(err, io.EOF):
			err = p.WaitOpen(ctx)
		}
		if err != nil {
			return
		}
	}
}

// receiver is a receive queue that is kept full.
type receiver struct {
	l       *linux
	q       *linuxQueue
	pending []*linuxRequest
}

func (l *linux) receiver(queue int) (*receiver, error) {
	r := &receiver{l: l, q: l.queues[queue]}
	l.mu.Lock()
	defer l.mu.Unlock()
	for range 2 {
		if err := r.add(); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// add adds a buffer. The caller holds mu.
func (r *receiver) add() error {
	request, err := r.q.add(nil, 64)
	if err != nil {
		return err
	}
	r.pending = append(r.pending, request)
	r.q.kick()
	return nil
}

// next waits for what comes next.
func (r *receiver) next() ([]byte, error) {
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	request := r.pending[0]
	if err := r.q.await(request); err != nil {
		return nil, err
	}
	r.pending = r.pending[1:]
	return request.in[:request.length], r.add()
}

// until waits for bytes, behind which nothing has arrived yet.
func (r *receiver) until(want []byte) error {
	var got []byte
	for !bytes.HasSuffix(got, want) {
		b, err := r.next()
		if err != nil {
			return err
		}
		// What came for a predecessor may come first.
		if got = append(got, b...); len(got) > 4096 {
			return fmt.Errorf("read %q, want %q", got, want)
		}
	}
	return nil
}

// send sends what the device has to return unwritten.
func (q *linuxQueue) send(p []byte) error {
	r, err := q.request([][]byte{p})
	if err == nil && r.length != 0 {
		err = fmt.Errorf("queue %d: the device says that it wrote %d bytes", q.index, r.length)
	}
	return err
}

func useConsole(l *linux, tag []byte) error {
	r, err := l.receiver(0)
	if err != nil {
		return err
	}
	if err := l.queues[1].send(tag); err != nil {
		return err
	}
	return r.until(tag)
}

// usePorts takes all ports into use, and sends something through each.
func usePorts(l *linux, tag []byte) error {
	events, err := l.receiver(2)
	if err != nil {
		return err
	}
	say := func(id uint32, event, value uint16) error {
		m := binary.LittleEndian.AppendUint32(nil, id)
		m = binary.LittleEndian.AppendUint16(m, event)
		return l.queues[3].send(binary.LittleEndian.AppendUint16(m, value))
	}
	if err := say(0xffffffff, 0, 1); err != nil { // DEVICE_READY
		return err
	}
	n := ports(l.vectors)
	receivers := map[uint32]*receiver{}
	for open := 0; open < n; {
		m, err := events.next()
		if err != nil {
			return err
		}
		if len(m) < 8 {
			return fmt.Errorf("control message of %d bytes", len(m))
		}
		id, event, value := binary.LittleEndian.Uint32(m), binary.LittleEndian.Uint16(m[4:]), binary.LittleEndian.Uint16(m[6:])
		if int(id) >= n {
			return fmt.Errorf("control message for port %d of %d", id, n)
		}
		switch event {
		case 1: // PORT_ADD
			first := 0
			if id > 0 {
				first = 2 + 2*int(id)
			}
			if receivers[id], err = l.receiver(first); err == nil {
				err = say(id, 3, 1) // PORT_READY
			}
		case 4: // CONSOLE_PORT
			err = say(id, 6, 1) // PORT_OPEN
		case 5: // RESIZE
		case 6: // PORT_OPEN
			if value != 1 {
				err = fmt.Errorf("port %d: open is %d", id, value)
			}
			open++
		case 7: // PORT_NAME
			if want := fmt.Sprintf("port %d", id); string(bytes.TrimRight(m[8:], "\x00")) != want {
				err = fmt.Errorf("the name of port %d is %q", id, m[8:])
			} else if id > 0 {
				err = say(id, 6, 1)
			}
		default:
			err = fmt.Errorf("port %d: event %d", id, event)
		}
		if err != nil {
			return err
		}
	}
	for id, r := range receivers {
		text := fmt.Appendf(nil, "%s to %d", tag, id)
		if err := l.queues[r.q.index+1].send(text); err != nil {
			return err
		}
		if err := r.until(text); err != nil {
			return err
		}
	}
	return nil
}
