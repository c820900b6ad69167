// Package netstack is TCP/IP in the program itself, on a link of virtual
// Ethernet: for programs that have no right to an interface of the kernel. It
// is the only package that links gVisor.
//
//	s, err := netstack.New(link, netstack.Config{Addresses: addresses})
//	conn, err := s.DialContext(ctx, "tcp", "10.0.0.1:80")
//	l, err := s.Listen("tcp", ":8080")
package netstack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// nic is the number of the only interface.
const nic = 1

// Config of a stack.
type Config struct {
	// MAC is a unicast address; nil is a random one.
	MAC net.HardwareAddr
	// Addresses are those of the interface, each with its network. An IPv6
	// address of the link itself is there besides.
	Addresses []netip.Prefix
	// Gateway is where everything else is sent; it may be invalid: nowhere.
	Gateway netip.Addr
}

// Stack is TCP/IP on a link.
type Stack struct {
	stack *stack.Stack
	end   *endpoint
}

// New starts a stack. The link stays the caller's, who closes it after the
// stack.
func New(link *vnet.Link, c Config) (*Stack, error) {
	if c.MAC == nil {
		c.MAC = make(net.HardwareAddr, 6)
		rand.Read(c.MAC)
		c.MAC[0] = c.MAC[0]&^1 | 2 // unicast, locally administered
	}
	if len(c.MAC) != 6 || c.MAC[0]&1 != 0 {
		return nil, fmt.Errorf("address %v: expected a unicast address of 6 bytes", c.MAC)
	}
	s := &Stack{
		stack: stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol, ipv6.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		}),
		end: newEndpoint(link, c.MAC),
	}
	if err := s.configure(c); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Stack) configure(c Config) error {
	fail := func(what string, err tcpip.Error) error { return fmt.Errorf("%s: %v", what, err) }
	sack := tcpip.TCPSACKEnabled(true)
	if err := s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack); err != nil {
		return fail("selective acknowledgements", err)
	}
	buffers := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcp.DefaultReceiveBufferSize, Max: 8 << 20}
	if err := s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &buffers); err != nil {
		return fail("buffers", err)
	}
	if err := s.stack.CreateNIC(nic, s.end); err != nil {
		return fail("interface", err)
	}
	for _, p := range c.Addresses {
		if !p.IsValid() {
			return errors.New("an address is invalid")
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits())
		address := tcpip.ProtocolAddress{
			Protocol:          protocolOf(p.Addr()),
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(p.Addr().AsSlice()), PrefixLen: p.Bits()},
		}
		if err := s.stack.AddProtocolAddress(nic, address, stack.AddressProperties{}); err != nil {
			return fail("address "+p.String(), err)
		}
		s.stack.AddRoute(tcpip.Route{Destination: address.AddressWithPrefix.Subnet(), NIC: nic})
	}
	own := header.LinkLocalAddr(tcpip.LinkAddress(c.MAC))
	local := tcpip.ProtocolAddress{Protocol: ipv6.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: own, PrefixLen: 64}}
	if err := s.stack.AddProtocolAddress(nic, local, stack.AddressProperties{}); err != nil {
		return fail("address "+own.String(), err)
	}
	s.stack.AddRoute(tcpip.Route{Destination: local.AddressWithPrefix.Subnet(), NIC: nic})
	if g := c.Gateway.Unmap(); g.IsValid() {
		everything := header.IPv4EmptySubnet
		if g.Is6() {
			everything = header.IPv6EmptySubnet
		}
		s.stack.AddRoute(tcpip.Route{Destination: everything, Gateway: tcpip.AddrFromSlice(g.AsSlice()), NIC: nic})
	}
	return nil
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// target reads HOST:PORT, where HOST is an IP address, or, to listen on all,
// nothing.
func target(network, s string, listen bool) (tcpip.FullAddress, tcpip.NetworkProtocolNumber, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return tcpip.FullAddress{}, 0, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return tcpip.FullAddress{}, 0, fmt.Errorf("port %q: expected a number of at most 65535", port)
	}
	to := tcpip.FullAddress{NIC: nic, Port: uint16(n)}
	six := network[len(network)-1] != '4'
	if host == "" && listen {
		// An IPv6 socket takes IPv4, too.
		if six {
			return to, ipv6.ProtocolNumber, nil
		}
		return to, ipv4.ProtocolNumber, nil
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return tcpip.FullAddress{}, 0, fmt.Errorf("address %q: expected an IP address: names are not looked up", host)
	}
	a = a.Unmap().WithZone("")
	if a.Is6() && !six || a.Is4() && network[len(network)-1] == '6' {
		return tcpip.FullAddress{}, 0, fmt.Errorf("address %q is none of %s", host, network)
	}
	to.Addr = tcpip.AddrFromSlice(a.AsSlice())
	return to, protocolOf(a), nil
}

// DialContext connects to HOST:PORT; host is an IP address. The network is
// "tcp" or "udp", or with 4 or 6 behind it.
func (s *Stack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := s.dial(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("dial %s %s: %w", network, address, err)
	}
	return conn, nil
}

func (s *Stack) dial(ctx context.Context, network, address string) (net.Conn, error) {
	switch network {
	case "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6":
	default:
		return nil, net.UnknownNetworkError(network)
	}
	to, protocol, err := target(network, address, false)
	if err != nil {
		return nil, err
	}
	if network[0] == 'u' {
		return gonet.DialUDP(s.stack, nil, &to, protocol)
	}
	conn, err := gonet.DialContextTCP(ctx, s.stack, to, protocol)
	if err != nil { // not a nil pointer in an interface
		return nil, err
	}
	return conn, nil
}

// Listen listens on [HOST]:PORT; the network is "tcp", "tcp4" or "tcp6".
func (s *Stack) Listen(network, address string) (net.Listener, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
	default:
		return nil, fmt.Errorf("listen: %w", net.UnknownNetworkError(network))
	}
	on, protocol, err := target(network, address, true)
	if err == nil {
		var l *gonet.TCPListener
		if l, err = gonet.ListenTCP(s.stack, on, protocol); err == nil {
			return l, nil
		}
	}
	return nil, fmt.Errorf("listen on %s %s: %w", network, address, err)
}

// ListenPacket takes datagrams on [HOST]:PORT; the network is "udp", "udp4" or
// "udp6".
func (s *Stack) ListenPacket(network, address string) (net.PacketConn, error) {
	switch network {
	case "udp", "udp4", "udp6":
	default:
		return nil, fmt.Errorf("listen: %w", net.UnknownNetworkError(network))
	}
	on, protocol, err := target(network, address, true)
	if err == nil {
		var c *gonet.UDPConn
		if c, err = gonet.DialUDP(s.stack, &on, nil, protocol); err == nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("listen on %s %s: %w", network, address, err)
}

// MAC is the interface's address.
func (s *Stack) MAC() net.HardwareAddr { return net.HardwareAddr(s.end.LinkAddress()) }

// Dropped is how many packets of either direction were lost between the link and
// the stack.
func (s *Stack) Dropped() uint64 { return s.end.dropped.Load() }

// Close ends all connections.
func (s *Stack) Close() error {
	s.end.stop()
	s.stack.Close()
	s.stack.Wait()
	return nil
}
