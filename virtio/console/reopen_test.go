package console_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// Who closes a port and opens it again at once loses nothing of what was written
// before.
func TestReopen(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		data := bytes.Repeat([]byte("0123456789abcdef"), 6<<10) // more than the port holds
		for _, ends := range [][2]*console.Port{{device, driver}, {driver, device}} {
			p, other := ends[0], ends[1]
			for range 10 {
				wrote := make(chan error, 1)
				go func() {
					_, err := p.Write(data)
					p.Close()
					p.Open()
					if err == nil {
						_, err = p.Write([]byte("new"))
					}
					wrote <- err
				}()
				var got []byte
				for buf := make([]byte, 10_000); len(got) < len(data)+3; {
					n, err := other.Read(buf)
					if got = append(got, buf[:n]...); err == io.EOF && other.WaitOpen(b.ctx) == nil {
						err = nil
					}
					b.ok(err)
				}
				if !bytes.Equal(got, append(data, "new"...)) {
					t.Fatalf("not what was written: %d bytes", len(got))
				}
				b.ok(<-wrote)
			}
		}
	})
}

// After Flush the driver may leave: the device has everything.
func TestFlush(t *testing.T) {
	each(t, func(t *testing.T, b *both) {
		device, driver := b.open(b.some())
		for i := range 50 {
			b.write(driver, string(make([]byte, 1000+i)))
			b.ok(driver.Flush(b.ctx))
			if n := device.Unread(); n != 1000+i {
				t.Fatalf("%d bytes arrived, want %d", n, 1000+i)
			}
			b.read(device, string(make([]byte, 1000+i)))
		}
		b.write(device, "last words")
		b.ok(device.Flush(b.ctx))
		b.read(driver, "last words")
		b.ok(driver.Close())
		b.ok(driver.Flush(b.ctx))
	})
}
