package block_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/block"
)

// server is back-ends that come and go.
type server struct {
	*testing.T
	dev    *ivshmem.Device
	path   string
	cancel context.CancelFunc
	served chan error
}

func (s *server) start(c block.Config) {
	s.Helper()
	f, err := block.OpenFile(s.path, c.ReadOnly)
	if err != nil {
		s.Fatal(err)
	}
	d, err := block.Device(s.dev, f, c)
	if err != nil {
		s.Fatal(err)
	}
	b, err := virtio.NewBackEnd(s.dev, d)
	if err != nil {
		s.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel, s.served = cancel, make(chan error, 1)
	go func() {
		err := b.Serve(ctx)
		f.Close()
		s.served <- err
	}()
}

func (s *server) stop() {
	s.Helper()
	s.cancel()
	if err := <-s.served; err != nil {
		s.Error(err)
	}
}

func attach(t *testing.T, c block.Config) (*server, *block.Attachment, *atomic.Int32) {
	t.Helper()
	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8002, ReadWrite: 256 << 10})
	s := &server{T: t, dev: peers[0], path: newImage(t, 1<<20)}
	s.start(c)
	back := new(atomic.Int32)
	ctx, cancel := context.WithCancel(context.Background())
	a, err := block.Attach(ctx, peers[1], func(err error) {
		if err == nil {
			back.Add(1)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); a.Close() })
	return s, a, back
}

// Nobody who uses the disk notices that its back-ends come and go.
func TestAttachment(t *testing.T) {
	t.Parallel()
	s, a, back := attach(t, block.Config{Serial: "A1"})
	if a.Serial() != "A1" || a.Size() != 1<<20 || a.ReadOnly() || !a.CanDiscard() || !a.CanZero() {
		t.Errorf("%+v", a)
	}
	var group sync.WaitGroup
	end := make(chan struct{})
	var accesses atomic.Int64
	for i := range 6 {
		group.Go(func() {
			const size = 20_000
			for round := byte(0); ; round++ {
				select {
				case <-end:
					return
				default:
				}
				want, got := bytes.Repeat([]byte{round}, size), make([]byte, size)
				if n, err := a.WriteAt(want, int64(i)*size); n != size || err != nil {
					t.Errorf("write: %d, %v", n, err)
					return
				}
				if err := a.Flush(); err != nil {
					t.Error(err)
					return
				}
				if n, err := a.ReadAt(got, int64(i)*size); n != size || err != nil || !bytes.Equal(got, want) {
					t.Errorf("read: %d, %v", n, err)
					return
				}
				accesses.Add(1)
			}
		})
	}
	for range 15 {
		for before := accesses.Load(); accesses.Load() < before+5 && !t.Failed(); {
			runtime.Gosched()
		}
		s.stop()
		s.start(block.Config{Serial: "A1"})
	}
	close(end)
	group.Wait()
	if back.Load() < 10 {
		t.Errorf("the back-end came back %d times", back.Load())
	}
	if err := errors.Join(a.Zero(0, 512, true), a.Discard(512, 512)); err != nil {
		t.Error(err)
	}
	a.Close()
	if err := a.Flush(); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	s.stop()
}

// Another disk in its place is not used.
func TestAttachmentChanged(t *testing.T) {
	t.Parallel()
	for _, other := range []struct {
		name string
		size int
		c    block.Config
	}{{"serial number", 1 << 20, block.Config{Serial: "A2"}}, {"size", 512, block.Config{Serial: "A1"}}, {"read-only", 1 << 20, block.Config{Serial: "A1", ReadOnly: true}}} {
		s, a, _ := attach(t, block.Config{Serial: "A1"})
		s.stop()
		s.path = newImage(t, other.size)
		s.start(other.c)
		for range 2 {
			if _, err := a.ReadAt(make([]byte, 512), 0); !errors.Is(err, block.ErrChanged) {
				t.Errorf("%s: %v", other.name, err)
			}
		}
		s.stop()
	}
}

// When nobody comes back, the end of the context ends who waits.
func TestAttachmentEnds(t *testing.T) {
	t.Parallel()
	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8002, ReadWrite: 64 << 10})
	s := &server{T: t, dev: peers[0], path: newImage(t, 1<<20)}
	s.start(block.Config{})
	ctx, cancel := context.WithCancel(context.Background())
	gone := make(chan struct{}, 1)
	a, err := block.Attach(ctx, peers[1], func(error) { gone <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	s.stop()
	ended := make(chan error)
	go func() { ended <- a.Flush() }()
	<-gone
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// fickle is a disk of a sector of zeros, from the virtio specification, that
// does not do all requests.
type fickle struct {
	dev *ivshmem.Device
	// does decides on a request by its type.
	does func(request uint32) verdict
}

type verdict int

const (
	done verdict = iota
	needsReset
	silent
)

func (f *fickle) run(ctx context.Context, s *virtio.Session) error {
	q := s.Queue(0)
	for {
		c, err := q.Next(ctx)
		if err != nil {
			return err
		}
		var h [4]byte
		if _, err := c.ReadAt(h[:], 0); err != nil {
			return err
		}
		switch f.does(binary.LittleEndian.Uint32(h[:])) {
		case done:
			if _, err := c.Write(make([]byte, c.Writable())); err != nil {
				return err
			}
			if err := q.Push(c, c.Writable()); err != nil {
				return err
			}
		case needsReset:
			rw := f.dev.Sections().ReadWrite
			rw.Store32(0x44, 0x4f) // device_status
			rw.Store8(0x40, 1)     // config_event
			if err := f.dev.Ring(1, 0); err != nil {
				return err
			}
		}
	}
}

// serveFickle serves a disk and returns the front-end's device.
func serveFickle(t *testing.T, does func(uint32) verdict) *ivshmem.Device {
	t.Helper()
	peers := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8002, ReadWrite: 256 << 10})
	f := &fickle{dev: peers[0], does: does}
	config := make([]byte, 8)
	config[0] = 1 // capacity
	b, err := virtio.NewBackEnd(peers[0], virtio.Device{ID: 2, Queues: []int{32}, Config: config, Run: f.run})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, b)
	return peers[1]
}

const getID = 8 // VIRTIO_BLK_T_GET_ID

// A disk that asks for a reset is opened again, also when it is asked what it
// is.
func TestAttachmentReset(t *testing.T) {
	t.Parallel()
	var requests atomic.Int32
	dev := serveFickle(t, func(uint32) verdict {
		if requests.Add(1) <= 3 {
			return needsReset
		}
		return done
	})
	a, err := block.Attach(t.Context(), dev, func(err error) { t.Errorf("told %v", err) })
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := a.ReadAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

// A disk that asks for a reset at each access is opened again and again, but not
// without a pause; what it does is told once.
func TestAttachmentResets(t *testing.T) {
	t.Parallel()
	var tries atomic.Int32
	const most = 10
	dev := serveFickle(t, func(request uint32) verdict {
		if request != getID && tries.Add(1) <= most {
			return needsReset
		}
		return done
	})
	var told []error
	a, err := block.Attach(t.Context(), dev, func(err error) { told = append(told, err) })
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for range 2 {
		start := time.Now()
		told = nil
		if _, err := a.ReadAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		if len(told) != 2 || !errors.Is(told[0], virtio.ErrNeedsReset) || told[1] != nil {
			t.Errorf("told %v", told)
		}
		// The sum of 1 to 64 ms, each twice the one before, and 100 ms.
		if took := time.Since(start); took < 427*time.Millisecond {
			t.Errorf("%d tries in %v", most, took)
		}
		tries.Store(0)
	}
}

// The end of the context ends who waits for a disk that is there, and does not
// say what it is.
func TestAttachmentSilent(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	dev := serveFickle(t, func(uint32) verdict {
		cancel()
		return silent
	})
	if _, err := block.Attach(ctx, dev, func(error) {}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
