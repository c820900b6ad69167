package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
)

// vnetPackages are what virtual Ethernet is tried with in guests.
var vnetPackages = []string{"iperf3", "iproute2", "iputils-ping", "openssh-client", "openssh-server", "radvd"}

// vnetPair is two guests with virtual Ethernet between them.
type vnetPair struct {
	ctx     context.Context
	r       *Report
	guests  []*vm.Guest
	ups     [2]*checks.Process
	service *vm.Service
}

func (v *vnetPair) close() {
	for _, g := range v.guests {
		g.Close()
	}
	v.service.Close()
}

// ethernet has two guests talk over virtual Ethernet as people use a network,
// and joins guests by this host, where that is possible.
func ethernet(ctx context.Context, r *Report) error {
	rows, err := pairOfGuests(ctx, r)
	r.atLeast("checks", float64(len(rows)), vnetChecks)
	if err == nil && !r.Sabotage {
		if why := hostNetworks(); why != nil {
			rows = append(rows, []string{"guests joined by the host", fmt.Sprintf("not possible here: %v: run it as root, with /dev/net/tun", why), ""})
		} else {
			var more [][]string
			more, err = joinGuests(ctx, r)
			rows = append(rows, more...)
			r.atLeast("ways to join guests", float64(len(more)), 2)
		}
	}
	r.Tables = []Table{{Title: "Guests with virtual Ethernet, under emulation", Head: []string{"what", "found", "s"}, Rows: rows}}
	return err
}

// vnetChecks is the number of checks of a pair.
const vnetChecks = 12

func pairOfGuests(ctx context.Context, r *Report) (rows [][]string, err error) {
	v, err := startVnet(ctx, r)
	if err != nil {
		return nil, err
	}
	defer v.close()
	megabytes := 100
	if r.Quick {
		megabytes = 8
	}
	r.Config["scp_mib"] = megabytes
	for _, step := range []struct {
		name string
		run  func() (string, error)
	}{
		{"ping", v.ping},
		{"iperf3 TCP, 0 to 1", func() (string, error) { return v.iperf() }},
		{"iperf3 TCP, 1 to 0", func() (string, error) { return v.iperf("-R") }},
		{"iperf3 UDP, 0 to 1", func() (string, error) { return v.iperf("-u", "-b", "2M", "-l", "1000") }},
		{"iperf3 UDP, 1 to 0", func() (string, error) { return v.iperf("-u", "-b", "2M", "-l", "1000", "-R") }},
		{fmt.Sprintf("scp of %d MiB", megabytes), func() (string, error) { return v.scp(megabytes) }},
		{"IPv6 autoconfiguration", v.autoconfiguration},
		{"VLAN tags", v.vlan},
		{"MTU", v.mtus},
		{"down and up", v.downAndUp},
		{"killed", v.killed},
		{"ordinary user", v.ordinaryUser},
	} {
		r.say("%s", step.name)
		begin := time.Now()
		found, err := step.run()
		if err != nil {
			for i, up := range v.ups {
				if text := up.Stderr(); text != "" {
					err = fmt.Errorf("%w\nnet up of guest %d: %s", err, i, text)
				}
			}
			r.Failures = append(r.Failures, fmt.Sprintf("%s: %v", step.name, err))
			if r.Sabotage || ctx.Err() != nil {
				break
			}
			continue
		}
		rows = append(rows, []string{step.name, found, fmt.Sprintf("%.1f", time.Since(begin).Seconds())})
	}
	return rows, nil
}

// startVnet boots the guests, with an MTU that every IP version has to offer.
func startVnet(ctx context.Context, r *Report) (*vnetPair, error) {
	service, err := vm.Serve(ctx, nil, "--protocol", "1", "--peers", "2", "--vectors", "2", "--rw", "0", "--output", "1M", "--quiet")
	if err != nil {
		return nil, err
	}
	v := &vnetPair{ctx: ctx, r: r, service: service}
	config := vm.Config{
		Driver: "vfio-pci", Devices: []vm.Device{{Socket: service.Socket}}, Memory: 640,
		Packages: vnetPackages, Modules: []string{"tun", "8021q"}, Progress: func(s string) { r.say("%s", s) },
	}
	configs := []vm.Config{config, config}
	configs[0].Name, configs[1].Name = "guest0", "guest1"
	r.say("booting 2 guests")
	if v.guests, err = vm.StartAll(ctx, configs); err != nil {
		service.Close()
		return nil, err
	}
	for i := range v.guests {
		if err := errors.Join(v.prepare(i), v.up(i)); err != nil {
			v.close()
			return nil, err
		}
	}
	key, err := v.sh(0, "cat /root/key.pub")
	if err == nil {
		_, err = v.sh(1, "echo '"+key+"' >/root/.ssh/authorized_keys; chmod 600 /root/.ssh/authorized_keys")
	}
	if err != nil {
		v.close()
		return nil, err
	}
	if r.Sabotage {
		v.ups[1].Kill()
	}
	return v, nil
}

// prepare gives a guest what its programs expect of a system.
func (v *vnetPair) prepare(i int) error {
	_, err := v.sh(i, `
/usr/bin/ip link set lo up
echo 'sshd:x:100:65534::/run/sshd:/bin/false' >>/etc/passwd
mkdir -p /run/sshd /root/.ssh /etc/ssh
ssh-keygen -q -t ed25519 -N '' -f /root/key
chmod -R go-rwx /root
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
/usr/sbin/sshd -f /dev/null -o UsePAM=no -o 'Subsystem=sftp internal-sftp'
iperf3 -s -D`)
	return err
}

// up starts `ivshctl net up` in a guest.
func (v *vnetPair) up(i int) (err error) {
	v.ups[i], err = checks.Start(checks.Guest(v.guests[i]), "ivshctl", "net", "up", "--name", "ivsh0", "--mtu", "1500",
		"--mac", fmt.Sprintf("02:00:00:00:00:%02x", i+1), "--address", fmt.Sprintf("10.0.0.%d/24", i+1))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(v.ctx, patience)
	defer cancel()
	line, err := v.ups[i].Line(ctx)
	if err == nil && line != "ready ivsh0" {
		err = fmt.Errorf("net up: %q", line)
	}
	return err
}

// sh runs a script in a guest and returns what it printed.
func (v *vnetPair) sh(i int, script string) (string, error) {
	return guestShell(v.ctx, v.guests[i], script)
}

// eventually runs a script in a guest until it succeeds.
func (v *vnetPair) eventually(i int, script string) (out string, err error) {
	limit := 2 * patience
	if v.r.Sabotage {
		limit = 5 * time.Second
	}
	for end := time.Now().Add(limit); time.Now().Before(end) && v.ctx.Err() == nil; {
		if out, err = v.sh(i, script); err == nil {
			return out, nil
		}
	}
	return "", err
}

// pings sends packets that must not be fragmented, all of which have to come
// back, and returns the median of their round trips.
func (v *vnetPair) pings(to string, size, count int) (string, error) {
	out, err := v.sh(0, fmt.Sprintf("/usr/bin/ping -M do -s %d -c %d -i 0.02 -W 20 %s", size, count, to))
	if err != nil {
		return "", err
	}
	if !strings.Contains(out, " 0% packet loss") {
		return "", errors.New(out)
	}
	_, times, _ := strings.Cut(out, "min/avg/max/mdev = ")
	return strings.Split(times+"/?", "/")[1], nil
}

func (v *vnetPair) ping() (string, error) {
	if _, err := v.eventually(0, "/usr/bin/ping -q -c 1 -W 2 10.0.0.2"); err != nil {
		return "", err
	}
	average, err := v.pings("10.0.0.2", 56, 100)
	return "100 of 100, " + average + " ms on average", err
}

// iperf runs the client in guest 0, and returns what the receiver got.
func (v *vnetPair) iperf(args ...string) (string, error) {
	seconds := max(1, min(10, int(v.r.Duration.Seconds()/10)))
	before, err := v.doorbells()
	if err != nil {
		return "", err
	}
	out, err := v.sh(0, fmt.Sprintf("iperf3 -J -c 10.0.0.2 -t %d %s", seconds, strings.Join(args, " ")))
	if err != nil {
		return "", err
	}
	after, err := v.doorbells()
	if err != nil {
		return "", err
	}
	var f struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
				Bytes         float64
				Packets       float64
				LostPercent   float64 `json:"lost_percent"`
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		return "", err
	}
	got := f.End.Received
	if got.Bytes == 0 {
		return "", errors.New("nothing arrived")
	}
	if len(args) > 0 && args[0] == "-u" {
		if got.LostPercent > 5 {
			return "", fmt.Errorf("%.1f %% lost", got.LostPercent)
		}
		return fmt.Sprintf("%.0f datagrams, %.1f %% lost", got.Packets, got.LostPercent), nil
	}
	bells := (after - before) / (got.Bytes / 1e6)
	v.r.info("doorbells per MB, "+strings.Join(append([]string{"TCP"}, args...), " "), bells)
	v.r.info("MB/s, "+strings.Join(append([]string{"TCP"}, args...), " "), got.BitsPerSecond/8e6)
	return fmt.Sprintf("%.1f MB/s, %.1f doorbells per MB", got.BitsPerSecond/8e6, bells), nil
}

// doorbells is how many both guests rang so far.
func (v *vnetPair) doorbells() (sum float64, err error) {
	for i := range v.guests {
		out, err := v.sh(i, "ivshctl net status --json")
		if err != nil {
			return 0, err
		}
		var list []struct {
			Link struct{ Sent, Received struct{ Doorbells float64 } }
		}
		if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 {
			return 0, fmt.Errorf("net status: %s", out)
		}
		sum += list[0].Link.Sent.Doorbells + list[0].Link.Received.Doorbells
	}
	return sum, nil
}

func (v *vnetPair) scp(megabytes int) (string, error) {
	if _, err := v.sh(0, fmt.Sprintf("dd if=/dev/urandom of=/tmp/data bs=1M count=%d 2>/dev/null", megabytes)); err != nil {
		return "", err
	}
	begin := time.Now()
	if _, err := v.sh(0, "scp -q -F none -i /root/key -o BatchMode=yes -o StrictHostKeyChecking=accept-new /tmp/data root@10.0.0.2:/tmp/data"); err != nil {
		return "", err
	}
	took := time.Since(begin)
	sent, err := v.sh(0, "sha256sum </tmp/data; rm /tmp/data")
	if err != nil {
		return "", err
	}
	arrived, err := v.sh(1, "sha256sum </tmp/data; rm /tmp/data")
	if err == nil && sent != arrived {
		err = fmt.Errorf("sent %s, arrived %s", sent, arrived)
	}
	return fmt.Sprintf("%.1f MB/s, checksum right", float64(megabytes)*1.048576/took.Seconds()), err
}

func (v *vnetPair) autoconfiguration() (string, error) {
	if _, err := v.sh(0, `
/usr/bin/ip addr add fd00:1::1/64 dev ivsh0 nodad
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
cat >/tmp/radvd.conf <<'CONF'
interface ivsh0 { AdvSendAdvert on; MinRtrAdvInterval 3; MaxRtrAdvInterval 4; prefix fd00:1::/64 {}; };
CONF
/usr/sbin/radvd -C /tmp/radvd.conf -p /tmp/radvd.pid -m stderr 2>/tmp/radvd.log`); err != nil {
		return "", err
	}
	address, err := v.eventually(1, "/usr/bin/ip -o -6 addr show dev ivsh0 scope global -tentative | sed -n 's/.*inet6 \\(fd00:1:[^/]*\\).*/\\1/p' | grep .")
	if err != nil {
		return "", err
	}
	if _, err := v.sh(0, "kill $(cat /tmp/radvd.pid)"); err != nil {
		return "", err
	}
	_, err = v.pings(address, 1000, 5)
	return address + " answers", err
}

func (v *vnetPair) vlan() (string, error) {
	for i := range v.guests {
		if _, err := v.sh(i, fmt.Sprintf("/usr/bin/ip link add link ivsh0 name v5 type vlan id 5; /usr/bin/ip addr add 10.5.0.%d/24 dev v5; /usr/bin/ip link set v5 up", i+1)); err != nil {
			return "", err
		}
	}
	if _, err := v.eventually(0, "/usr/bin/ping -q -c 1 -W 2 10.5.0.2"); err != nil {
		return "", err
	}
	_, err := v.pings("10.5.0.2", 1500-28, 20)
	return "20 of 20 of 1500 bytes with tag 5", err
}

// vnetMTUs are tried: the smallest of Ethernet's IPv4 and IPv6, usual ones, and
// the largest that a TAP interface has.
var vnetMTUs = []int{68, 576, 1280, 1500, 9000, 16384, 65521}

func (v *vnetPair) mtus() (string, error) {
	var done []string
	for _, mtu := range vnetMTUs {
		for i := range v.guests {
			if _, err := v.sh(i, fmt.Sprintf("/usr/bin/ip link set ivsh0 mtu %d", mtu)); err != nil {
				return "", err
			}
		}
		// The command follows what the kernel tells it.
		if _, err := v.eventually(0, fmt.Sprintf("ivshctl net status --json | grep '\"mtu\":%d,' >/dev/null", mtu)); err != nil {
			return "", err
		}
		if _, err := v.eventually(0, fmt.Sprintf("/usr/bin/ping -q -M do -s %d -c 1 -W 2 10.0.0.2", mtu-28)); err != nil {
			return "", err
		}
		if _, err := v.pings("10.0.0.2", mtu-28, 20); err != nil {
			return "", fmt.Errorf("MTU %d: %w", mtu, err)
		}
		if mtu >= 1280 {
			if _, err := v.eventually(0, fmt.Sprintf("/usr/bin/ping -q -M do -s %d -c 1 -W 2 fe80::ff:fe00:2%%ivsh0", mtu-48)); err != nil {
				return "", fmt.Errorf("MTU %d, IPv6: %w", mtu, err)
			}
		}
		done = append(done, strconv.Itoa(mtu))
	}
	for i := range v.guests {
		if _, err := v.sh(i, "/usr/bin/ip link set ivsh0 mtu 1500"); err != nil {
			return "", err
		}
	}
	return strings.Join(done, ", "), nil
}

func (v *vnetPair) downAndUp() (string, error) {
	const noCarrier, carrier = "grep 0 /sys/class/net/ivsh0/carrier", "grep 1 /sys/class/net/ivsh0/carrier"
	for _, do := range []struct {
		guest       int
		script      string
		other, then string
	}{
		{0, "/usr/bin/ip link set ivsh0 down", noCarrier, ""},
		{0, "/usr/bin/ip link set ivsh0 up", carrier, "10.0.0.2"},
		{1, "ivshctl net down", "", ""},
	} {
		if _, err := v.sh(do.guest, do.script); err != nil {
			return "", err
		}
		if do.other != "" {
			if _, err := v.eventually(1-do.guest, do.other); err != nil {
				return "", err
			}
		}
		if do.then != "" {
			if _, err := v.eventually(0, "/usr/bin/ping -q -c 1 -W 2 "+do.then); err != nil {
				return "", err
			}
		}
	}
	if _, err := v.sh(1, "! /usr/bin/ip link show ivsh0 2>/dev/null"); err != nil {
		return "", fmt.Errorf("the interface outlived its command: %w", err)
	}
	if _, err := v.eventually(0, noCarrier); err != nil {
		return "", err
	}
	return "carrier follows", v.again()
}

func (v *vnetPair) killed() (string, error) {
	if err := v.ups[1].Signal(unix.SIGKILL); err != nil {
		return "", err
	}
	<-v.ups[1].Done()
	return "came back", v.again()
}

// again brings guest 1's end up again, and waits until it is reached.
func (v *vnetPair) again() error {
	if err := v.up(1); err != nil {
		return err
	}
	_, err := v.eventually(0, "/usr/bin/ping -q -c 1 -W 2 10.0.0.2")
	return err
}

// ordinaryUser has guest 1's end belong to somebody who has an interface, and
// the device, and no other right.
func (v *vnetPair) ordinaryUser() (string, error) {
	if _, err := v.sh(1, `
ivshctl net down
/usr/bin/ip tuntap add dev ivsh0 mode tap user nobody
/usr/bin/ip addr add 10.0.0.2/24 dev ivsh0
/usr/bin/ip link set ivsh0 address 02:00:00:00:00:02 mtu 1400 up
chmod 666 /dev/net/tun
chown nobody /dev/vfio/[0-9]*`); err != nil {
		return "", err
	}
	var err error
	v.ups[1], err = checks.Start(checks.Guest(v.guests[1]), "su", "-s", "/bin/sh", "nobody", "-c", "exec ivshctl net up --name ivsh0")
	if err != nil {
		return "", err
	}
	if _, err := v.eventually(0, "/usr/bin/ping -q -c 1 -W 2 10.0.0.2"); err != nil {
		return "", fmt.Errorf("%w\n%s", err, v.ups[1].Stderr())
	}
	// Taken from the interface, as nobody could change that.
	if _, err := v.sh(1, `su -s /bin/sh nobody -c "ivshctl net status --json" | grep '"mtu":1400,'`); err != nil {
		return "", err
	}
	if _, err := v.sh(1, `su -s /bin/sh nobody -c "ivshctl net down"; /usr/bin/ip link show ivsh0`); err != nil {
		return "", fmt.Errorf("the interface did not outlive its command: %w", err)
	}
	return "a persistent interface, its MTU", nil
}
