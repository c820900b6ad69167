package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is a network name space of this host: a machine's network.
type namespace struct {
	id      netns.NsHandle
	netlink *netlink.Handle
}

// newNamespace makes one. It needs the rights of root.
func newNamespace() (n *namespace, err error) {
	n = &namespace{id: netns.None()}
	err = away(func() (err error) {
		if n.id, err = netns.New(); err != nil {
			return fmt.Errorf("make a network name space: %w", err)
		}
		n.netlink, err = netlink.NewHandleAt(n.id)
		return err
	})
	if err == nil {
		err = n.up("lo")
	}
	if err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *namespace) close() {
	if n.netlink != nil {
		n.netlink.Close()
	}
	n.id.Close()
}

// away runs f on a thread that comes back to the name space it was in.
func away(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		return err
	}
	defer home.Close()
	return errors.Join(f(), netns.Set(home))
}

// start starts a command in the name space.
func (n *namespace) start(cmd *exec.Cmd) error {
	return away(func() error {
		if err := netns.Set(n.id); err != nil {
			return err
		}
		return cmd.Start()
	})
}

// startReady starts a command whose standard output is a lineWatch, and waits
// until it has seen what it waits for.
func (n *namespace) startReady(cmd *exec.Cmd) error {
	if err := n.start(cmd); err != nil {
		return err
	}
	select {
	case <-cmd.Stdout.(*lineWatch).seen:
		return nil
	case <-time.After(patience):
		cmd.Process.Kill()
		cmd.Wait()
		return fmt.Errorf("%s does not get ready", cmd)
	}
}

// output runs a command in the name space, and returns what it printed.
func (n *namespace) output(ctx context.Context, argv ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := n.start(cmd); err != nil {
		return nil, err
	}
	out, err := io.ReadAll(pipe)
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return out, fmt.Errorf("%q: %w: %s", argv, err, out)
	}
	return out, nil
}

func (n *namespace) up(name string) error {
	l, err := n.netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return n.netlink.LinkSetUp(l)
}

// configure gives an interface an address and an MTU, and brings it up.
func (n *namespace) configure(name, address string, mtu int) error {
	l, err := n.netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	a, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	if err := n.netlink.AddrReplace(l, a); err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	return errors.Join(n.netlink.LinkSetMTU(l, mtu), n.netlink.LinkSetUp(l))
}

// veth joins two name spaces by a pair of interfaces of the same name.
func veth(a, b *namespace, name string) error {
	peer := netlink.LinkAttrs{Name: name}
	pair := &netlink.Veth{LinkAttrs: peer, PeerName: name, PeerNamespace: netlink.NsFd(b.id)}
	if err := a.netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("veth: %w", err)
	}
	return nil
}

// hostNetworks reports why this process cannot make networks, if so.
func hostNetworks() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/net/tun: %w", err)
	}
	unix.Close(fd)
	n, err := newNamespace()
	if err != nil {
		return err
	}
	n.close()
	return nil
}
