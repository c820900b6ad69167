// Package console is the virtio console device (virtio specification, "Console
// Device") and its driver on a link of protocol type 8003h: ports that carry
// bytes, of which some are consoles.
//
// The device side has the ports, and serves them to whatever driver comes:
//
//	d, err := console.NewDevice(dev, console.Config{MaxPorts: 4})
//	p, err := d.AddPort(console.PortConfig{Name: "org.example.log"})
//	err = p.Open()
//	err = d.Serve(ctx)
//
// The driver side finds them:
//
//	c, err := console.Open(ctx, dev, console.Config{})
//	p, err := c.WaitPort(ctx, "org.example.log")
//	err = p.Open()
//	n, err := p.Write(data)
//
// A [Port] is the same on both sides and on each of three wires: the multiport
// interface of the specification, which Linux's driver speaks; one port
// without control messages; and the wire of the original proposal of 2009,
// where all ports share one pair of queues. What a wire cannot carry is done
// locally or fails with [ErrNotCarried]; docs/console.md has the table.
//
// The other side is not believed: control messages that mean nothing are
// counted and dropped ([Stats]), ports and unread data are bounded, and what
// breaks the rules of the queues ends the session.
package console
