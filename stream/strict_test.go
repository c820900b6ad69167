package stream_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/stream"
)

func openStrict(t *testing.T, c link.Config) []*ivshmem.Device {
	t.Helper()
	path, stop := ivshmemtest.ServeUntil(t, c, pcidev.Options{Mode: pcidev.ModeStrict})
	t.Cleanup(stop)
	devices := make([]*ivshmem.Device, c.Peers)
	for i := range devices {
		var err error
		if devices[i], err = ivshmem.Open(path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { devices[i].Close() })
	}
	return devices
}

// TestStrict sends bytes over a strict link. Its output sections stay as they
// were: guests would read them by messages.
func TestStrict(t *testing.T) {
	devices := openStrict(t, link.Config{Peers: 2, Vectors: 2, ReadWrite: 256 << 10, Output: 64 << 10})
	var eps [2]*stream.Endpoint
	for i, d := range devices {
		var err error
		if eps[i], err = stream.New(d, stream.Config{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { eps[i].Close() })
	}
	a, b := connect(t, eps[0], eps[1], 7)
	want := bytes.Repeat([]byte("strict "), 100_000)
	go func() {
		a.Write(want)
		a.Close()
	}()
	if got, err := io.ReadAll(b); !bytes.Equal(got, want) || err != nil {
		t.Errorf("%d bytes, %v, want %d", len(got), err, len(want))
	}
	b.Close()
	for id, d := range devices {
		section := make([]byte, d.Sections().Output.Size())
		if _, err := d.Sections().Output.ReadAt(section, 0); err != nil {
			t.Fatal(err)
		}
		if len(bytes.Trim(section, "\x00")) != 0 {
			t.Errorf("peer %d wrote its output section", id)
		}
	}
}

func TestStrictWithoutReadWrite(t *testing.T) {
	d := openStrict(t, link.Config{Peers: 2, Vectors: 2, Output: 64 << 10})[0]
	_, err := stream.New(d, stream.Config{})
	if !errors.Is(err, stream.ErrTooSmall) || !strings.Contains(err.Error(), "strict") || !strings.Contains(err.Error(), "--rw") {
		t.Errorf("got %v", err)
	}
}
