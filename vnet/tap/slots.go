package tap

import (
	"context"
	"errors"
	"io"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// slots is where frames are on their way: in the sections themselves, or, where
// those are memory that the kernel must not copy to and from, in buffers.
type slots struct {
	link    *vnet.Link
	buffers [][]byte // nil: in the sections
}

func slotsOf(link *vnet.Link) *slots {
	s := &slots{link: link}
	if !link.Device().PlainMemory() {
		for range maxFrames {
			s.buffers = append(s.buffers, make([]byte, vnet.MaxFrame))
		}
	}
	return s
}

// reserve fills in room for frames.
func (s *slots) reserve(ctx context.Context, frames [][]byte) (int, error) {
	if s.buffers == nil {
		return s.link.UnsafeReserveAll(ctx, frames)
	}
	if !s.link.Carrier() {
		return 0, vnet.ErrNoCarrier
	}
	for i := range frames {
		frames[i] = s.buffers[i][:s.link.MTU()+18]
	}
	return len(frames), nil
}

// commit sends the frames that have lengths.
func (s *slots) commit(ctx context.Context, frames [][]byte, lengths []int) error {
	if s.buffers == nil {
		return s.link.UnsafeCommitAll(lengths)
	}
	for i, n := range lengths {
		frames[i] = frames[i][:n]
	}
	_, err := s.link.SendAll(ctx, frames)
	return err
}

var ended = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// peek waits for frames.
func (s *slots) peek(ctx context.Context, frames [][]byte) (n int, err error) {
	if s.buffers == nil {
		return s.link.UnsafePeekAll(ctx, frames)
	}
	for n < len(frames) {
		m, err := s.link.Receive(ctx, s.buffers[n])
		switch {
		case err == nil:
			frames[n] = s.buffers[n][:m]
			n++
			ctx = ended // what is there besides
		case n > 0 && (errors.Is(err, context.Canceled) || recovers(err)):
			return n, nil
		case errors.Is(err, io.ErrShortBuffer):
		default:
			return n, err
		}
	}
	return n, nil
}

// release gives them back.
func (s *slots) release(n int) error {
	if s.buffers == nil {
		return s.link.UnsafeReleaseAll(n)
	}
	return nil
}
