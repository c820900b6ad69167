package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// The ways between two name spaces that are compared.
const (
	wayVnet      = "vnet"
	wayForward   = "TAPs and a Unix socket"
	wayVethPlain = "veth, offloads off"
	wayVeth      = "veth"
)

var ways = []string{wayVethPlain, wayVnet, wayForward, wayVeth}

// vnetBench compares virtual Ethernet on the host with what else joins two
// networks there.
type vnetBench struct {
	ctx   context.Context
	r     *Report
	dir   string
	tools string // folder of unpacked packages
	floor string
	a, b  *namespace
}

// ethernetBench measures virtual Ethernet between two name spaces of the host.
func ethernetBench(ctx context.Context, r *Report) error {
	if err := hostNetworks(); err != nil {
		r.say("not possible here: %v: run it as root, with /dev/net/tun", err)
		if r.Sabotage {
			return fmt.Errorf("sabotaged, as far as it is possible here: %w", err)
		}
		r.info("interfaces can be made here", 0)
		return nil
	}
	v := &vnetBench{ctx: ctx, r: r}
	if err := v.prepare(); err != nil {
		return err
	}
	defer os.RemoveAll(v.dir)
	mtus := []int{1500, 16384}
	if r.Quick {
		mtus = mtus[:1]
	}
	for begin, rounds := time.Now(), 0; rounds < 1 || !r.Quick && (rounds < 7 || time.Since(begin) < r.Duration); rounds++ {
		for _, mtu := range mtus {
			if err := v.round(mtu); err != nil {
				return err
			}
		}
		r.Config["rounds"] = rounds + 1
	}
	r.Config["machine"] = cpuModel()
	v.tables(mtus)
	// In a second, and beside whatever else the machine does, only the difference
	// from what is no competitor says anything.
	bar := func(least float64) float64 {
		if r.Quick {
			return 0
		}
		return least
	}
	for _, mtu := range mtus {
		v.ratio(mtu, wayVethPlain, bar(0.5))
		v.ratio(mtu, wayForward, 2)
		if !r.Sabotage {
			rest := median(r.Samples[sampleName(mtu, wayVnet, splits[0]+", rest_percent")])
			r.count(fmt.Sprintf("MTU %d: percent of the CPU time that is no TAP system call, each frame a call", mtu), rest, "<= 15", rest <= 15 || r.Quick)
		}
	}
	return nil
}

func (v *vnetBench) prepare() (err error) {
	cache, err := fetch.Open(func(s string) { v.r.say("%s", s) })
	if err != nil {
		return err
	}
	if v.tools, err = cache.Packages(v.ctx, fetch.Trixie, vm.AMD64, []string{"iperf3", "iputils-ping"}); err != nil {
		return err
	}
	if v.dir, err = os.MkdirTemp("", "ivshmem-campaign-"); err != nil {
		return err
	}
	v.floor = filepath.Join(v.dir, "net")
	source := filepath.Join(os.Getenv("IVSHMEM_SOURCE"), "test/floor/net.c")
	if text, err := exec.CommandContext(v.ctx, "cc", "-O2", "-Wall", "-Werror", "-pthread", "-o", v.floor, source).CombinedOutput(); err != nil {
		return fmt.Errorf("compile the floor: %w\n%s", err, text)
	}
	return nil
}

// tool is the command line of an unpacked program: its libraries are those that
// it was unpacked with.
func (v *vnetBench) tool(name string, args ...string) []string {
	return append([]string{v.tools + "/usr/lib64/ld-linux-x86-64.so.2", "--library-path", v.tools + "/usr/lib/x86_64-linux-gnu", v.tools + "/usr/bin/" + name}, args...)
}

func sampleName(mtu int, way, what string) string { return fmt.Sprintf("%d, %s, %s", mtu, way, what) }

// round measures each way once, in new name spaces.
func (v *vnetBench) round(mtu int) (err error) {
	if v.a, err = newNamespace(); err != nil {
		return err
	}
	defer v.a.close()
	if v.b, err = newNamespace(); err != nil {
		return err
	}
	defer v.b.close()
	for i, way := range ways {
		run := way
		if v.r.Sabotage && way == wayVnet {
			run = wayForward
		}
		if err := v.measure(run, way, fmt.Sprintf("10.%d.0.", i+1), mtu); err != nil {
			return fmt.Errorf("MTU %d, %s: %w", mtu, way, err)
		}
	}
	return nil
}

// measure sets a way up, and measures it under a name.
func (v *vnetBench) measure(way, name, network string, mtu int) error {
	iface := "bench0"
	var stop func()
	var err error
	switch way {
	case wayVnet:
		stop, err = v.startVnet(iface, mtu)
	case wayForward:
		stop, err = v.startForward(iface)
	default:
		if err = veth(v.a, v.b, iface); err == nil && way == wayVethPlain {
			_, err = v.a.output(v.ctx, v.floor, "offloads-off", iface)
			if err == nil {
				_, err = v.b.output(v.ctx, v.floor, "offloads-off", iface)
			}
		}
		stop = func() {
			if l, err := v.a.netlink.LinkByName(iface); err == nil {
				v.a.netlink.LinkDel(l)
			}
		}
	}
	if err != nil {
		return err
	}
	defer stop()
	if err := errors.Join(v.a.configure(iface, network+"1/24", mtu), v.b.configure(iface, network+"2/24", mtu)); err != nil {
		return err
	}
	seconds := 2
	if v.r.Quick {
		seconds = 1
	}
	record := func(what string, value float64) { v.r.sample(sampleName(mtu, name, what), value) }
	if err := v.reach(network + "2"); err != nil {
		return err
	}
	rtt, err := v.ping(network + "2")
	if err != nil {
		return err
	}
	record("ping_us", rtt)
	tcp, err := v.iperf(network+"2", seconds)
	if err != nil {
		return err
	}
	record("tcp_gbit", tcp.Received.Bits/1e9)
	udp, err := v.iperf(network+"2", seconds, "-u", "-b", "0", "-l", "64")
	if err != nil {
		return err
	}
	record("small_kpps", udp.Received.Bytes/64/udp.Received.Seconds/1e3)
	if name == wayVnet && way == wayVnet {
		return v.split(network, mtu, record)
	}
	return nil
}

// iperfEnd is what iperf3 says at the end.
type iperfEnd struct {
	Received struct {
		Bits    float64 `json:"bits_per_second"`
		Bytes   float64 `json:"bytes"`
		Seconds float64 `json:"seconds"`
	} `json:"sum_received"`
}

// iperf sends from a to b.
func (v *vnetBench) iperf(to string, seconds int, args ...string) (iperfEnd, error) {
	ctx, cancel := context.WithTimeout(v.ctx, patience)
	defer cancel()
	argv := v.tool("iperf3", "-s", "-1", "-B", to, "--forceflush")
	server := exec.CommandContext(ctx, argv[0], argv[1:]...)
	server.Stdout = newLineWatch("Server listening")
	if err := v.b.startReady(server); err != nil {
		return iperfEnd{}, err
	}
	defer server.Wait()
	defer server.Process.Kill()
	out, err := v.a.output(ctx, v.tool("iperf3", append([]string{"-J", "-c", to, "-t", strconv.Itoa(seconds)}, args...)...)...)
	if err != nil {
		return iperfEnd{}, err
	}
	var f struct{ End iperfEnd }
	if err := json.Unmarshal(out, &f); err != nil {
		return iperfEnd{}, err
	}
	if f.End.Received.Bytes == 0 {
		return iperfEnd{}, errors.New("iperf3: nothing arrived")
	}
	return f.End, nil
}

// reach waits until b answers a.
func (v *vnetBench) reach(to string) error {
	ctx, cancel := context.WithTimeout(v.ctx, patience)
	defer cancel()
	for {
		_, err := v.a.output(ctx, v.tool("ping", "-q", "-c", "1", "-W", "1", to)...)
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// ping returns the average round trip in microseconds.
func (v *vnetBench) ping(to string) (float64, error) {
	ctx, cancel := context.WithTimeout(v.ctx, patience)
	defer cancel()
	out, err := v.a.output(ctx, v.tool("ping", "-q", "-c", "100", "-i", "0.005", to)...)
	if err != nil {
		return 0, err
	}
	_, times, _ := strings.Cut(string(out), "min/avg/max/mdev = ")
	ms, err := strconv.ParseFloat(strings.Split(times+"/?", "/")[1], 64)
	if err != nil {
		return 0, fmt.Errorf("ping: %s", out)
	}
	return 1000 * ms, nil
}

// startForward joins two TAP interfaces by the floor's forwarder.
func (v *vnetBench) startForward(iface string) (func(), error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var children []*exec.Cmd
	stop := func() {
		for _, c := range children {
			c.Process.Kill()
			c.Wait()
		}
	}
	for i, n := range []*namespace{v.a, v.b} {
		f := os.NewFile(uintptr(fds[i]), "socket")
		defer f.Close()
		cmd := exec.CommandContext(v.ctx, v.floor, "forward", iface, "3")
		cmd.ExtraFiles, cmd.Stdout = []*os.File{f}, newLineWatch("ready")
		if err := n.startReady(cmd); err != nil {
			stop()
			return nil, err
		}
		children = append(children, cmd)
	}
	return stop, nil
}

// startVnet joins them by a link.
func (v *vnetBench) startVnet(iface string, mtu int) (func(), error) {
	ivshctl, err := vm.HostBinary(v.ctx, "ivshctl")
	if err != nil {
		return nil, err
	}
	return v.startEnds(func(_ int, socket string) *exec.Cmd {
		cmd := exec.CommandContext(v.ctx, ivshctl, "net", "up", "--name", iface, "--mtu", strconv.Itoa(mtu), "--device", socket)
		cmd.Stdout = newLineWatch("ready")
		return cmd
	})
}

// startEnds starts a service, and both ends of its link by commands whose
// standard output is a lineWatch.
func (v *vnetBench) startEnds(command func(i int, socket string) *exec.Cmd) (func(), error) {
	service, err := vm.Serve(v.ctx, nil, "--protocol", "1", "--peers", "2", "--vectors", "2", "--rw", "0", "--output", "4M", "--quiet")
	if err != nil {
		return nil, err
	}
	var children []*exec.Cmd
	stop := func() {
		for _, c := range children {
			c.Process.Signal(unix.SIGTERM)
			c.Wait()
		}
		service.Close()
	}
	for i, n := range []*namespace{v.a, v.b} {
		cmd := command(i, service.Socket)
		cmd.Stderr = os.Stderr
		if err := n.startReady(cmd); err != nil {
			stop()
			return nil, err
		}
		children = append(children, cmd)
	}
	return stop, nil
}
