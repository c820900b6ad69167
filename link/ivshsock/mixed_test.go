package ivshsock_test

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
)

// anyPeer is what a test does with a peer of any kind.
type anyPeer interface {
	id() uint32
	ring(target, vector uint32) error
	// rung reports which vectors were rung since the last call.
	rung() (vectors []uint32, err error)
	setState(v uint32) error
	state(peer uint32) (uint32, error)
}

// client is a client of the ivshmem2 socket.
type client struct{ *ivshmemtest.Ivshmem2 }

func (c client) id() uint32 { return c.ID }
func (c client) catchUp() error {
	for {
		if _, err := c.Next(0); err != nil {
			if errors.Is(err, unix.EAGAIN) {
				return nil
			}
			return err
		}
	}
}
func (c client) ring(target, vector uint32) error {
	if err := c.catchUp(); err != nil {
		return err
	}
	return c.Ring(target, vector)
}
func (c client) rung() (vectors []uint32, err error) {
	for v := range c.Vectors {
		n, err := c.Take(v)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			vectors = append(vectors, v)
		}
	}
	return vectors, nil
}
func (c client) setState(v uint32) error {
	if err := c.catchUp(); err != nil {
		return err
	}
	return c.SetState(v)
}
func (c client) state(peer uint32) (uint32, error) { return c.State(peer), nil }

// device is a host process on the vfio-user socket.
type device struct {
	*ivshmem.Device
	seen []uint64
}

func (d *device) id() uint32                        { return d.ID() }
func (d *device) ring(target, vector uint32) error  { return d.Ring(target, int(vector)) }
func (d *device) setState(v uint32) error           { return d.SetState(v) }
func (d *device) state(peer uint32) (uint32, error) { return d.State(peer) }
func (d *device) rung() (vectors []uint32, err error) {
	// Waiting is what fetches interrupts: it is done when there is one.
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	err = d.Wait(ctx, nil, func() bool {
		vectors = nil
		for v := range d.Vectors() {
			if d.Interrupts(v) != d.seen[v] {
				vectors = append(vectors, uint32(v))
			}
		}
		return len(vectors) > 0
	})
	for _, v := range vectors {
		d.seen[v] = d.Interrupts(int(v))
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = nil
	}
	return vectors, err
}

// TestMixed has peers of both kinds on one link: everybody rings every vector
// of everybody, and sees everybody's state.
func TestMixed(t *testing.T) {
	const vectors = 3
	for name, mode := range map[string]pcidev.Mode{"state": pcidev.ModeState, "shared": pcidev.ModeShared} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, config(6, vectors))
			qemu := s.serveVFIOUser(pcidev.Options{Mode: mode})
			var peers []anyPeer
			open := func(opts ...ivshmem.Option) {
				d, err := ivshmem.Open(qemu, opts...)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { d.Close() })
				peers = append(peers, &device{Device: d, seen: make([]uint64, vectors)})
			}
			peers = append(peers, client{s.dial()})
			open()
			peers = append(peers, client{s.dial()})
			open(ivshmem.WithOneShot()) // is rung through the service
			peers = append(peers, client{s.dial()}, client{s.dial()})
			for i, p := range peers {
				if p.id() != uint32(i) {
					t.Fatalf("peer %d has ID %d", i, p.id())
				}
				if err := p.setState(uint32(100 + i)); err != nil {
					t.Fatal(err)
				}
			}
			for _, p := range peers {
				s.await("vector 0 of the last state changes", func() bool {
					got, err := p.rung()
					if err != nil {
						t.Fatal(err)
					}
					return len(got) == 0
				})
				for other := range peers {
					if got, err := p.state(uint32(other)); got != uint32(100+other) || err != nil {
						t.Errorf("peer %d sees state %d of peer %d, %v", p.id(), got, other, err)
					}
				}
			}
			for from, p := range peers {
				for to, target := range peers {
					for v := range uint32(vectors) {
						// Arm first: what is rung before is lost.
						if _, err := target.rung(); err != nil {
							t.Fatal(err)
						}
						if err := p.ring(uint32(to), v); err != nil {
							t.Fatalf("peer %d rings vector %d of peer %d: %v", from, v, to, err)
						}
						s.await("a doorbell", func() bool {
							got, err := target.rung()
							if err != nil {
								t.Fatal(err)
							}
							if len(got) > 0 && !equal(got, []uint32{v}) {
								t.Fatalf("peer %d rang vector %d of peer %d, which got %d", from, v, to, got)
							}
							return len(got) > 0
						})
					}
				}
			}
			// One of each kind leaves: the others see it, by an interrupt.
			peers[2].(client).Close()
			peers[1].(*device).Close()
			for _, i := range []int{0, 3, 4, 5} {
				s.await("the departures", func() bool {
					if _, err := peers[i].rung(); err != nil {
						t.Fatal(err)
					}
					a, err := peers[i].state(1)
					b, err2 := peers[i].state(2)
					if err := errors.Join(err, err2); err != nil {
						t.Fatal(err)
					}
					return a == 0 && b == 0
				})
			}
			c := peers[0].(client)
			s.await("PEER_GONE of both", func() bool {
				if err := c.catchUp(); err != nil {
					t.Fatal(err)
				}
				return len(c.Eventfds) == 4
			})
		})
	}
}

// serveVFIOUser opens the other socket of the link.
func (s *service) serveVFIOUser(o pcidev.Options) (path string) {
	s.t.Helper()
	path = filepath.Join(filepath.Dir(s.path), "vfio-user")
	listener, err := pcidev.Listen(path)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- (&pcidev.Server{Link: s.link, Options: o}).Serve(ctx, listener) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Error(err)
		}
	})
	return path
}

// FuzzClient lets clients say anything, at any time: before INIT is read, or
// after all messages, with descriptors, and ending in any way. Whatever they
// do, they are gone, and nobody else is.
func FuzzClient(f *testing.F) {
	for _, seed := range []string{"", "\x00", "\x01\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "0123456789"} {
		for how := range byte(16) {
			f.Add([]byte(seed), how)
		}
	}
	s := serve(f, link.Config{Peers: 4, Vectors: 2, ReadWrite: 60 << 10})
	good := s.dial()
	f.Fuzz(func(t *testing.T, data []byte, how byte) {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.path}); err != nil {
			t.Fatal(err)
		}
		room := make([]byte, 4096)
		if how&1 != 0 { // reads INIT
			unix.Read(fd, room[:40])
		}
		if how&2 != 0 { // reads one more
			unix.Read(fd, room[:16])
		}
		var oob []byte
		if how&4 != 0 && len(data) > 0 {
			oob = unix.UnixRights(fd, good.MemoryFD)
		}
		// A client that was dropped meanwhile gets EPIPE.
		unix.Sendmsg(fd, data, oob, nil, unix.MSG_NOSIGNAL)
		if how&8 != 0 || len(data) == 0 {
			unix.Shutdown(fd, unix.SHUT_WR)
		}
		for { // until the server has closed
			n, err := unix.Read(fd, room)
			if n == 0 || err != nil && err != unix.EINTR {
				break
			}
		}
		for len(s.present()) != 1 {
			unix.Nanosleep(&unix.Timespec{Nsec: 1e4}, nil)
		}
		if _, err := (client{good}).rung(); err != nil {
			t.Fatal(err)
		}
		if err := (client{good}).catchUp(); err != nil { // checks the sequence
			t.Fatal(err)
		}
	})
}
