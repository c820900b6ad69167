package peer_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/peer"
)

// TestINTx lets two processes' devices hand a number to and fro by INTx, which
// each interrupt masks: one that is not unmasked, or is lost, stops the test.
func TestINTx(t *testing.T) {
	path, _ := ivshmemtest.ServeUntil(t, link.Config{Peers: 2, Vectors: 1, ReadWrite: 4096}, pcidev.Options{INTx: true})
	const rounds = 1000
	errs := make(chan error, 2)
	var d [2]*ivshmem.Device
	for i := range d {
		b, err := peer.Dial(path)
		if err != nil {
			t.Fatal(err)
		}
		if d[i], err = ivshmem.New(b); err != nil {
			t.Fatal(err)
		}
		defer d[i].Close()
		if d[i].Vectors() != 1 || !d[i].OneShot() {
			t.Errorf("%d vectors, one-shot mode %v", d[i].Vectors(), d[i].OneShot())
		}
	}
	for i := range d {
		go func() {
			own, memory := d[i], d[i].Sections().ReadWrite
			for n := uint32(i); n < rounds; n += 2 {
				err := own.Wait(t.Context(), nil, func() bool {
					v, err := memory.Load32(0)
					return v == n || err != nil
				})
				err = errors.Join(err, memory.Store32(0, n+1), own.Ring(1-own.ID(), 0))
				if err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range d {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

func TestNoBAR2(t *testing.T) {
	path, _ := ivshmemtest.ServeUntil(t, pair, pcidev.Options{BaseAddress: 1 << 32})
	_, err := peer.Dial(path)
	if !errors.Is(err, ivshmem.ErrNotSupported) || !strings.Contains(err.Error(), "without --base-address") {
		t.Errorf("got %v", err)
	}
}

func TestIORegisters(t *testing.T) {
	path, _ := ivshmemtest.ServeUntil(t, pair, pcidev.Options{IORegisters: true})
	d, err := ivshmem.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
