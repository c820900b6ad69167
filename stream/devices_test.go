package stream_test

import (
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/net/nettest"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/stream"
)

// TestConnDevices is TestConn over two devices that are there, named in
// IVSHMEM_TEST_DEVICES with a comma between them: in a guest. Without, over a
// link of this process.
func TestConnDevices(t *testing.T) {
	var eps []*stream.Endpoint
	if names := os.Getenv("IVSHMEM_TEST_DEVICES"); names == "" {
		eps = endpoints(t, links["output sections"], stream.Config{})
	} else {
		for name := range strings.SplitSeq(names, ",") {
			d, err := ivshmem.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			ep, err := stream.New(d, stream.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer ep.Close()
			eps = append(eps, ep)
		}
	}
	peer := eps[1].Device().ID()
	l, err := eps[1].Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		dialed := make(chan error, 1)
		go func() {
			var err error
			c1, err = eps[0].Dial(t.Context(), peer, 7)
			dialed <- err
		}()
		if c2, err = l.Accept(); err != nil {
			return nil, nil, nil, err
		}
		if err := <-dialed; err != nil {
			return nil, nil, nil, err
		}
		return c1, c2, func() { c1.Close(); c2.Close() }, nil
	})
}
