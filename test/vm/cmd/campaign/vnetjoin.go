package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// joined is three guests, each with a link to this host, where the kernel joins
// them: docs/vnet.md has the same commands.
type joined struct {
	ctx    context.Context
	r      *Report
	links  []*vm.Service
	guests []*vm.Guest
	hosts  [2]*namespace
	ups    []*exec.Cmd
}

// joinGuests joins three guests by a bridge on one host, and by VXLAN between
// two, and returns what it found for each.
func joinGuests(ctx context.Context, r *Report) (rows [][]string, err error) {
	j := &joined{ctx: ctx, r: r}
	defer j.close()
	if err := j.boot(); err != nil {
		return nil, err
	}
	for i := range j.hosts {
		if j.hosts[i], err = newNamespace(); err != nil {
			return nil, err
		}
	}
	for _, step := range []struct {
		name string
		run  func() error
	}{
		{"three guests in one bridge", j.bridge},
		{"three guests, two hosts, VXLAN", j.vxlan},
	} {
		r.say("%s", step.name)
		begin := time.Now()
		if err := errors.Join(step.run()); err != nil {
			return rows, fmt.Errorf("%s: %w", step.name, err)
		}
		if err := j.allReachAll(); err != nil {
			return rows, fmt.Errorf("%s: %w", step.name, err)
		}
		rows = append(rows, []string{step.name, "all reach all", fmt.Sprintf("%.1f", time.Since(begin).Seconds())})
	}
	return rows, nil
}

func (j *joined) close() {
	for _, c := range j.ups {
		c.Process.Kill()
		c.Wait()
	}
	for _, h := range j.hosts {
		if h != nil {
			h.close()
		}
	}
	for _, g := range j.guests {
		g.Close()
	}
	for _, l := range j.links {
		l.Close()
	}
}

// boot boots the guests and gives them addresses.
func (j *joined) boot() error {
	var configs []vm.Config
	for i := range 3 {
		l, err := vm.Serve(j.ctx, nil, "--protocol", "1", "--peers", "2", "--vectors", "2", "--rw", "0", "--output", "256K", "--quiet")
		if err != nil {
			return err
		}
		j.links = append(j.links, l)
		configs = append(configs, vm.Config{
			Name: fmt.Sprintf("guest%d", i), Driver: "vfio-pci", Devices: []vm.Device{{Socket: l.Socket}},
			Packages: vnetPackages, Modules: []string{"tun"}, Progress: func(s string) { j.r.say("%s", s) },
		})
	}
	j.r.say("booting 3 guests")
	var err error
	if j.guests, err = vm.StartAll(j.ctx, configs); err != nil {
		return err
	}
	for i := range j.guests {
		up := fmt.Sprintf("ivshctl net up --name ivsh0 --mtu 1400 --address 10.7.0.%d/24 >/tmp/up 2>&1 & until grep ready /tmp/up; do sleep 0.1; done", i+1)
		if _, err := guestShell(j.ctx, j.guests[i], up); err != nil {
			return err
		}
	}
	return nil
}

// up starts the host's end of a link in a name space, and puts its interface
// into the bridge there.
func (j *joined) up(host *namespace, i int) error {
	ivshctl, err := vm.HostBinary(j.ctx, "ivshctl")
	if err != nil {
		return err
	}
	name := fmt.Sprintf("guest%d", i)
	cmd := exec.CommandContext(j.ctx, ivshctl, "net", "up", "--name", name, "--mtu", "1400", "--device", j.links[i].Socket)
	cmd.Stdout = newLineWatch("ready")
	if err := host.startReady(cmd); err != nil {
		return err
	}
	j.ups = append(j.ups, cmd)
	return host.join(name)
}

// join puts an interface into the bridge of a name space, which it makes if
// there is none, and brings it up.
func (n *namespace) join(name string) error {
	bridge, err := n.netlink.LinkByName("br0")
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		if err = n.netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}); err == nil {
			bridge, err = n.netlink.LinkByName("br0")
		}
	}
	if err != nil {
		return err
	}
	l, err := n.netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return errors.Join(n.netlink.LinkSetMaster(l, bridge), n.netlink.LinkSetUp(l), n.netlink.LinkSetUp(bridge))
}

// bridge has all links end in one bridge of one host.
func (j *joined) bridge() error {
	for i := range j.guests {
		if err := j.up(j.hosts[0], i); err != nil {
			return err
		}
	}
	return nil
}

// vxlan moves the last guest's link to another host, and joins both hosts'
// bridges over their network.
func (j *joined) vxlan() error {
	last := len(j.guests) - 1
	moved := j.ups[last]
	j.ups = j.ups[:last]
	moved.Process.Signal(unix.SIGTERM)
	if err := moved.Wait(); err != nil {
		return err
	}
	if err := veth(j.hosts[0], j.hosts[1], "wire0"); err != nil {
		return err
	}
	for i, h := range j.hosts {
		own, other := net.IPv4(192, 168, 9, byte(1+i)), net.IPv4(192, 168, 9, byte(2-i))
		if err := h.configure("wire0", own.String()+"/24", 1500); err != nil {
			return err
		}
		wire, err := h.netlink.LinkByName("wire0")
		if err != nil {
			return err
		}
		tunnel := &netlink.Vxlan{
			LinkAttrs: netlink.LinkAttrs{Name: "vxlan42"}, VxlanId: 42, Port: 4789, Learning: true,
			VtepDevIndex: wire.Attrs().Index, SrcAddr: own, Group: other,
		}
		if err := h.netlink.LinkAdd(tunnel); err != nil {
			return fmt.Errorf("vxlan: %w", err)
		}
		if err := h.join("vxlan42"); err != nil {
			return err
		}
	}
	return j.up(j.hosts[1], last)
}

// allReachAll pings between all pairs: small packets, and the longest.
func (j *joined) allReachAll() error {
	for i, g := range j.guests {
		for k := range j.guests {
			if i == k {
				continue
			}
			for _, size := range []int{56, 1400 - 28} {
				script := fmt.Sprintf("/usr/bin/ping -q -M do -s %d -c 1 -W 2 10.7.0.%d", size, k+1)
				var err error
				for end := time.Now().Add(2 * patience); time.Now().Before(end); {
					if _, err = guestShell(j.ctx, g, script); err == nil {
						break
					}
				}
				if err != nil {
					return fmt.Errorf("guest %d to guest %d, %d bytes: %w", i, k, size, err)
				}
			}
		}
	}
	return nil
}

// guestShell runs a script in a guest and returns what it printed.
func guestShell(ctx context.Context, g *vm.Guest, script string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*patience)
	defer cancel()
	res, err := g.Run(ctx, "/bin/sh", "-ec", script)
	if err != nil {
		return "", err
	}
	if res.ExitCode() != 0 {
		return "", fmt.Errorf("%s: %s: %v\n%s%s", g.Name(), strings.TrimSpace(script), res.Status, res.Stdout, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout)), nil
}
