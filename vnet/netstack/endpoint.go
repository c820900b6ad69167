package netstack

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// endpoint is a link as gVisor wants it (stack.LinkEndpoint).
type endpoint struct {
	link *vnet.Link
	ctx  context.Context // ends everything that waits
	stop context.CancelFunc

	dropped atomic.Uint64

	sending sync.Mutex
	scratch []byte // with sending held: a frame, where it cannot be written in place

	mu         sync.Mutex
	dispatcher stack.NetworkDispatcher
	mac        tcpip.LinkAddress
	reading    sync.WaitGroup
}

var _ stack.LinkEndpoint = (*endpoint)(nil)

func newEndpoint(link *vnet.Link, mac net.HardwareAddr) *endpoint {
	e := &endpoint{link: link, mac: tcpip.LinkAddress(mac)}
	e.ctx, e.stop = context.WithCancel(context.Background())
	if !link.Device().PlainMemory() {
		e.scratch = make([]byte, vnet.MaxFrame)
	}
	return e
}

// Attach begins to deliver what arrives, or ends that.
func (e *endpoint) Attach(d stack.NetworkDispatcher) {
	e.mu.Lock()
	defer e.mu.Unlock()
	first := e.dispatcher == nil
	e.dispatcher = d
	switch {
	case d == nil:
		e.stop()
	case first:
		e.reading.Go(e.read)
	}
}

// IsAttached reports whether it delivers.
func (e *endpoint) IsAttached() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.dispatcher != nil
}

// Wait waits for the end of delivering.
func (e *endpoint) Wait() { e.reading.Wait() }

// Close ends delivering.
func (e *endpoint) Close() { e.stop() }

// SetOnCloseAction is not needed: the link is its opener's.
func (e *endpoint) SetOnCloseAction(func()) {}

// MTU is the link's.
func (e *endpoint) MTU() uint32 { return uint32(e.link.MTU()) }

// SetMTU sets the link's, if it fits.
func (e *endpoint) SetMTU(mtu uint32) { e.link.SetMTU(int(min(mtu, 1<<16))) }

// MaxHeaderLength is that of Ethernet.
func (e *endpoint) MaxHeaderLength() uint16 { return header.EthernetMinimumSize }

// LinkAddress is the own one.
func (e *endpoint) LinkAddress() tcpip.LinkAddress {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mac
}

// SetLinkAddress sets it.
func (e *endpoint) SetLinkAddress(mac tcpip.LinkAddress) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.mac = mac
}

// Capabilities says that the other's address has to be found, and that
// checksums are computed and verified.
func (e *endpoint) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired
}

// ARPHardwareType is Ethernet.
func (e *endpoint) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }

// AddHeader writes the header of Ethernet.
func (e *endpoint) AddHeader(p *stack.PacketBuffer) {
	header.Ethernet(p.LinkHeader().Push(header.EthernetMinimumSize)).Encode(&header.EthernetFields{
		SrcAddr: p.EgressRoute.LocalLinkAddress, DstAddr: p.EgressRoute.RemoteLinkAddress, Type: p.NetworkProtocolNumber,
	})
}

// ParseHeader takes it off.
func (e *endpoint) ParseHeader(p *stack.PacketBuffer) bool {
	_, ok := p.LinkHeader().Consume(header.EthernetMinimumSize)
	return ok
}

// WritePackets sends packets. It waits for room: whoever sends faster than the
// peer receives is slowed down. Without carrier packets are lost, as on a cable.
func (e *endpoint) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	e.sending.Lock()
	defer e.sending.Unlock()
	defer e.link.Flush()
	for i, p := range list.AsSlice() {
		switch err := e.write(p); {
		case err == nil:
		case e.ctx.Err() != nil:
			return i, &tcpip.ErrClosedForSend{}
		default:
			e.dropped.Add(1)
		}
	}
	return list.Len(), nil
}

func (e *endpoint) write(p *stack.PacketBuffer) error {
	frame, err := e.scratch, error(nil)
	if frame == nil {
		if frame, err = e.link.UnsafeReserve(e.ctx); err != nil {
			return err
		}
	}
	n := 0
	for _, part := range p.AsSlices() {
		if n+len(part) > len(frame) {
			return errors.New("longer than the MTU")
		}
		n += copy(frame[n:], part)
	}
	if e.scratch != nil {
		return e.link.Send(e.ctx, frame[:n])
	}
	return e.link.UnsafeCommit(n)
}

// read delivers what arrives.
func (e *endpoint) read() {
	var buf []byte
	if e.scratch != nil {
		buf = make([]byte, vnet.MaxFrame)
	}
	for {
		var frame []byte
		var err error
		if buf == nil {
			frame, err = e.link.UnsafePeek(e.ctx)
		} else {
			var n int
			n, err = e.link.Receive(e.ctx, buf)
			frame = buf[:n]
		}
		var violation *vnet.ViolationError
		switch {
		case errors.As(err, &violation): // it goes on
			continue
		case err != nil:
			return
		}
		packet := buffer.MakeWithData(frame) // which copies
		if buf == nil {
			if err := e.link.UnsafeRelease(); err != nil {
				e.dropped.Add(1)
				packet.Release()
				continue
			}
		}
		e.deliver(packet)
	}
}

func (e *endpoint) deliver(packet buffer.Buffer) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: packet})
	defer p.DecRef()
	if !e.ParseHeader(p) {
		e.dropped.Add(1)
		return
	}
	h := header.Ethernet(p.LinkHeader().Slice())
	e.mu.Lock()
	d, own := e.dispatcher, e.mac
	e.mu.Unlock()
	switch to := h.DestinationAddress(); {
	case d == nil:
		return
	case to == own:
		p.PktType = tcpip.PacketHost
	case to == header.EthernetBroadcastAddress:
		p.PktType = tcpip.PacketBroadcast
	case header.IsMulticastEthernetAddress(to):
		p.PktType = tcpip.PacketMulticast
	default: // somebody else's, whom a bridge on the other side has not learned yet
		return
	}
	d.DeliverNetworkPacket(h.Type(), p)
}
