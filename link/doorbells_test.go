package link

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/regs"
)

// TestDoorbellFDTurnsBlocking takes O_NONBLOCK away from an empty doorbell
// eventfd, as every process that has it can. The link must not wait on it.
func TestDoorbellFDTurnsBlocking(t *testing.T) {
	l := newLink(t, testConfig)
	a, rang := attach(t, l)
	fd, err := l.DoorbellFD(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	a.SetDirect(2, true)
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	a.SetDirect(2, false)
	if evfd.Drain(fd) {
		t.Error("an empty one was drained")
	}
	// It still rings.
	a.Store(regs.InterruptControl, 1)
	if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	for len(rang.take()) == 0 && t.Context().Err() == nil {
		unix.Nanosleep(&unix.Timespec{Nsec: 1e5}, nil)
	}
}

// TestDoorbellFDNextPeer takes an ID over just when its peer leaves: the
// departure must not undo what the next one set.
func TestDoorbellFDNextPeer(t *testing.T) {
	l := newLink(t, Config{Peers: 2, Vectors: 1})
	if _, err := l.DoorbellFD(0, 0); err != nil {
		t.Fatal(err)
	}
	old, _ := attach(t, l)
	attach(t, l)
	for range 2000 {
		old.SetDirect(0, true)
		left := make(chan struct{})
		go func() {
			defer close(left)
			old.Detach()
		}()
		next, err := l.Attach(nil, &recorder{})
		for errors.Is(err, ErrFull) {
			next, err = l.Attach(nil, &recorder{})
		}
		if err != nil {
			t.Fatal(err)
		}
		next.SetDirect(0, true)
		<-left
		l.doorbell.Load().mu.Lock()
		direct := l.doorbell.Load().fds[0].direct
		l.doorbell.Load().mu.Unlock()
		if !direct {
			t.Fatal("the departure of the former peer made the next one indirect")
		}
		old = next
	}
}

func TestCloseTwice(t *testing.T) {
	l, err := New(testConfig)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.DoorbellFD(0, 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := l.DoorbellFD(0, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("doorbell of a closed link: got %v, want os.ErrClosed", err)
	}
}
