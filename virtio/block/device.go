package block

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// Config of a disk.
type Config struct {
	// ReadOnly refuses what would change the image.
	ReadOnly bool
	// Serial is what the disk calls itself: up to 20 bytes, which Linux shows as
	// /sys/block/vdX/serial.
	Serial string
}

const (
	entries = 32
	// workers is how many requests are worked on at a time.
	workers = 4
	// pageSize is the least that Linux takes as the size of a segment.
	pageSize = 4096
	// pieceSize is how much of a request is copied at a time.
	pieceSize = 64 << 10
)

// disk is a device.
type disk struct {
	image   Image
	sectors uint64
	config  Config
}

// Device is a disk for a link. All data of Linux's requests lies in the link's
// R/W section while they last, so what it is told of the size of requests is so
// that some of them fit. A last sector of the image that is not whole is left
// out.
func Device(dev *ivshmem.Device, image Image, c Config) (virtio.Device, error) {
	if len(c.Serial) > serialSize {
		return virtio.Device{}, fmt.Errorf("serial number %q: expected at most %d bytes", c.Serial, serialSize)
	}
	d := &disk{image: image, sectors: uint64(max(image.Size(), 0)) / SectorSize, config: c}
	segments, size := limits(dev.Sections().Layout.ReadWrite)
	space := make([]byte, configSize)
	le := binary.LittleEndian
	le.PutUint64(space[configCapacity:], d.sectors)
	le.PutUint32(space[configSizeMax:], size)
	le.PutUint32(space[configSegMax:], segments)
	features := featureSizeMax | featureSegMax | featureFlush
	if c.ReadOnly {
		features |= featureReadOnly
	} else {
		features |= featureDiscard | featureWriteZeroes
		le.PutUint32(space[configMaxDiscard:], discardMost)
		le.PutUint32(space[configMaxDiscardSegs:], discardRanges)
		le.PutUint32(space[configDiscardAlign:], 1)
		le.PutUint32(space[configMaxWriteZeroes:], zeroesMost)
		le.PutUint32(space[configMaxWriteZeroesSeg:], zeroesRanges)
		space[configMayUnmap] = 1
	}
	return virtio.Device{ID: ID, Features: features, Queues: []int{entries}, Config: space, Run: d.run}, nil
}

// limits is how many segments of how many bytes a request may have: together a
// 32nd of the section, whose allocator wastes up to half.
func limits(section uint64) (segments, size uint32) {
	total := max(section/32, pageSize)
	total = 1 << (bits.Len64(total) - 1)
	n := min(total/pageSize, entries-2)
	return uint32(n), uint32(min(total/n&^(pageSize-1), 1<<20))
}

// run works on requests until the session ends.
func (d *disk) run(ctx context.Context, s *virtio.Session) error {
	q := s.Queue(0)
	// Who waits for a request works on it; then another waits.
	var next sync.Mutex
	ended := make(chan error)
	for range workers {
		go func() {
			w := &worker{disk: d, through: !s.Features().Has(featureFlush), piece: make([]byte, pieceSize)}
			for {
				next.Lock()
				c, err := q.Next(ctx)
				next.Unlock()
				if err == nil {
					err = q.Push(c, w.serve(c))
				}
				if err != nil {
					ended <- err
					return
				}
			}
		}()
	}
	var err error
	for range workers {
		err = <-ended
	}
	return err
}

// worker works on one request at a time.
type worker struct {
	*disk
	// through says that the driver cannot ask for a flush: what is written is on
	// stable storage before it hears of it.
	through bool
	piece   []byte
}

var (
	errIO          = errors.New("I/O error")
	errUnsupported = errors.New("unsupported request")
)

// serve does what a request says, writes its status, and returns how many bytes
// were written. A session that ends under it shows when the request is
// returned.
func (w *worker) serve(c *virtio.Chain) (written int) {
	if c.Writable() == 0 {
		return 0 // no room to say anything
	}
	last := c.Writable() - 1
	n, err := w.request(c, last)
	status := byte(statusOK)
	switch {
	case errors.Is(err, errUnsupported):
		n, status = 0, statusUnsupported
	case err != nil:
		n, status = 0, statusIOError
	}
	c.WriteAt([]byte{status}, int64(last))
	return n + 1
}

// request does what a request says. Room is the number of bytes for data.
func (w *worker) request(c *virtio.Chain, room int) (written int, err error) {
	var h [headerSize]byte
	if _, err := c.ReadAt(h[:], 0); err != nil {
		return 0, err
	}
	sector := binary.LittleEndian.Uint64(h[8:])
	data := c.Readable() - headerSize
	switch binary.LittleEndian.Uint32(h[:]) {
	case requestIn:
		return room, w.read(c, sector, room)
	case requestOut:
		return 0, w.write(c, sector, data)
	case requestFlush:
		return 0, w.image.Sync()
	case requestGetID:
		var serial [serialSize]byte
		copy(serial[:], w.config.Serial)
		return c.WriteAt(serial[:min(room, serialSize)], 0)
	case requestDiscard:
		return 0, w.ranges(c, data, false)
	case requestWriteZeroes:
		return 0, w.ranges(c, data, true)
	}
	return 0, errUnsupported
}

// place is where n bytes from a sector on are in the image.
func (d *disk) place(sector uint64, n int) (int64, error) {
	if n < 0 || n%SectorSize != 0 || sector > d.sectors || uint64(n)/SectorSize > d.sectors-sector {
		return 0, errIO
	}
	return int64(sector) * SectorSize, nil
}

func (w *worker) read(c *virtio.Chain, sector uint64, n int) error {
	at, err := w.place(sector, n)
	if err != nil {
		return err
	}
	for done := 0; done < n; {
		p := w.piece[:min(n-done, len(w.piece))]
		if _, err := w.image.ReadAt(p, at+int64(done)); err != nil {
			return err
		}
		if _, err := c.WriteAt(p, int64(done)); err != nil {
			return err
		}
		done += len(p)
	}
	return nil
}

func (w *worker) write(c *virtio.Chain, sector uint64, n int) error {
	at, err := w.place(sector, n)
	if err != nil {
		return err
	}
	if w.config.ReadOnly {
		return errIO
	}
	for done := 0; done < n; {
		p := w.piece[:min(n-done, len(w.piece))]
		if _, err := c.ReadAt(p, headerSize+int64(done)); err != nil {
			return err
		}
		if _, err := w.image.WriteAt(p, at+int64(done)); err != nil {
			return err
		}
		done += len(p)
	}
	return w.written()
}

// written makes a change stable if the driver cannot.
func (w *worker) written() error {
	if w.through {
		return w.image.Sync()
	}
	return nil
}

// ranges discards ranges of sectors, or makes them zeros.
func (w *worker) ranges(c *virtio.Chain, n int, zero bool) error {
	most, ranges := uint64(discardMost), discardRanges
	if zero {
		most, ranges = zeroesMost, zeroesRanges
	}
	switch {
	case w.config.ReadOnly:
		return errIO
	case n < rangeSize || n%rangeSize != 0 || n/rangeSize > ranges:
		return errIO
	}
	for i := 0; i < n; i += rangeSize {
		var r [rangeSize]byte
		if _, err := c.ReadAt(r[:], headerSize+int64(i)); err != nil {
			return err
		}
		le := binary.LittleEndian
		sectors, flags := uint64(le.Uint32(r[8:])), le.Uint32(r[12:])
		if flags&^rangeUnmap != 0 || flags != 0 && !zero {
			return errUnsupported
		}
		if sectors > most {
			return errIO
		}
		length := int64(sectors) * SectorSize
		at, err := w.place(le.Uint64(r[:]), int(length))
		if err != nil {
			return err
		}
		if length == 0 {
			continue
		}
		if zero {
			err = w.image.Zero(at, length, flags&rangeUnmap != 0)
		} else {
			err = w.image.Discard(at, length)
		}
		if err != nil {
			return err
		}
	}
	return w.written()
}
