package block

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
)

var (
	// ErrIO says that the device could not do a request.
	ErrIO = errors.New("the disk reports an I/O error")
	// ErrUnsupported says that the device does not know a request.
	ErrUnsupported = errors.New("the disk does not support the request")
	// ErrReadOnly says that the disk must not be written.
	ErrReadOnly = errors.New("the disk is read-only")
)

// Disk is a driver of a block device. It implements [io.ReaderAt] and
// [io.WriterAt]. It is safe for concurrent use.
//
// All methods fail with [virtio.ErrBackEndGone], [virtio.ErrNeedsReset], a
// *[virtio.ViolationError], or [os.ErrClosed] after Close, and then for ever.
type Disk struct {
	d    *virtio.Driver
	q    *virtio.DriverQueue
	size int64
	most int // bytes of data of a request
	part int // of a segment of it

	// edges is held for reading by writes of whole sectors, and by others, which
	// read what is around them before.
	edges sync.RWMutex

	idle chan *slot    // those that no request uses
	reap chan struct{} // full while somebody takes what is used
	all  []*slot
}

// slot is the memory of a request: header, data, status.
type slot struct {
	buf    *virtio.Buffer
	status int64    // where it is
	done   chan int // what the device wrote
	header [headerSize]byte
	// segments are those of its last request, for their memory.
	segments []virtio.Segment
}

const (
	// depth is how many requests there may be at a time, at most.
	depth = 8
	// requestMost is the most bytes of data of a request.
	requestMost = 64 << 10
)

// Open takes the disk at the other end of the link into use. It waits until
// there is one.
func Open(ctx context.Context, dev *ivshmem.Device) (*Disk, error) {
	d, err := virtio.Open(ctx, dev, virtio.DriverConfig{ID: ID,
		Features: featureSizeMax | featureSegMax | featureReadOnly | featureFlush | featureDiscard | featureWriteZeroes})
	if err != nil {
		return nil, err
	}
	disk := &Disk{d: d, reap: make(chan struct{}, 1)}
	if err := disk.setUp(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("virtio disk over %s: %w", dev.Address(), err), d.Close())
	}
	return disk, nil
}

func (d *Disk) setUp(ctx context.Context) error {
	space := make([]byte, min(d.d.ConfigSize(), configSize))
	if err := d.d.ReadConfig(ctx, space, 0); err != nil {
		return err
	}
	space = append(space, make([]byte, configSize)...) // what is missing is 0
	le := binary.LittleEndian
	capacity := le.Uint64(space[configCapacity:])
	if capacity > 1<<54 {
		return &virtio.ViolationError{Queue: -1, Field: "capacity", Value: capacity, Bound: "at most 2^54 sectors"}
	}
	d.size = int64(capacity) * SectorSize
	d.most, d.part = requestMost, requestMost
	if d.d.Features().Has(featureSizeMax) {
		most := le.Uint32(space[configSizeMax:]) &^ (SectorSize - 1)
		if most == 0 {
			return &virtio.ViolationError{Queue: -1, Field: "size_max", Value: uint64(le.Uint32(space[configSizeMax:])), Bound: "a sector or more"}
		}
		d.part = int(min(uint32(d.part), most))
		segments := uint32(1)
		if d.d.Features().Has(featureSegMax) {
			segments = max(1, le.Uint32(space[configSegMax:]))
		}
		d.most = int(min(uint64(d.most), uint64(segments)*uint64(d.part)))
	}
	var err error
	if d.q, err = d.d.SetUpQueue(ctx, 0, 4*depth); err != nil {
		return err
	}
	if err := d.memory(); err != nil {
		return err
	}
	return d.d.Start(ctx)
}

// memory takes memory for requests: as many as there is room for, or smaller
// ones.
func (d *Disk) memory() error {
	// Each needs a header and a status besides its data; without indirect
	// descriptors, all of them entries of the queue.
	if most := d.part * max(1, d.q.Size()-2); d.most > most {
		d.most = most
	}
	need := 1
	// The table of a buffer has room for segments of a page or more.
	if !d.d.Features().Has(virtio.IndirectDesc) || d.part < pageSize {
		need = 2 + (d.most+d.part-1)/d.part
	}
	most := max(1, min(depth, d.q.Size()/need))
	d.idle = make(chan *slot, most)
	for len(d.all) < most {
		buf, err := d.d.Alloc(headerSize + d.most + 1)
		if err == nil {
			d.all = append(d.all, &slot{buf: buf, status: int64(headerSize + d.most), done: make(chan int, 1)})
			continue
		}
		if len(d.all) > 0 {
			break
		}
		if d.most /= 2; d.most < SectorSize {
			return err
		}
		d.most &^= SectorSize - 1
	}
	for _, s := range d.all {
		d.idle <- s
	}
	return nil
}

// Size is the size in bytes, a multiple of [SectorSize].
func (d *Disk) Size() int64 { return d.size }

// ReadOnly reports whether the disk must not be written.
func (d *Disk) ReadOnly() bool { return d.d.Features().Has(featureReadOnly) }

// ReadAt reads at any offset, from whole sectors.
func (d *Disk) ReadAt(p []byte, offset int64) (int, error) {
	if offset < 0 {
		return 0, fmt.Errorf("virtio disk: offset %d", offset)
	}
	done := 0
	for done < len(p) {
		at := offset + int64(done)
		if at >= d.size {
			return done, io.EOF
		}
		skip := int(at % SectorSize)
		n := min(len(p)-done, d.most-skip)
		whole := (skip + n + SectorSize - 1) &^ (SectorSize - 1)
		if rest := d.size - (at - int64(skip)); int64(whole) > rest {
			whole = int(rest)
			n = min(n, whole-skip)
		}
		if err := d.do(requestIn, at/SectorSize, nil, whole, func(s *slot) error {
			_, err := s.buf.ReadAt(p[done:done+n], int64(headerSize+skip))
			return err
		}); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// WriteAt writes at any offset. Sectors that it does not write as a whole it
// reads first, while nobody else writes. What was written is on stable storage
// after Flush.
func (d *Disk) WriteAt(p []byte, offset int64) (int, error) {
	if err := d.writable(offset, int64(len(p))); err != nil {
		return 0, err
	}
	before, after := int(offset%SectorSize), int(-(offset+int64(len(p)))&(SectorSize-1))
	if before == 0 && after == 0 {
		d.edges.RLock()
		defer d.edges.RUnlock()
		return d.write(p, offset)
	}
	d.edges.Lock()
	defer d.edges.Unlock()
	whole := make([]byte, before+len(p)+after)
	start, last := offset-int64(before), len(whole)-SectorSize
	if _, err := d.ReadAt(whole[:SectorSize], start); err != nil {
		return 0, err
	}
	if last > 0 {
		if _, err := d.ReadAt(whole[last:], start+int64(last)); err != nil {
			return 0, err
		}
	}
	copy(whole[before:], p)
	n, err := d.write(whole, start)
	return min(max(n-before, 0), len(p)), err
}

// write writes whole sectors.
func (d *Disk) write(p []byte, offset int64) (int, error) {
	for done := 0; done < len(p); {
		n := min(len(p)-done, d.most)
		if err := d.do(requestOut, (offset+int64(done))/SectorSize, p[done:done+n], 0, nil); err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

// writable checks a range that is to be changed.
func (d *Disk) writable(offset, n int64) error {
	switch {
	case d.ReadOnly():
		return ErrReadOnly
	case offset < 0 || n < 0 || offset > d.size || n > d.size-offset:
		return fmt.Errorf("virtio disk of %d bytes: expected an access inside, found %d bytes at %d", d.size, n, offset)
	}
	return nil
}

// Flush returns when all that was written before is on stable storage.
func (d *Disk) Flush() error {
	if !d.d.Features().Has(featureFlush) {
		return nil // it is as soon as it is written
	}
	return d.do(requestFlush, 0, nil, 0, nil)
}

// CanZero reports whether the device can do Zero.
func (d *Disk) CanZero() bool { return d.d.Features().Has(featureWriteZeroes) }

// CanDiscard reports whether the device can do Discard.
func (d *Disk) CanDiscard() bool { return d.d.Features().Has(featureDiscard) }

// Zero makes a range of whole sectors zeros, whose space may be given up if
// unmap says so. It fails with [ErrUnsupported] where the device cannot.
func (d *Disk) Zero(offset, n int64, unmap bool) error {
	flags := uint32(0)
	if unmap {
		flags = rangeUnmap
	}
	return d.ranges(requestWriteZeroes, featureWriteZeroes, zeroesMost, flags, offset, n)
}

// Discard says that nobody wants a range of whole sectors any more. It fails
// with [ErrUnsupported] where the device cannot.
func (d *Disk) Discard(offset, n int64) error {
	return d.ranges(requestDiscard, featureDiscard, discardMost, 0, offset, n)
}

func (d *Disk) ranges(request uint32, feature virtio.Features, most int64, flags uint32, offset, n int64) error {
	if err := d.writable(offset, n); err != nil {
		return err
	}
	switch {
	case offset%SectorSize != 0 || n%SectorSize != 0:
		return fmt.Errorf("virtio disk: expected whole sectors of %d bytes, found %d bytes at %d", SectorSize, n, offset)
	case !d.d.Features().Has(feature):
		return ErrUnsupported
	}
	d.edges.RLock()
	defer d.edges.RUnlock()
	for n > 0 {
		sectors := min(n/SectorSize, most)
		var r [rangeSize]byte
		le := binary.LittleEndian
		le.PutUint64(r[:], uint64(offset/SectorSize))
		le.PutUint32(r[8:], uint32(sectors))
		le.PutUint32(r[12:], flags)
		if err := d.do(request, 0, r[:], 0, nil); err != nil {
			return err
		}
		offset, n = offset+sectors*SectorSize, n-sectors*SectorSize
	}
	return nil
}

// Serial is what the disk calls itself, up to 20 bytes.
func (d *Disk) Serial() (string, error) {
	var p [serialSize]byte
	err := d.do(requestGetID, 0, nil, serialSize, func(s *slot) error {
		_, err := s.buf.ReadAt(p[:], headerSize)
		return err
	})
	return strings.TrimRight(string(p[:]), "\x00"), err
}

// do does a request with data for the device, or room for data of it.
func (d *Disk) do(request uint32, sector int64, out []byte, in int, take func(*slot) error) error {
	s := <-d.idle
	defer func() { d.idle <- s }()
	binary.LittleEndian.PutUint32(s.header[:], request)
	binary.LittleEndian.PutUint64(s.header[8:], uint64(sector))
	if _, err := s.buf.WriteAt(s.header[:], 0); err != nil {
		return err
	}
	segments := append(s.segments[:0], virtio.Out(0, headerSize))
	if len(out) > 0 {
		if _, err := s.buf.WriteAt(out, headerSize); err != nil {
			return err
		}
		for at := 0; at < len(out); at += d.part {
			segments = append(segments, virtio.Out(headerSize+at, min(d.part, len(out)-at)))
		}
	} else {
		for at := 0; at < in; at += d.part {
			segments = append(segments, virtio.In(headerSize+at, min(d.part, in-at)))
		}
	}
	segments = append(segments, virtio.In(int(s.status), 1))
	s.segments = segments
	if err := d.q.Add(s.buf, segments...); err != nil {
		return err
	}
	if err := d.q.Kick(); err != nil {
		return err
	}
	written, err := d.await(s)
	if err != nil {
		return err
	}
	var status [1]byte
	if _, err := s.buf.ReadAt(status[:], s.status); err != nil {
		return err
	}
	switch {
	case written == 0 || status[0] != statusOK && status[0] != statusUnsupported:
		return ErrIO
	case status[0] == statusUnsupported:
		return ErrUnsupported
	case take != nil:
		return take(s)
	}
	return nil
}

// await waits until the device is done with a request. One who waits takes what
// is used for all of them.
func (d *Disk) await(s *slot) (written int, err error) {
	for {
		select {
		case n := <-s.done:
			return n, nil
		case d.reap <- struct{}{}:
		}
		n, done, err := d.take(s)
		<-d.reap
		if done || err != nil {
			return n, err
		}
	}
}

// take takes what is used until it is of a slot.
func (d *Disk) take(own *slot) (written int, done bool, err error) {
	for {
		select {
		case n := <-own.done:
			return n, true, nil
		default:
		}
		buf, n, err := d.q.Next(context.Background())
		if err != nil {
			return 0, false, err
		}
		for _, s := range d.all {
			if s.buf == buf {
				s.done <- n
			}
		}
	}
}

// Close gives the disk up. What was written and not flushed may be lost with the
// machine of the back-end only. The ivshmem device stays open.
func (d *Disk) Close() error { return d.d.Close() }
