package netstack_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/vnet"
	"github.com/ivshmem-go/ivshmem/vnet/netstack"
)

const limit = 30 * time.Second

// pair is two stacks with a link between them.
type pair struct {
	a, b   *netstack.Stack
	la, lb *vnet.Link
}

func newPair(t testing.TB, mtu int) *pair {
	t.Helper()
	devices := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Output: 1 << 20, Protocol: regs.ProtocolEthernet})
	p := &pair{}
	for i, end := range []struct {
		link      **vnet.Link
		stack     **netstack.Stack
		addresses []string
	}{
		{&p.la, &p.a, []string{"10.0.0.1/24", "fd00::1/64"}},
		{&p.lb, &p.b, []string{"10.0.0.2/24", "fd00::2/64"}},
	} {
		l, err := vnet.Open(devices[i], vnet.Config{MTU: mtu})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		var c netstack.Config
		for _, a := range end.addresses {
			c.Addresses = append(c.Addresses, netip.MustParsePrefix(a))
		}
		s, err := netstack.New(l, c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		*end.link, *end.stack = l, s
	}
	ctx := deadline(t)
	for _, l := range []*vnet.Link{p.la, p.lb} {
		if err := l.WaitCarrier(ctx, true); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

// TestTCP sends as much as makes windows, rings and acknowledgements go round,
// by both IP versions, at the smallest MTU of each, and the largest.
func TestTCP(t *testing.T) {
	for _, c := range []struct {
		mtu     int
		network string
		to      string
	}{
		{0, "tcp", "10.0.0.2:80"}, {0, "tcp6", "[fd00::2]:80"}, {1500, "tcp4", "10.0.0.2:80"},
		{68, "tcp", "10.0.0.2:80"}, {1280, "tcp", "[fd00::2]:80"}, {65535, "tcp", "[::ffff:10.0.0.2]:80"},
	} {
		t.Run(c.to, func(t *testing.T) {
			p := newPair(t, c.mtu)
			l, err := p.b.Listen("tcp", ":80")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			size := 1 << 20
			if c.mtu == 68 {
				size = 1 << 14
			}
			sent := make([]byte, size)
			rand.Read(sent)
			var all sync.WaitGroup
			defer all.Wait()
			all.Go(func() {
				conn, err := l.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				io.Copy(conn, conn)
			})
			conn, err := p.a.DialContext(deadline(t), c.network, c.to)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(limit))
			all.Go(func() {
				conn.Write(sent)
				conn.(interface{ CloseWrite() error }).CloseWrite()
			})
			got, err := io.ReadAll(conn)
			if err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d bytes of %d came back, %v", len(got), len(sent), err)
			}
		})
	}
}

// TestConn is Go's conformance test.
func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		p := newPair(t, 1500)
		l, err := p.b.Listen("tcp", "10.0.0.2:80")
		if err != nil {
			return nil, nil, nil, err
		}
		if c1, err = p.a.DialContext(deadline(t), "tcp", "10.0.0.2:80"); err != nil {
			return nil, nil, nil, err
		}
		if c2, err = l.Accept(); err != nil {
			return nil, nil, nil, err
		}
		return c1, c2, func() {
			c1.Close()
			c2.Close()
			l.Close()
		}, nil
	})
}

func TestUDP(t *testing.T) {
	p := newPair(t, 0)
	for network, to := range map[string]string{"udp4": "10.0.0.2:53", "udp": "[fd00::2]:54"} {
		at, err := p.b.ListenPacket(network, to)
		if err != nil {
			t.Fatal(err)
		}
		defer at.Close()
		conn, err := p.a.DialContext(deadline(t), network, to)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for _, c := range []net.PacketConn{at, conn.(net.PacketConn)} {
			c.SetDeadline(time.Now().Add(limit))
		}
		// The last one is longer than the MTU: in fragments.
		for _, n := range []int{0, 1, 1000, 16000, 40000} {
			sent, got := make([]byte, n), make([]byte, 1<<16)
			rand.Read(sent)
			if _, err := conn.Write(sent); err != nil {
				t.Fatal(err)
			}
			m, from, err := at.ReadFrom(got)
			if err != nil || !bytes.Equal(got[:m], sent) {
				t.Fatalf("%d bytes: %d arrived, %v", n, m, err)
			}
			if _, err := at.WriteTo(got[:m], from); err != nil {
				t.Fatal(err)
			}
			if m, err := conn.Read(got); err != nil || !bytes.Equal(got[:m], sent) {
				t.Fatalf("%d bytes: %d came back, %v", n, m, err)
			}
		}
	}
}

func TestPing(t *testing.T) {
	p := newPair(t, 0)
	for _, to := range []string{"10.0.0.2", "fd00::2", "::ffff:10.0.0.2"} {
		for i, size := range []int{16, 56, 1000, 30000} {
			if took, err := p.a.Ping(deadline(t), netip.MustParseAddr(to), uint16(i), size); err != nil || took <= 0 {
				t.Errorf("%s, %d bytes: %v, %v", to, size, took, err)
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.a.Ping(ctx, netip.MustParseAddr("10.0.0.77"), 1, 56); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody: %v", err)
	}
	if _, err := p.a.Ping(ctx, netip.MustParseAddr("10.0.0.2"), 1, 15); err == nil {
		t.Error("15 bytes: no error")
	}
}

// TestRefused tells a closed port from nobody.
func TestRefused(t *testing.T) {
	p := newPair(t, 0)
	if _, err := p.a.DialContext(deadline(t), "tcp", "10.0.0.2:81"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("closed port: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.a.DialContext(ctx, "tcp", "10.0.0.77:80"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody: %v", err)
	}
	if _, err := p.a.DialContext(deadline(t), "tcp", "10.1.0.1:80"); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("another network, without a gateway: %v", err)
	}
	for _, bad := range [][2]string{{"tcp", "host:80"}, {"tcp", "10.0.0.2"}, {"tcp", "10.0.0.2:65536"}, {"tcp", ":80"}, {"tcp6", "10.0.0.2:80"}, {"tcp4", "[fd00::2]:80"}, {"unix", "/x"}} {
		if _, err := p.a.DialContext(deadline(t), bad[0], bad[1]); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// TestGateway reaches another network by way of the peer's address.
func TestGateway(t *testing.T) {
	devices := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Output: 1 << 20, Protocol: regs.ProtocolEthernet})
	var stacks []*netstack.Stack
	for i, c := range []netstack.Config{
		{Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")}, Gateway: netip.MustParseAddr("10.0.0.2")},
		{Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/24"), netip.MustParsePrefix("192.168.7.1/24")}},
	} {
		l, err := vnet.Open(devices[i], vnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		s, err := netstack.New(l, c)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		stacks = append(stacks, s)
	}
	if _, err := stacks[0].Ping(deadline(t), netip.MustParseAddr("192.168.7.1"), 1, 56); err != nil {
		t.Error(err)
	}
}

// TestClose has everything that waits end with its stack, or its link.
func TestClose(t *testing.T) {
	for name, end := range map[string]func(p *pair){
		"stack": func(p *pair) { p.a.Close() },
		"link and stack": func(p *pair) {
			p.la.Close()
			p.a.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 0)
			l, err := p.b.Listen("tcp", ":80")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			own, err := p.a.Listen("tcp", ":80")
			if err != nil {
				t.Fatal(err)
			}
			conn, err := p.a.DialContext(deadline(t), "tcp", "10.0.0.2:80")
			if err != nil {
				t.Fatal(err)
			}
			var all sync.WaitGroup
			all.Go(func() { own.Accept() })
			all.Go(func() { io.Copy(io.Discard, conn) })
			all.Go(func() { io.Copy(conn, endless{}) })
			end(p)
			all.Wait()
		})
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestConfig refuses what is none.
func TestConfig(t *testing.T) {
	p := newPair(t, 0)
	for _, c := range []netstack.Config{
		{MAC: net.HardwareAddr{1, 0, 0, 0, 0, 1}}, {MAC: net.HardwareAddr{2, 0}}, {Addresses: []netip.Prefix{{}}},
	} {
		if s, err := netstack.New(p.la, c); err == nil {
			s.Close()
			t.Errorf("%+v: no error", c)
		}
	}
	if m := p.a.MAC(); m[0]&3 != 2 || m.String() == p.b.MAC().String() {
		t.Errorf("random address %v", m)
	}
}
