package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
)

// member is a peer of a link, whatever kind it is of.
type member interface {
	ID() uint32
	// Known is how many peers can be rung, itself included.
	Known() int
	SetState(v uint32) error
	State(peer uint32) (uint32, error)
	Ring(peer uint32, vector int) error
	// Interrupts is how many came on a vector.
	Interrupts(vector int) uint64
	// Wait returns when ready holds; it is asked at first, and after each
	// interrupt, and at no other time.
	Wait(ctx context.Context, vectors []int, ready func() bool) error
	// word is a 64-bit word of the R/W section.
	word(offset uint64) (load func() (uint64, error), store func(uint64) error)
	Close() error
}

// open opens a device; a socket of the ivshmem2 protocol if told so.
func openMember(device string, ivshmem2 bool) (member, error) {
	if !ivshmem2 {
		d, err := ivshmem.Open(device, ivshmem.WithSleep(ivshmem.SleepPoller))
		if err != nil {
			return nil, err
		}
		return pciMember{d}, nil
	}
	c, err := ivshmemtest.DialIvshmem2(device)
	if err != nil {
		return nil, err
	}
	if err := c.Setup(); err != nil {
		c.Close()
		return nil, err
	}
	return &socketMember{Ivshmem2: c, counts: make([]uint64, c.Vectors)}, nil
}

// pciMember is a device: in a guest, or of a host process.
type pciMember struct{ *ivshmem.Device }

func (m pciMember) Known() int { return int(m.MaxPeers()) }

func (m pciMember) word(offset uint64) (load func() (uint64, error), store func(uint64) error) {
	s := m.Sections().ReadWrite
	return func() (uint64, error) { return s.Load64(offset) }, func(v uint64) error { return s.Store64(offset, v) }
}

// socketMember is a client of the ivshmem2 socket.
type socketMember struct {
	*ivshmemtest.Ivshmem2
	counts []uint64
}

func (m *socketMember) ID() uint32                        { return m.Ivshmem2.ID }
func (m *socketMember) Known() int                        { return len(m.Eventfds) }
func (m *socketMember) State(peer uint32) (uint32, error) { return m.Ivshmem2.State(peer), nil }
func (m *socketMember) Interrupts(vector int) uint64      { return m.counts[vector] }
func (m *socketMember) Close() error                      { m.Ivshmem2.Close(); return nil }

func (m *socketMember) Ring(peer uint32, vector int) error {
	return m.Ivshmem2.Ring(peer, uint32(vector))
}

func (m *socketMember) word(offset uint64) (load func() (uint64, error), store func(uint64) error) {
	const readWrite = 4096 // behind the State Table
	p := (*uint64)(unsafe.Pointer(&m.Memory[readWrite+offset]))
	return func() (uint64, error) { return atomic.LoadUint64(p), nil },
		func(v uint64) error { atomic.StoreUint64(p, v); return nil }
}

// Wait has all messages of the server read, and all eventfds, before each time
// that it asks.
func (m *socketMember) Wait(ctx context.Context, _ []int, ready func() bool) error {
	for {
		for {
			if _, err := m.Next(0); errors.Is(err, unix.EAGAIN) {
				break
			} else if err != nil {
				return err
			}
		}
		for v := range m.counts {
			n, err := m.Take(uint32(v))
			if err != nil {
				return err
			}
			m.counts[v] += n
		}
		if ready() {
			return nil
		}
		p := []unix.PollFd{{Fd: int32(m.Socket()), Events: unix.POLLIN}}
		for _, fd := range m.Eventfds[m.ID()] {
			p = append(p, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		}
		const look = 100 // milliseconds: whether the context has ended
		for {
			n, err := unix.Poll(p, look)
			if err != nil && err != unix.EINTR {
				return err
			}
			if n > 0 {
				break
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
}

// everybody waits until the states of all peers are as they should be, told by
// interrupts. What was right once is not looked at again.
func everybody(ctx context.Context, m member, peers uint32, want func(id uint32) uint32) error {
	next := uint32(0)
	var last uint32
	var failed error
	err := m.Wait(ctx, nil, func() bool {
		for ; next < peers; next++ {
			if last, failed = m.State(next); failed != nil {
				return true
			}
			if last != want(next) {
				return false
			}
		}
		return true
	})
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("peer %d: state of peer %d is %d, expected %d: %w", m.ID(), next, last, want(next), err)
	}
	return nil
}

// acquainted waits until a member can ring everybody: what is rung before is
// for those that it knows.
func acquainted(ctx context.Context, m member, peers uint32) error {
	if s, ok := m.(*socketMember); ok {
		return s.Wait(ctx, nil, func() bool {
			if len(s.Eventfds) < int(peers) {
				return false
			}
			for _, fds := range s.Eventfds {
				if len(fds) < int(s.Vectors) {
					return false
				}
			}
			return true
		})
	}
	return nil
}

// MixedResult is what one peer of the campaign mixed saw.
type MixedResult struct {
	ID uint32 `json:"id"`
	// Rung is, by the ID of who rang, a bit for each vector that arrived, and
	// arrived once.
	Rung []uint64 `json:"rung"`
	// States is how often it saw the right states of everybody.
	States int `json:"states"`
}

// mixed plays one peer of the campaign: all see each other's states; in turns,
// each rings every vector of every other; and all see each other's states
// again. In the turns nobody changes a state, so that each interrupt is a
// doorbell; who is how far, is in the R/W section.
func mixed(ctx context.Context, args []string) (any, error) {
	f := flags("mixed")
	device := f.String("device", "", "PCI address or socket path")
	ivshmem2 := f.Bool("ivshmem2", false, "the socket is of that protocol")
	peers := f.Uint("peers", 0, "of the link; all have to come")
	vectors := f.Int("vectors", 0, "of the link")
	limit := f.Duration("limit", 2*time.Minute, "for each step")
	round := f.Uint64("round", 0, "of the same link, counted from 0")
	mute := f.Bool("mute", false, "do not ring the last vector")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	n := uint32(*peers)
	m, err := openMember(*device, *ivshmem2)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	r := &MixedResult{ID: m.ID(), Rung: make([]uint64, n)}
	step := func(f func(ctx context.Context) error) error {
		limited, cancel := context.WithTimeout(ctx, *limit)
		defer cancel()
		return f(limited)
	}
	// all waits until all have come as far in the turns.
	base := *round * 1000
	all := func(ctx context.Context, far uint64) error {
		for id := range n {
			load, _ := m.word(64 * uint64(id))
			for {
				at, err := load()
				if err != nil {
					return err
				}
				if at >= base+far {
					break
				}
				if ctx.Err() != nil {
					return fmt.Errorf("peer %d waits for peer %d, which is at %d, to come to %d: %w", m.ID(), id, at, base+far, ctx.Err())
				}
				time.Sleep(time.Millisecond)
			}
		}
		return nil
	}
	_, store := m.word(64 * uint64(m.ID()))
	come := func(far uint64) error { return store(base + far) }
	states := func(base uint32) error {
		return step(func(ctx context.Context) error {
			if err := m.SetState(base + m.ID()); err != nil {
				return err
			}
			err := everybody(ctx, m, n, func(id uint32) uint32 { return base + id })
			if err == nil {
				r.States++
			}
			return err
		})
	}
	if err := step(func(ctx context.Context) error { return acquainted(ctx, m, n) }); err != nil {
		return r, err
	}
	if err := states(100); err != nil {
		return r, err
	}
	if err := step(func(ctx context.Context) error {
		// When all have seen all states, the last interrupts of them may still
		// be on their way.
		return errors.Join(come(1), all(ctx, 1), settle(ctx, m))
	}); err != nil {
		return r, err
	}
	rings := *vectors
	if *mute {
		rings--
	}
	before := make([]uint64, *vectors)
	for turn := range n {
		err := step(func(ctx context.Context) error {
			for v := range before {
				before[v] = m.Interrupts(v)
			}
			if err := errors.Join(come(uint64(2*turn+2)), all(ctx, uint64(2*turn+2))); err != nil {
				return err
			}
			if turn == m.ID() {
				return ringAll(m, n, rings)
			}
			err := m.Wait(ctx, nil, func() bool {
				for v, count := range before {
					if m.Interrupts(v) == count {
						return false
					}
				}
				return true
			})
			for v, count := range before {
				if now := m.Interrupts(v); now == count+1 || v == 0 && now > count {
					r.Rung[turn] |= 1 << v
				}
			}
			return err
		})
		if err != nil {
			return r, fmt.Errorf("turn of peer %d: peer %d: %w", turn, m.ID(), err)
		}
		if err := step(func(ctx context.Context) error {
			return errors.Join(come(uint64(2*turn+3)), all(ctx, uint64(2*turn+3)))
		}); err != nil {
			return r, err
		}
	}
	if err := states(200); err != nil {
		return r, err
	}
	// Its end is a state change, too: it waits until nobody counts any more.
	end := uint64(2*n + 2)
	return r, step(func(ctx context.Context) error { return errors.Join(come(end), all(ctx, end)) })
}

// settle takes the interrupts of state changes that are on their way: those that
// a member sends itself on another vector, one after the other, come behind.
func settle(ctx context.Context, m member) error {
	for range 2 {
		before := m.Interrupts(1)
		if err := m.Ring(m.ID(), 1); err != nil {
			return err
		}
		if err := m.Wait(ctx, nil, func() bool { return m.Interrupts(1) > before }); err != nil {
			return err
		}
	}
	return nil
}

func ringAll(m member, peers uint32, vectors int) error {
	for id := range peers {
		if id == m.ID() {
			continue
		}
		for v := range vectors {
			if err := m.Ring(id, v); err != nil {
				return err
			}
		}
	}
	return nil
}

func flags(name string) *flag.FlagSet { return flag.NewFlagSet(name, flag.ContinueOnError) }

func newRandom(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }
