package stream

import (
	"context"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
)

// The waiter that is woken again and again leads, and not one that sleeps for
// it: being woken by another costs more.
func TestBusyWaiterLeads(t *testing.T) {
	p := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Output: 1 << 20}, ivshmem.WithSleep(ivshmem.SleepThread))
	var eps []*Endpoint
	for _, d := range p {
		ep, err := New(d, Config{Mode: Sleep})
		if err != nil {
			t.Fatal(err)
		}
		defer ep.Close()
		eps = append(eps, ep)
	}
	l, err := eps[1].Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	pair := func() (*Conn, *Conn) {
		got := make(chan *Conn)
		go func() {
			c, err := l.AcceptStream()
			if err != nil {
				t.Error(err)
			}
			got <- c
		}()
		c, err := eps[0].Dial(context.Background(), 1, 1)
		if err != nil {
			t.Fatal(err)
		}
		return c, <-got
	}
	for range 20 {
		a, b := pair()
		go a.Read(make([]byte, 1))
		go b.Read(make([]byte, 1))
	}
	a, b := pair()
	go func() {
		p := make([]byte, 8)
		for {
			if _, err := b.Receive(p); err != nil {
				return
			}
			if b.Send(p) != nil {
				return
			}
		}
	}()
	buf := make([]byte, 8)
	led := 0
	for i := range 1000 {
		if err := a.Send(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Receive(buf); err != nil {
			t.Fatal(err)
		}
		eps[0].mu.Lock()
		if eps[0].leader == nil && i >= 100 {
			led++ // the place is kept for it
		}
		eps[0].mu.Unlock()
	}
	if led < 10 {
		t.Errorf("the place was kept %d times of 900", led)
	}
}
