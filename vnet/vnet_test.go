package vnet_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/vnet"
)

func config(output uint64) link.Config {
	return link.Config{Peers: 2, Vectors: 2, Protocol: 1, Output: output}
}

// open makes a link that ends with the test.
func open(t testing.TB, d *ivshmem.Device, c vnet.Config) *vnet.Link {
	t.Helper()
	l, err := vnet.Open(d, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// pair is two ends with carrier.
func pair(t testing.TB, output uint64, c vnet.Config, opts ...ivshmem.Option) [2]*vnet.Link {
	t.Helper()
	peers := ivshmemtest.Peers(t, config(output), opts...)
	l := [2]*vnet.Link{open(t, peers[0], c), open(t, peers[1], c)}
	carrier(t, true, l[:]...)
	return l
}

// carrier waits for it, or for none.
func carrier(t testing.TB, on bool, links ...*vnet.Link) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, l := range links {
		if err := l.WaitCarrier(ctx, on); err != nil {
			t.Fatalf("carrier %v: %v: %+v", on, err, l.Stats())
		}
	}
}

// frame is a frame of n bytes that tells its number.
func frame(n, number int) []byte {
	p := bytes.Repeat([]byte{byte(number)}, n)
	copy(p, fmt.Sprintf("%012d", number))
	return p
}
