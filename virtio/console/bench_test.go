package console_test

import (
	"io"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/boardtest"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// benchPorts is a port between a device and a driver, from both sides.
func benchPorts(b *testing.B, spin time.Duration) (own, its *console.Port, board *boardtest.Board) {
	board = boardtest.New(b, boardtest.Config{Vectors: 3, Protocol: 0x8003, ReadWrite: 4 << 20})
	config := console.Config{MaxPorts: 2, Entries: 16}
	dev := device(b, board.Device(b, 0, boardtest.Apart), config)
	config.Spin = spin
	drv, err := console.Open(b.Context(), board.Device(b, 1, boardtest.Apart), config)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { drv.Close() })
	if own, err = dev.AddPort(console.PortConfig{Name: "bench"}); err == nil {
		err = own.Open()
	}
	if err == nil {
		its, err = drv.WaitPort(b.Context(), "bench")
	}
	if err == nil {
		err = its.Open()
	}
	if err == nil {
		err = own.WaitOpen(b.Context())
	}
	if err == nil {
		err = its.WaitOpen(b.Context())
	}
	if err != nil {
		b.Fatal(err)
	}
	return own, its, board
}

func BenchmarkRoundTrip(b *testing.B) {
	for name, spin := range map[string]time.Duration{"asleep": 0, "the driver looks": time.Second} {
		b.Run(name, func(b *testing.B) {
			device, driver, board := benchPorts(b, spin)
			go func() {
				p := make([]byte, 64)
				for {
					if _, err := io.ReadFull(device, p); err != nil {
						return
					}
					device.Write(p)
				}
			}()
			p := make([]byte, 64)
			b.ReportAllocs()
			before := board.Rung(0) + board.Rung(1)
			for b.Loop() {
				driver.Write(p)
				if _, err := io.ReadFull(driver, p); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(board.Rung(0)+board.Rung(1)-before)/float64(b.N), "doorbells/op")
		})
	}
}

func BenchmarkThroughput(b *testing.B) {
	for name, to := range map[string]bool{"to the driver": true, "from the driver": false} {
		b.Run(name, func(b *testing.B) {
			device, driver, board := benchPorts(b, 0)
			from, into := driver, device
			if to {
				from, into = device, driver
			}
			const size = 64 << 10
			b.SetBytes(size)
			b.ReportAllocs()
			go func() {
				p := make([]byte, size)
				for {
					if _, err := from.Write(p); err != nil {
						return
					}
				}
			}()
			p := make([]byte, size)
			before := board.Rung(0) + board.Rung(1)
			for b.Loop() {
				if _, err := io.ReadFull(into, p); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(board.Rung(0)+board.Rung(1)-before)/float64(b.N), "doorbells/op")
			into.Close()
			from.Close()
		})
	}
}
