package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// crowd is many peers in one process. Each sets a state, and waits until it
// has seen everybody's.
func crowd(ctx context.Context, args []string) (any, error) {
	f := flags("crowd")
	device := f.String("device", "", "socket path")
	ivshmem2 := f.Bool("ivshmem2", false, "the socket is of that protocol")
	count := f.Int("count", 1, "peers in this process")
	peers := f.Uint("peers", 0, "of the link; all have to come")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	// They stay until the campaign ends the process: a departure would be a
	// state that changes.
	seen := make(chan error, *count)
	for range *count {
		m, err := openMember(*device, *ivshmem2)
		if err != nil {
			return nil, err
		}
		go func() {
			err := acquainted(ctx, m, uint32(*peers))
			if err == nil {
				err = m.SetState(1000 + m.ID())
			}
			if err == nil {
				err = everybody(ctx, m, uint32(*peers), func(id uint32) uint32 { return 1000 + id })
			}
			seen <- err
		}()
	}
	for range *count {
		if err := <-seen; err != nil {
			return nil, err
		}
	}
	fmt.Println(*count)
	<-ctx.Done()
	return nil, ctx.Err()
}

// churn connects, sets states, says nothing, leaves and connects again, at
// random on both sockets, until it is killed. It prints a line for each
// connection that was made.
func churn(ctx context.Context, args []string) (any, error) {
	f := flags("churn")
	vfioUser := f.String("device", "", "vfio-user socket")
	ivshmem2 := f.String("ivshmem2", "", "ivshmem2 socket")
	seed := f.Uint64("seed", 1, "")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	random := newRandom(*seed)
	type held struct{ end func() }
	var here []held
	for ctx.Err() == nil {
		if len(here) > 0 && (len(here) >= 5 || random.IntN(3) == 0) {
			i := random.IntN(len(here))
			here[i].end()
			here = append(here[:i], here[i+1:]...)
			continue
		}
		switch kind := random.IntN(8); kind {
		case 0, 1: // connects, and says nothing
			path := *vfioUser
			if kind == 1 {
				path = *ivshmem2
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				return nil, err
			}
			if random.IntN(2) == 0 { // half a header, which no message begins with
				unix.Write(fd, binary.LittleEndian.AppendUint64(nil, random.Uint64()))
			}
			fmt.Println("silent")
			here = append(here, held{func() { unix.Close(fd) }})
		default:
			device := *vfioUser
			if kind%2 == 0 {
				device = *ivshmem2
			}
			m, err := openMember(device, kind%2 == 0)
			if err != nil {
				return nil, err
			}
			fmt.Println("peer", m.ID())
			if err := m.SetState(random.Uint32()); err != nil {
				return nil, err
			}
			here = append(here, held{func() { m.Close() }})
		}
	}
	return nil, nil
}

// SurviveResult is what those saw who stayed while others came and went.
type SurviveResult struct {
	Changes int `json:"changes"` // of a survivor's state, each seen by all others
	Seen    int `json:"seen"`    // changes times those who saw them
}

// survive is peers of both kinds that stay. One of each kind changes its state
// again and again, and all others have to be woken up to see it. On SIGINT
// they wait until nobody else has a state, and end.
func survive(ctx context.Context, args []string) (any, error) {
	f := flags("survive")
	vfioUser := f.String("device", "", "vfio-user socket")
	ivshmem2 := f.String("ivshmem2", "", "ivshmem2 socket")
	peers := f.Uint("peers", 0, "of the link")
	limit := f.Duration("limit", 30*time.Second, "for each change")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, unix.SIGINT)
	var all []member
	own := map[uint32]bool{}
	for i := range 6 {
		device := *vfioUser
		if i%2 == 1 {
			device = *ivshmem2
		}
		m, err := openMember(device, i%2 == 1)
		if err != nil {
			return nil, err
		}
		all = append(all, m)
		own[m.ID()] = true
	}
	each := func(f func(ctx context.Context, m member) error) error {
		limited, cancel := context.WithTimeout(ctx, *limit)
		defer cancel()
		ended := make(chan error)
		for _, m := range all {
			go func() { ended <- f(limited, m) }()
		}
		var err error
		for range all {
			err = errors.Join(err, <-ended)
		}
		return err
	}
	if err := each(func(ctx context.Context, m member) error {
		s, ok := m.(*socketMember)
		if !ok {
			return nil
		}
		return s.Wait(ctx, nil, func() bool {
			for id := range own {
				if len(s.Eventfds[id]) < int(s.Vectors) {
					return false
				}
			}
			return true
		})
	}); err != nil {
		return nil, fmt.Errorf("survivors: %w", err)
	}
	fmt.Println("ready")
	r := &SurviveResult{}
	sees := func(peer, state uint32) error {
		return each(func(ctx context.Context, m member) error {
			if m.ID() == peer {
				return nil
			}
			return seesState(ctx, m, peer, state)
		})
	}
	for {
		select {
		case <-end:
			fmt.Println("waiting")
			err := each(func(ctx context.Context, m member) error {
				for id := range uint32(*peers) {
					if !own[id] {
						if err := seesState(ctx, m, id, 0); err != nil {
							return err
						}
					}
				}
				return nil
			})
			return r, err
		default:
		}
		m := all[r.Changes%2]
		state := uint32(r.Changes + 1)
		if err := m.SetState(state); err != nil {
			return r, err
		}
		if err := sees(m.ID(), state); err != nil {
			return r, err
		}
		r.Changes++
		r.Seen += len(all) - 1
		time.Sleep(time.Millisecond) // the machine is the others', too
	}
}

// seesState waits until a member has seen a state, told by an interrupt.
func seesState(ctx context.Context, m member, peer, want uint32) error {
	var got uint32
	var failed error
	err := m.Wait(ctx, nil, func() bool {
		got, failed = m.State(peer)
		return got == want || failed != nil
	})
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("survivor %d missed state %d of peer %d, sees %d: %w", m.ID(), want, peer, got, err)
	}
	return nil
}
