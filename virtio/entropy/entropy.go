// Package entropy is the virtio entropy device (virtio specification, "Entropy
// Device"): a source of random bytes for the guest at the other end of a link
// of protocol type 8004h, which Linux shows as /dev/hwrng; and a driver of one.
package entropy

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// ID is the virtio device ID.
const ID = 4

const (
	// entries is how many requests the queue holds. Linux has one at a time.
	entries = 8
	// most is how many bytes one request gets at most, however many it asks
	// for.
	most = 64 << 10
)

// Device is a device that gives random bytes of a source; nil is the
// operating system's, crypto/rand.
func Device(source io.Reader) virtio.Device {
	if source == nil {
		source = rand.Reader
	}
	return virtio.Device{ID: ID, Queues: []int{entries}, Run: func(ctx context.Context, s *virtio.Session) error {
		return serve(ctx, s.Queue(0), source)
	}}
}

func serve(ctx context.Context, q *virtio.Queue, source io.Reader) error {
	var p [4096]byte
	for {
		c, err := q.Next(ctx)
		if err != nil {
			return err
		}
		written := 0
		for want := min(c.Writable(), most); written < want; {
			n := min(want-written, len(p))
			if n, err = io.ReadAtLeast(source, p[:n], 1); err != nil {
				return fmt.Errorf("source of random bytes: %w", err)
			}
			if _, err = c.Write(p[:n]); err != nil {
				return err
			}
			written += n
		}
		if err := q.Push(c, written); err != nil {
			return err
		}
	}
}

// Source is a driver of an entropy device. It implements [io.Reader]; reads of
// several goroutines take turns.
type Source struct {
	d *virtio.Driver
	q *virtio.DriverQueue

	mu  sync.Mutex
	buf *virtio.Buffer
}

// request is how many bytes a request asks for.
const request = 4096

// Open takes the entropy device at the other end of a link into use. It waits
// until there is one.
func Open(ctx context.Context, dev *ivshmem.Device) (*Source, error) {
	d, err := virtio.Open(ctx, dev, virtio.DriverConfig{ID: ID})
	if err != nil {
		return nil, err
	}
	s := &Source{d: d}
	if s.q, err = d.SetUpQueue(ctx, 0, 1); err == nil {
		if s.buf, err = d.Alloc(request); err == nil {
			err = d.Start(ctx)
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Read fills p with random bytes, up to 4096, and waits for at least one. It
// fails with [virtio.ErrBackEndGone], [virtio.ErrNeedsReset], a
// *[virtio.ViolationError], or [os.ErrClosed] after Close.
func (s *Source) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		n := min(len(p), request)
		if err := s.q.Add(s.buf, virtio.In(0, n)); err != nil {
			return 0, err
		}
		if err := s.q.Kick(); err != nil {
			return 0, err
		}
		buf, n, err := s.q.Next(context.Background())
		if err != nil {
			return 0, err
		}
		if n > 0 {
			return buf.ReadAt(p[:n], 0)
		}
	}
}

// Close gives the device up. The ivshmem device stays open.
func (s *Source) Close() error { return s.d.Close() }
