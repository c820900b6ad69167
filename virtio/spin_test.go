package virtio_test

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/virtio"
)

// Who looks is neither interrupted nor rung, and sees the end.
func TestSpin(t *testing.T) {
	t.Parallel()
	const long = time.Hour
	for name, c := range map[string]struct{ driver, device time.Duration }{
		"driver": {long, 0}, "device": {0, long},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBoard(t, protocol, 0x8000, 2)
			back := echo(8)
			back.Spin = c.device
			serve(t, b.Device(t, 0, apart), back)
			d, err := virtio.Open(t.Context(), b.Device(t, 1, apart), virtio.DriverConfig{ID: 4, Spin: c.driver})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			q, err := d.SetUpQueue(t.Context(), 0, 8)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			buf := alloc(t, d, 128)
			roundTrip(t, t.Context(), q, buf)
			interrupts, rung := b.Rung(1), b.Rung(0)
			for range 20 {
				roundTrip(t, t.Context(), q, buf)
			}
			if n := b.Rung(1) - interrupts; c.driver > 0 && n > 0 {
				t.Errorf("%d interrupts of a driver that looks", n)
			}
			if n := b.Rung(0) - rung; c.device > 0 && n > 0 {
				t.Errorf("%d doorbells at a device that looks", n)
			}

			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { _, _, err := q.Next(ctx); ended <- err }()
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
			go func() { _, _, err := q.Next(t.Context()); ended <- err }()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if err := <-ended; !errors.Is(err, os.ErrClosed) {
				t.Errorf("closed: %v", err)
			}
		})
	}
}
