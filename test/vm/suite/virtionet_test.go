package suite

import (
	"bytes"
	"context"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/vnet"
)

// netDriver is a driver of a network card, as bytes of the virtio
// specification.
type netDriver struct {
	*testing.T
	d       *virtio.Driver
	in, out *virtio.DriverQueue
	buffer  *virtio.Buffer // to send from
}

// openCard takes the card at the other end of the link into use: what it sends
// and takes may have checksums that are to be completed.
func openCard(t *testing.T, dev *ivshmem.Device) *netDriver {
	t.Helper()
	ctx := deadline(t)
	n := &netDriver{T: t}
	var err error
	if n.d, err = virtio.Open(ctx, dev, virtio.DriverConfig{ID: 1, Features: 1<<0 | 1<<1 | 1<<3 | 1<<5 | 1<<15 | 1<<16}); err != nil {
		t.Fatal(err)
	}
	if n.in, err = n.d.SetUpQueue(ctx, 0, 32); err != nil {
		t.Fatal(err)
	}
	if n.out, err = n.d.SetUpQueue(ctx, 1, 8); err != nil {
		t.Fatal(err)
	}
	for range n.in.Size() {
		b, err := n.d.Alloc(1600)
		if err == nil {
			err = n.in.Add(b, virtio.In(0, 1600))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if n.buffer, err = n.d.Alloc(4096); err != nil {
		t.Fatal(err)
	}
	if err := n.d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := n.in.Kick(); err != nil {
		t.Fatal(err)
	}
	return n
}

// send sends a frame.
func (n *netDriver) send(header, frame []byte) {
	n.Helper()
	p := append(bytes.Clone(header), frame...)
	if _, err := n.buffer.WriteAt(p, 0); err != nil {
		n.Fatal(err)
	}
	if err := n.out.Add(n.buffer, virtio.Out(0, len(p))); err != nil {
		n.Fatal(err)
	}
	if err := n.out.Kick(); err != nil {
		n.Fatal(err)
	}
	if _, _, err := n.out.Next(deadline(n.T)); err != nil {
		n.Fatal(err)
	}
}

// receive waits for a frame that is wanted; others are none of ours.
func (n *netDriver) receive(what string, wanted func(frame []byte) bool) {
	n.Helper()
	ctx := deadline(n.T)
	for {
		b, written, err := n.in.Next(ctx)
		if err != nil {
			n.Fatalf("%s: %v", what, err)
		}
		p := make([]byte, written)
		b.ReadAt(p, 0)
		if err := n.in.Add(b, virtio.In(0, b.Size())); err != nil {
			n.Fatal(err)
		}
		n.in.Kick()
		if len(p) > 26 && p[10] == 1 && wanted(p[12:]) {
			return
		}
	}
}

// internet makes a frame of IPv4 from 10.0.0.2 to 10.0.0.1.
func internet(protocol byte, payload []byte) []byte {
	ip := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1}
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip))
	return append(append([]byte("\x02\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x02\x08\x00"), ip...), payload...)
}

// onesSum is the sum that the checksums of the Internet are the inverse of.
func onesSum(p []byte) uint16 {
	var s uint32
	for i := 0; i < len(p); i += 2 {
		s += uint32(p[i]) << 8
		if i+1 < len(p) {
			s += uint32(p[i+1])
		}
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// TestVirtioNet talks to the network of a guest's kernel through a network card
// that `ivshctl net up` is.
func TestVirtioNet(t *testing.T) {
	s := serve(t, "--protocol", "0x8001", "--peers", "2", "--vectors", "3", "--rw", "4M", "--output", "0", "--socket-per-peer")
	g := guests(t, s, vm.Config{Driver: "vfio-pci", Modules: []string{"tun"}, Devices: []vm.Device{{Socket: s.Socket + ".0"}}})[0]
	up := start(t, g, "ivshctl", "net", "up", "--name", "ivsh0", "--mac", "02:00:00:00:00:01", "--address", "10.0.0.1/24", "--mtu", "1500", "--peer-mac", "02:00:00:00:00:02")
	if l := up.line(); l != "ready ivsh0" {
		t.Fatal(l)
	}
	dev, err := ivshmem.Open(s.Socket + ".1")
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for i := range 2 { // one driver after the other
		n := openCard(t, dev)
		n.exchange(g)
		if i == 0 { // more than it has buffers
			run(t, g, 0, "sh", "-c", sendMany)
		}
		if err := n.d.Close(); err != nil {
			t.Fatal(err)
		}
		carrier(t, g, "0")
	}
	if out := run(t, g, 0, "ivshctl", "net", "status"); !strings.Contains(out, "without carrier") {
		t.Error(out)
	}
	run(t, g, 0, "ivshctl", "net", "down")
	up.end(0)
}

// sendMany has the interface send about 100 frames for everybody, and nobody answers.
const sendMany = "for i in $(seq 100); do ping -c 1 -W 1 -s 1400 10.0.0.255 >/dev/null & done; wait"

// TestNetLeft has a peer of virtual Ethernet leave that does not take what the
// interface has to send.
func TestNetLeft(t *testing.T) {
	s := serve(t, "--protocol", "1", "--peers", "2", "--vectors", "2", "--rw", "0", "--output", "64K", "--socket-per-peer")
	g := guests(t, s, vm.Config{Driver: "vfio-pci", Modules: []string{"tun"}, Devices: []vm.Device{{Socket: s.Socket + ".0"}}})[0]
	up := start(t, g, "ivshctl", "net", "up", "--name", "ivsh0", "--address", "10.0.0.1/24", "--mtu", "1500")
	if l := up.line(); l != "ready ivsh0" {
		t.Fatal(l)
	}
	dev, err := ivshmem.Open(s.Socket + ".1")
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for range 2 {
		link, err := vnet.Open(dev, vnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		carrier(t, g, "1")
		run(t, g, 0, "sh", "-c", sendMany)
		if err := link.Close(); err != nil {
			t.Fatal(err)
		}
		carrier(t, g, "0")
	}
	if out := run(t, g, 0, "ivshctl", "net", "status"); !strings.Contains(out, "without carrier") {
		t.Error(out)
	}
	run(t, g, 0, "ivshctl", "net", "down")
	up.end(0)
}

// carrier waits until the interface has carrier, or has none.
func carrier(t *testing.T, g *vm.Guest, want string) {
	t.Helper()
	run(t, g, 0, "sh", "-c", "until grep -q "+want+" /sys/class/net/ivsh0/carrier; do sleep 0.1; done")
}

func (n *netDriver) exchange(g *vm.Guest) {
	n.Helper()
	t := n.T
	config := make([]byte, 12)
	if err := n.d.ReadConfig(deadline(t), config, 0); err != nil || !bytes.Equal(config, []byte{2, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0xdc, 5}) {
		t.Errorf("configuration % x, %v", config, err)
	}
	carrier(t, g, "1")
	plain := make([]byte, 12)
	arp := "\x00\x01\x08\x00\x06\x04"
	n.send(plain, []byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x02\x08\x06"+arp+
		"\x00\x01\x02\x00\x00\x00\x00\x02\x0a\x00\x00\x02\x00\x00\x00\x00\x00\x00\x0a\x00\x00\x01"))
	n.receive("the answer to ARP", func(f []byte) bool {
		return bytes.HasPrefix(f, []byte("\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01\x08\x06"+arp+"\x00\x02\x02\x00\x00\x00\x00\x01\x0a\x00\x00\x01"))
	})
	echo := append([]byte("\x08\x00\x00\x00\x00\x07\x00\x01"), bytes.Repeat([]byte("ping"), 350)...)
	binary.BigEndian.PutUint16(echo[2:], ^onesSum(echo))
	n.send(plain, internet(1, echo))
	n.receive("the answer to a ping", func(f []byte) bool { return len(f) == 14+20+len(echo) && bytes.Equal(f[14+20+4:], echo[4:]) })
	// To a port that nobody has: if the checksum were not completed, there would
	// be no answer.
	udp := []byte("\x00\x09\x1b\x58\x00\x0c\x00\x00data")
	binary.BigEndian.PutUint16(udp[6:], onesSum([]byte("\x0a\x00\x00\x02\x0a\x00\x00\x01\x00\x11\x00\x0c")))
	n.send([]byte("\x01\x00\x00\x00\x00\x00\x22\x00\x06\x00\x00\x00"), internet(17, udp))
	n.receive("that a port is closed", func(f []byte) bool { return len(f) > 36 && f[23] == 1 && f[34] == 3 && f[35] == 3 })
	if out := run(t, g, 0, "ivshctl", "net", "status"); !strings.Contains(out, " carrier, 02:00:00:00:00:01, MTU 1500") || !strings.Contains(out, "received") {
		t.Error(out)
	}
	for _, c := range []struct {
		how  string
		want byte
	}{{"down", 0}, {"up", 1}} {
		run(t, g, 0, "ip", "link", "set", "ivsh0", c.how)
		for config[6] != c.want {
			if err := n.d.ConfigChanged(deadline(t)); err != nil {
				t.Fatal(err)
			}
			if err := n.d.ReadConfig(context.Background(), config, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
}
