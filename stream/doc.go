// Package stream has connections between the peers of a link: [net.Conn] and
// [net.Listener] over shared memory, with messages and a pair of calls without
// copies besides.
//
//	ep, err := stream.New(dev, stream.Config{})
//	l, err := ep.Listen(80)            // one peer
//	c, err := ep.Dial(ctx, 0, 80)      // another
//
// Each memory location has one writer, so connections work where the others'
// output sections are mapped read-only. A peer is believed nothing: what it
// writes is loaded once, checked, and then used; the worst it can do is end its
// own connections. The wire is described in docs/stream.md.
package stream
