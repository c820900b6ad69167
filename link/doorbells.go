package link

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/regs"
)

// doorbells are the doorbell eventfds of a link: one per peer ID and vector,
// made when first asked for, and kept for the life of the link, so that a
// sender's descriptor never goes stale, whoever takes the ID. Writing one is
// the same as writing the Doorbell register.
//
// A target that reads its doorbell eventfd itself is direct: the link is not
// in the way. For every other one the link reads it and rings the doorbell.
//
// All processes of the link have them, and any may empty one, fill it, or take
// its O_NONBLOCK away: so the link never makes a plain read or write.
type doorbells struct {
	link *Link
	epfd int
	stop int // eventfd that ends the loop
	done chan struct{}

	mu  sync.Mutex           // taken inside the link's, never the other way round
	fds map[uint32]*doorbell // by value of the Doorbell register
	out *evfd.Signaller
}

type doorbell struct {
	fd     int
	direct bool
}

// DoorbellFD returns the eventfd that rings vector at the peer target. It
// belongs to the link.
func (l *Link) DoorbellFD(target, vector uint16) (int, error) {
	d, err := l.doorbells()
	if err != nil {
		return -1, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.get(regs.Doorbell(target, vector))
}

// DoorbellFD is an eventfd that rings: a write to it stands for a write of
// Value to the Doorbell register.
type DoorbellFD struct {
	Value uint32
	FD    int // the link's
}

// DoorbellFDs returns the doorbell eventfds of all peers, those of vector 0
// first, so that where not all fit every peer has some: at most limit, and
// fewer where the process is out of descriptors.
func (l *Link) DoorbellFDs(limit int) []DoorbellFD {
	d, err := l.doorbells()
	if err != nil {
		return nil
	}
	// The lock is taken once: a crowd that connects asks for all of them.
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]DoorbellFD, 0, min(limit, int(l.config.Peers)*int(l.config.Vectors)))
	for vector := range l.config.Vectors {
		for target := range l.config.Peers {
			if len(all) == limit {
				return all
			}
			value := regs.Doorbell(uint16(target), vector)
			fd, err := d.get(value)
			if err != nil {
				return all
			}
			all = append(all, DoorbellFD{value, fd})
		}
	}
	return all
}

// get returns a doorbell eventfd, which it makes if it is not there. The caller
// holds d.mu.
func (d *doorbells) get(key uint32) (int, error) {
	if b := d.fds[key]; b != nil {
		return b.fd, nil
	}
	fd, err := evfd.New()
	if err != nil {
		return -1, err
	}
	d.fds[key] = &doorbell{fd: fd}
	if err := d.watch(key, fd); err != nil {
		unix.Close(fd)
		delete(d.fds, key)
		return -1, err
	}
	return fd, nil
}

// SetDirect says whether the peer reads its doorbell eventfd of a vector
// itself. It has an effect only where that eventfd was asked for before.
func (p *Peer) SetDirect(vector uint16, direct bool) {
	d := p.link.doorbell.Load()
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	key := regs.Doorbell(uint16(p.id), vector)
	b := d.fds[key]
	if b != nil && b.direct != direct {
		d.set(key, b, direct)
	}
}

// IsDoorbell reports whether fd is the peer's own doorbell eventfd of a
// vector, however the descriptor came here.
func (p *Peer) IsDoorbell(vector uint16, fd int) bool {
	d := p.link.doorbell.Load()
	if d == nil {
		return false
	}
	d.mu.Lock()
	b := d.fds[regs.Doorbell(uint16(p.id), vector)]
	d.mu.Unlock()
	if b == nil {
		return false
	}
	own, ok := evfd.Number(b.fd)
	other, ok2 := evfd.Number(fd)
	return ok && ok2 && own == other
}

func (l *Link) doorbells() (*doorbells, error) {
	if d := l.doorbell.Load(); d != nil {
		return d, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, os.ErrClosed
	}
	if d := l.doorbell.Load(); d != nil {
		return d, nil
	}
	d := &doorbells{link: l, fds: map[uint32]*doorbell{}, done: make(chan struct{})}
	var err error
	if d.out, err = evfd.NewSignaller(l.FD()); err != nil {
		return nil, err
	}
	if d.stop, err = evfd.New(); err != nil {
		d.out.Close()
		return nil, err
	}
	if d.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		d.out.Close()
		unix.Close(d.stop)
		return nil, err
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: -1}
	if err := unix.EpollCtl(d.epfd, unix.EPOLL_CTL_ADD, d.stop, &ev); err != nil {
		d.out.Close()
		unix.Close(d.stop)
		unix.Close(d.epfd)
		return nil, err
	}
	l.doorbell.Store(d)
	go d.forward()
	return d, nil
}

// watch makes the link read a doorbell eventfd. The event carries the value
// of the Doorbell register; Pad 1 tells it from the stop event.
func (d *doorbells) watch(key uint32, fd int) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(key), Pad: 1}
	return unix.EpollCtl(d.epfd, unix.EPOLL_CTL_ADD, fd, &ev)
}

// set changes who reads a doorbell eventfd. The caller holds d.mu.
func (d *doorbells) set(key uint32, b *doorbell, direct bool) {
	if direct {
		unix.EpollCtl(d.epfd, unix.EPOLL_CTL_DEL, b.fd, nil)
		// What was rung before belongs to the time before.
		evfd.Drain(b.fd)
	} else {
		// What the former reader left there is not for the next.
		evfd.Drain(b.fd)
		if d.watch(key, b.fd) != nil {
			return
		}
	}
	b.direct = direct
}

// signal raises a vector at a target that reads its doorbell eventfds. An
// error means that the eventfd is of no use to the target either.
func (d *doorbells) signal(target uint32, vector uint16) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if b := d.fds[regs.Doorbell(uint16(target), vector)]; b != nil {
		_ = d.out.Signal(b.fd)
	}
}

// forward rings the doorbells of targets that do not read their eventfds.
func (d *doorbells) forward() {
	defer close(d.done)
	ev := make([]unix.EpollEvent, 64)
	for {
		n, err := evfd.Wait(d.epfd, ev, -1)
		if err != nil {
			return
		}
		for _, e := range ev[:n] {
			if e.Pad == 0 {
				return
			}
			key := uint32(e.Fd)
			d.mu.Lock()
			b := d.fds[key]
			rung := false
			if b != nil && !b.direct {
				rung = evfd.Drain(b.fd)
			}
			d.mu.Unlock()
			if rung {
				d.link.ring(regs.SplitDoorbell(key))
			}
		}
	}
}

func (d *doorbells) close() {
	evfd.Signal(d.stop)
	<-d.done
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.fds {
		unix.Close(b.fd)
	}
	clear(d.fds)
	d.out.Close()
	unix.Close(d.epfd)
	unix.Close(d.stop)
}
