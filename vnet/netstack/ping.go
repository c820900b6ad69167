package netstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Ping sends an echo request with a number and size bytes of data, at least 16,
// and returns how long it took until they came back.
func (s *Stack) Ping(ctx context.Context, to netip.Addr, sequence uint16, size int) (time.Duration, error) {
	to = to.Unmap().WithZone("")
	if size < 16 || size > 65507 {
		return 0, fmt.Errorf("ping: %d bytes of data: expected 16 to 65507", size)
	}
	kind, request := icmp.ProtocolNumber4, make([]byte, header.ICMPv4MinimumSize+size)
	request[0] = byte(header.ICMPv4Echo)
	reply := byte(header.ICMPv4EchoReply)
	if to.Is6() {
		kind, reply = icmp.ProtocolNumber6, byte(header.ICMPv6EchoReply)
		request[0] = byte(header.ICMPv6EchoRequest)
	}
	// Both versions have the number in the same place. The stack fills in the
	// identifier, by which it finds the answer, and the checksum.
	binary.BigEndian.PutUint16(request[6:], sequence)
	data := request[8:]
	for i := range data {
		data[i] = byte(i)
	}
	var queue waiter.Queue
	ep, terr := s.stack.NewEndpoint(kind, protocolOf(to), &queue)
	if terr != nil {
		return 0, fmt.Errorf("ping: %v", terr)
	}
	defer ep.Close()
	entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents)
	queue.EventRegister(&entry)
	defer queue.EventUnregister(&entry)
	if terr := ep.Connect(tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(to.AsSlice())}); terr != nil {
		return 0, fmt.Errorf("ping %v: %v", to, terr)
	}
	begin := time.Now()
	binary.BigEndian.PutUint64(data, uint64(begin.UnixNano()))
	if _, terr := ep.Write(bytes.NewReader(request), tcpip.WriteOptions{}); terr != nil {
		return 0, fmt.Errorf("ping %v: %v", to, terr)
	}
	for {
		var answer bytes.Buffer
		switch _, terr := ep.Read(&answer, tcpip.ReadOptions{}); terr.(type) {
		case nil:
			b := answer.Bytes()
			if len(b) == len(request) && b[0] == reply && bytes.Equal(b[6:], request[6:]) {
				return time.Since(begin), nil
			}
			continue
		case *tcpip.ErrWouldBlock:
		default:
			return 0, fmt.Errorf("ping %v: %v", to, terr)
		}
		select {
		case <-readable:
		case <-ctx.Done():
			return 0, fmt.Errorf("ping %v: %w", to, ctx.Err())
		}
	}
}
