package block

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// ErrChanged says that a disk is not the one that it was.
var ErrChanged = errors.New("another disk")

// Attachment is a [Disk] that outlives those who serve it: when the back-end is
// gone, accesses wait for the next one, and what was not answered is done
// again. It has to serve the same image, by size and serial number, or
// everything fails with [ErrChanged] from then on; and an image that has kept
// what was written to it, flushed or not, as a file does whose back-end dies, and
// whose machine does not.
type Attachment struct {
	ctx  context.Context
	dev  *ivshmem.Device
	told func(error)
	identity

	mu    sync.RWMutex
	disk  *Disk         // never nil
	err   error         // why there is none any more
	pause time.Duration // before it was opened; 0 once an access was done
}

// identity is what a disk is known by.
type identity struct {
	size              int64
	serial            string
	readOnly          bool
	zeroes, discardes bool
}

func identify(d *Disk) (i identity, err error) {
	i = identity{size: d.Size(), readOnly: d.ReadOnly(), zeroes: d.CanZero(), discardes: d.CanDiscard()}
	i.serial, err = d.Serial()
	if errors.Is(err, ErrUnsupported) || errors.Is(err, ErrIO) {
		err = nil
	}
	return i, err
}

// Attach takes the disk at the other end of the link into use, and waits until
// there is one. Whenever its back-end is gone it tells why; and nil when there
// is one again that does what it is asked to. When the context ends, accesses
// that wait for a back-end fail, and so does what would have to.
func Attach(ctx context.Context, dev *ivshmem.Device, told func(error)) (*Attachment, error) {
	a := &Attachment{ctx: ctx, dev: dev, told: told}
	var err error
	a.disk, a.identity, err = a.open()
	if err != nil {
		return nil, err
	}
	a.pause = 0
	return a, nil
}

// open opens a disk whose back-end stays for long enough to say what it is.
func (a *Attachment) open() (*Disk, identity, error) {
	for {
		d, i, err := a.try()
		if !passes(err) {
			return d, i, err
		}
		if err := a.wait(); err != nil {
			return nil, identity{}, err
		}
	}
}

// try opens a disk and asks it what it is.
func (a *Attachment) try() (*Disk, identity, error) {
	d, err := Open(a.ctx, a.dev)
	if err != nil {
		return nil, identity{}, err
	}
	// It may never answer.
	stop := context.AfterFunc(a.ctx, func() { d.Close() })
	i, err := identify(d)
	stop()
	if a.ctx.Err() != nil {
		err = context.Cause(a.ctx)
	}
	if err != nil {
		d.Close()
		return nil, identity{}, err
	}
	return d, i, nil
}

const (
	shortestPause = time.Millisecond
	longestPause  = 100 * time.Millisecond
)

// wait waits before a disk is opened once more, for longer each time until an
// access is done. It fails when the context ends. Only one at a time calls it.
func (a *Attachment) wait() error {
	a.pause = min(max(2*a.pause, shortestPause), longestPause)
	select {
	case <-time.After(a.pause):
	case <-a.ctx.Done():
	}
	return context.Cause(a.ctx)
}

// passes reports whether another back-end may help.
func passes(err error) bool {
	return errors.Is(err, virtio.ErrBackEndGone) || errors.Is(err, virtio.ErrNeedsReset)
}

// do does something with the disk until it is done.
func (a *Attachment) do(f func(*Disk) error) error {
	for {
		a.mu.RLock()
		d, err, again := a.disk, a.err, a.pause > 0
		a.mu.RUnlock()
		if err != nil {
			return err
		}
		// What somebody else has closed, who came first, is gone as well.
		if err = f(d); !passes(err) && !errors.Is(err, os.ErrClosed) {
			if again {
				a.works(d)
			}
			return err
		}
		if err := a.again(d, err); err != nil {
			return err
		}
	}
}

// again replaces a disk whose back-end is gone.
func (a *Attachment) again(old *Disk, why error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil || a.disk != old {
		return a.err
	}
	old.Close()
	if a.pause == 0 {
		a.told(why)
	}
	var d *Disk
	var i identity
	err := a.wait()
	if err == nil {
		d, i, err = a.open()
	}
	if err == nil && i != a.identity {
		d.Close()
		err = fmt.Errorf("%w: expected serial number %q, %d bytes, read-only %v; found %q, %d bytes, read-only %v",
			ErrChanged, a.serial, a.size, a.readOnly, i.serial, i.size, i.readOnly)
	}
	if err != nil {
		a.err = err
		return err
	}
	a.disk = d
	return nil
}

// works takes note that a disk that was opened once more does accesses.
func (a *Attachment) works(d *Disk) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.disk == d && a.pause > 0 {
		a.pause = 0
		a.told(nil)
	}
}

// Size is the size in bytes.
func (a *Attachment) Size() int64 { return a.size }

// ReadOnly reports whether the disk must not be written.
func (a *Attachment) ReadOnly() bool { return a.readOnly }

// Serial is what the disk calls itself.
func (a *Attachment) Serial() string { return a.serial }

// CanZero is [Disk.CanZero].
func (a *Attachment) CanZero() bool { return a.zeroes }

// CanDiscard is [Disk.CanDiscard].
func (a *Attachment) CanDiscard() bool { return a.discardes }

// ReadAt is [Disk.ReadAt].
func (a *Attachment) ReadAt(p []byte, offset int64) (n int, err error) {
	err = a.do(func(d *Disk) error { n, err = d.ReadAt(p, offset); return err })
	return n, err
}

// WriteAt is [Disk.WriteAt].
func (a *Attachment) WriteAt(p []byte, offset int64) (n int, err error) {
	err = a.do(func(d *Disk) error { n, err = d.WriteAt(p, offset); return err })
	return n, err
}

// Flush is [Disk.Flush].
func (a *Attachment) Flush() error { return a.do((*Disk).Flush) }

// Zero is [Disk.Zero].
func (a *Attachment) Zero(offset, n int64, unmap bool) error {
	return a.do(func(d *Disk) error { return d.Zero(offset, n, unmap) })
}

// Discard is [Disk.Discard].
func (a *Attachment) Discard(offset, n int64) error {
	return a.do(func(d *Disk) error { return d.Discard(offset, n) })
}

// Close gives the disk up: everything fails with [os.ErrClosed]. The ivshmem
// device stays open. To end who waits for a back-end, end the context before.
func (a *Attachment) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = os.ErrClosed
	}
	return a.disk.Close()
}
