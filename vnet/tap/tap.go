package tap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
)

// MaxMTU is the largest MTU that the kernel gives a TAP interface, in bytes.
const MaxMTU = 65521

// ErrRemoved says that the interface is gone.
var ErrRemoved = errors.New("the interface was removed")

// Config says what an interface has to be. What is not given is left as it is.
type Config struct {
	// Name is its name, in which %d stands for the first free number. An
	// interface that exists is used, if it is a TAP and nobody else uses it.
	// Without CAP_NET_ADMIN it has to exist, and belong to the user. One that
	// did not exist ends with Close.
	Name string
	MAC  net.HardwareAddr
	// MTU is in bytes, without the 14 of the header. An interface that did not
	// exist has the link's.
	MTU       int
	Addresses []netip.Prefix
}

// Interface is a TAP interface.
type Interface struct {
	fd     int
	name   string
	index  int
	stats  counters
	move   mover
	most   int // frames that are written in one piece
	kick   int // eventfd that ends who sleeps
	set    *evfd.Set
	events *events
	// fresh says that the interface was made here, and nobody gave it an MTU.
	fresh bool
}

// counters are those of Stats.
type counters struct {
	sent, received, truncated, noCarrier, down, refused atomic.Uint64
}

// Stats counts frames.
type Stats struct {
	Sent     uint64 `json:"sent"`     // from the interface to the link
	Received uint64 `json:"received"` // from the link to the interface

	// Frames that were dropped.
	Truncated uint64 `json:"dropped_truncated"`  // from the interface: longer than the MTU allows
	NoCarrier uint64 `json:"dropped_no_carrier"` // from the interface: nobody is there
	Down      uint64 `json:"dropped_down"`       // from the link: the interface is down
	Refused   uint64 `json:"dropped_refused"`    // from the link: the kernel did not take it
}

// Open makes an interface, or takes one that is there. It is not up before Run.
func Open(c Config) (*Interface, error) {
	t := &Interface{fd: -1, kick: -1, move: transfer, most: maxFrames}
	if err := t.open(c); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (t *Interface) open(c Config) error {
	if _, err := netlink.LinkByName(c.Name); c.MTU == 0 && errors.As(err, new(netlink.LinkNotFoundError)) {
		t.fresh = true
	}
	if err := t.attach(c.Name); err != nil {
		return err
	}
	link, err := netlink.LinkByName(t.name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", t.name, err)
	}
	t.index = link.Attrs().Index
	if err := configure(link, c); err != nil {
		return err
	}
	if t.kick, err = evfd.New(); err != nil {
		return err
	}
	if t.set, err = evfd.NewSet(evfd.SleepThread); err != nil {
		return err
	}
	if err := t.set.Add(t.kick, unix.EPOLLIN, tagKick); err != nil {
		return err
	}
	if err := t.set.Add(t.fd, unix.EPOLLIN, tagFrames); err != nil {
		return err
	}
	t.events, err = subscribe(t.index)
	return err
}

// attach opens the device file, and makes it that of an interface. It is not in
// the hands of Go's poller, which would watch a file that is no interface's yet.
func (t *Interface) attach(name string) (err error) {
	const path = "/dev/net/tun"
	switch t.fd, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err {
	case nil:
	case unix.ENOENT, unix.ENODEV:
		return fmt.Errorf("open %s: %w: load the kernel's module: modprobe tun", path, err)
	case unix.EACCES, unix.EPERM:
		return fmt.Errorf("open %s: %w: run as root, or give the user the right to the file", path, err)
	default:
		return fmt.Errorf("open %s: %w", path, err)
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("interface name %q: expected 1 to 15 characters: %w", name, err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	switch err := unix.IoctlIfreq(t.fd, unix.TUNSETIFF, req); err {
	case nil:
	case unix.EPERM:
		return fmt.Errorf("interface %s: %w: run as root, or have root make it for you: ip tuntap add dev %s mode tap user USER", name, err, name)
	case unix.EBUSY:
		return fmt.Errorf("interface %s: %w: another program uses it", name, err)
	case unix.EINVAL:
		return fmt.Errorf("interface %s: %w: expected a TAP interface with one queue, or none of that name", name, err)
	default:
		return fmt.Errorf("interface %s: %w", name, err)
	}
	t.name = req.Name()
	// What others may have left there, and what the kernel may leave to us.
	if err := unix.IoctlSetPointerInt(t.fd, unix.TUNSETVNETHDRSZ, vnetLen); err != nil {
		return fmt.Errorf("interface %s: headers of %d bytes: %w", t.name, vnetLen, err)
	}
	if err := unix.IoctlSetInt(t.fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6|unix.TUN_F_TSO_ECN); err != nil {
		return fmt.Errorf("interface %s: offloads: %w", t.name, err)
	}
	// No carrier before there is a peer. Kernels before 4.20 do without.
	t.setCarrier(false)
	return nil
}

// configure gives an interface what is not as it should be already, so that
// nothing needs a privilege where everything is.
func configure(link netlink.Link, c Config) error {
	a := link.Attrs()
	fail := func(what string, err error) error {
		return fmt.Errorf("interface %s: %s: %w", a.Name, what, err)
	}
	if c.MAC != nil && a.HardwareAddr.String() != c.MAC.String() {
		if err := netlink.LinkSetHardwareAddr(link, c.MAC); err != nil {
			return fail(fmt.Sprintf("set address %v", c.MAC), err)
		}
	}
	if c.MTU != 0 && a.MTU != c.MTU {
		if err := netlink.LinkSetMTU(link, c.MTU); err != nil {
			return fail(fmt.Sprintf("set MTU %d", c.MTU), err)
		}
	}
	if len(c.Addresses) == 0 {
		return nil
	}
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fail("list addresses", err)
	}
	has := map[string]bool{}
	for _, h := range have {
		has[h.IPNet.String()] = true
	}
	for _, p := range c.Addresses {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if has[addr.IPNet.String()] {
			continue
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fail(fmt.Sprintf("add address %v", p), err)
		}
	}
	return nil
}

// Name is the interface's name.
func (t *Interface) Name() string { return t.name }

// Attributes are what the kernel says of the interface now.
func (t *Interface) Attributes() (*netlink.LinkAttrs, error) {
	link, err := netlink.LinkByIndex(t.index)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", t.name, err)
	}
	return link.Attrs(), nil
}

// Addresses are the interface's addresses.
func (t *Interface) Addresses() ([]netip.Prefix, error) {
	list, err := netlink.AddrList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: t.index}}, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", t.name, err)
	}
	var all []netip.Prefix
	for _, a := range list {
		ip, _ := netip.AddrFromSlice(a.IP)
		bits, _ := a.Mask.Size()
		all = append(all, netip.PrefixFrom(ip.Unmap(), bits))
	}
	return all, nil
}

// Stats returns what was counted.
func (t *Interface) Stats() Stats {
	c := &t.stats
	return Stats{
		Sent: c.sent.Load(), Received: c.received.Load(), Truncated: c.truncated.Load(),
		NoCarrier: c.noCarrier.Load(), Down: c.down.Load(), Refused: c.refused.Load(),
	}
}

// setCarrier tells the kernel whether there is a peer.
func (t *Interface) setCarrier(on bool) error {
	v := 0
	if on {
		v = 1
	}
	return unix.IoctlSetPointerInt(t.fd, unix.TUNSETCARRIER, v)
}

// Close gives the interface back. Run must have returned.
func (t *Interface) Close() error {
	if t.events != nil {
		t.events.close()
	}
	if t.set != nil {
		t.set.Close()
	}
	if t.kick >= 0 {
		unix.Close(t.kick)
	}
	if t.fd < 0 {
		return nil
	}
	fd := t.fd
	t.fd = -1
	return unix.Close(fd)
}
