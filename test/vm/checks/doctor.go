package checks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// Setup is a device that something is wrong with, and what `ivshctl doctor`
// has to say of it.
type Setup struct {
	Name string
	// Status is that of the check that tells: fail, or warn where the device
	// can be used all the same. It has to be the first one with it.
	Status, Check string
	Cause, Remedy string // of what it finds, and of what it says to do
	Exit          int

	guest  int // 0: with an IOMMU, 1: without
	device string
	script string // what brings the device there
	user   bool   // an ordinary user looks
	gone   bool   // the service has ended
}

// Devices of the first guest, by how their links are served.
const (
	whole     = "0000:00:04.0"
	stateOnly = "0000:00:05.0" // --rw 0 --output 0
	outputs   = "0000:00:06.0" // --rw 0
	strict    = "0000:00:07.0" // --rw 0 --mode strict
	noBAR2    = "0000:00:08.0" // --base-address
	truncated = "0000:00:09.0" // a broken device
)

func bindTo(driver, device string) string {
	return "ivshctl bind --driver " + driver + " " + device
}

// poke writes a byte of a device's configuration space.
func poke(device string, offset int, octal string) string {
	return fmt.Sprintf(`; printf '\%s' | dd of=/sys/bus/pci/devices/%s/config bs=1 seek=%d conv=notrunc 2>/dev/null`, octal, device, offset)
}

// Setups are what the doctor has to know, in an order in which one guest can
// be brought into all of them.
var Setups = []Setup{
	{Name: "no driver", Status: "fail", Check: "driver", Cause: "none is bound", Remedy: "ivshctl bind", Exit: 1,
		device: whole, script: "ivshctl unbind " + whole},
	{Name: "wrong driver", Status: "fail", Check: "driver", Cause: "uio_pci_generic: it cannot deliver MSI-X", Remedy: "ivshctl bind", Exit: 1,
		device: whole, script: bindTo("uio_pci_generic", whole)},
	{Name: "no IOMMU", Status: "fail", Check: "driver", Cause: "there is no IOMMU", Remedy: "intel_iommu=on", Exit: 1, guest: 1, device: whole,
		script: "! " + bindTo("vfio-pci", whole) + " 2>/dev/null"},
	{Name: "memory decode off", Status: "fail", Check: "Command register", Cause: "memory decoding is off", Remedy: "bind the driver again", Exit: 1,
		device: whole, script: bindTo(vm.OwnModule, whole) + poke(whole, 4, "004")},
	{Name: "bus master off", Status: "fail", Check: "Command register", Cause: "bus master is off", Remedy: "bind the driver again", Exit: 1,
		device: whole, script: bindTo(vm.OwnModule, whole) + poke(whole, 4, "002")},
	{Name: "one-shot state unexpected", Status: "fail", Check: "one-shot mode", Cause: "off, although the driver switches it on", Remedy: "bind the driver again", Exit: 1,
		device: whole, script: "ivshctl unbind " + whole + "; " + bindTo(vm.OwnModule, whole) + poke(whole, 0x43, "000")},
	{Name: "capability truncated", Status: "fail", Check: "configuration space", Cause: "vendor capability length at 42h: expected 18h or 20h, found 17h", Remedy: "the hypervisor's device is broken", Exit: 1,
		device: truncated, script: bindTo("vfio-pci", truncated)},
	{Name: "R/W section missing", Status: "warn", Check: "sections", Cause: "there is no R/W section", Remedy: "--rw",
		device: outputs, script: bindTo("vfio-pci", outputs)},
	{Name: "R/W section missing, strict", Status: "warn", Check: "sections", Cause: "strict: the output sections of others are reached by messages", Remedy: "--rw",
		device: strict, script: bindTo("vfio-pci", strict)},
	{Name: "all sections missing", Status: "warn", Check: "sections", Cause: "R/W section 0, output sections of 0 bytes", Remedy: "--rw or --output",
		device: stateOnly, script: bindTo("vfio-pci", stateOnly)},
	{Name: "no BAR2", Status: "fail", Check: "BARs", Cause: "no BAR2: the shared memory has a Base Address only", Remedy: "ivshctl bind --driver uio_ivshmem", Exit: 1,
		device: noBAR2, script: bindTo("vfio-pci", noBAR2)},
	{Name: "no permission", Status: "fail", Check: "IOMMU group", Cause: "permission denied", Remedy: "ivshctl udev", Exit: 1,
		device: whole, user: true, script: bindTo("vfio-pci", whole) +
			"; grep -q ^user: /etc/passwd || echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd; chmod 600 /dev/vfio/*"},
	{Name: "peer absent", Status: "warn", Check: "peers", Cause: "no other peer has a state", Remedy: "start a program on another peer",
		device: whole, script: bindTo("vfio-pci", whole)},
	{Name: "service gone", Status: "fail", Check: "configuration space", Cause: "reads all ones", Remedy: "the service behind the device has ended", Exit: 1,
		device: whole, gone: true},
}

// Clinic is the guests that Setups are about, and what serves their devices.
type Clinic struct {
	// Configs are to be started as they are, in their order.
	Configs []vm.Config
	// Healthy shows the doctor a device that nothing is wrong with, whatever
	// the set-up is.
	Healthy bool

	services map[string]*vm.Service
	end      []func()
}

// OpenClinic starts the services.
func OpenClinic(ctx context.Context) (*Clinic, error) {
	c := &Clinic{
		Configs:  []vm.Config{{Name: "clinic", Modules: []string{vm.OwnModule}}, {Name: "no-iommu", NoIOMMU: true}},
		services: map[string]*vm.Service{},
	}
	for _, s := range []struct{ device, options string }{
		{whole, "--peers 3"},
		{stateOnly, "--rw 0 --output 0"},
		{outputs, "--rw 0"},
		{strict, "--rw 0 --mode strict"},
		{noBAR2, "--base-address 4G"},
	} {
		service, err := vm.Serve(ctx, nil, append(strings.Fields(s.options), "--quiet")...)
		if err != nil {
			c.Close()
			return nil, err
		}
		c.end = append(c.end, service.Close)
		c.services[s.device] = service
		c.add(0, s.device, service.Socket)
	}
	c.add(1, whole, c.services[whole].Socket)
	socket, err := c.serveTruncated()
	if err != nil {
		c.Close()
		return nil, err
	}
	c.add(0, truncated, socket)
	return c, nil
}

func (c *Clinic) add(guest int, device, socket string) {
	// 0000:00:04.0 is 04.0 in QEMU's words.
	d := vm.Device{Socket: socket, Address: "0x" + strings.TrimPrefix(device, "0000:00:")}
	c.Configs[guest].Devices = append(c.Configs[guest].Devices, d)
}

// Close ends the services; the guests have to be ended before.
func (c *Clinic) Close() {
	for _, f := range slices.Backward(c.end) {
		f()
	}
}

// truncatedDevice has a vendor capability that is a byte too short.
type truncatedDevice struct{ *pcidev.Function }

func (d truncatedDevice) ReadRegion(index uint32, offset uint64, p []byte) error {
	const length = 0x42
	err := d.Function.ReadRegion(index, offset, p)
	if index == vfiouser.RegionConfig && offset <= length && length < offset+uint64(len(p)) {
		p[length-offset] = 0x17
	}
	return err
}

// serveTruncated serves a truncatedDevice once, and returns its socket's path.
func (c *Clinic) serveTruncated() (path string, err error) {
	l, err := link.New(link.Config{Peers: 2, Vectors: 2, ReadWrite: 64 << 10})
	if err != nil {
		return "", err
	}
	c.end = append(c.end, func() { l.Close() })
	f, err := pcidev.New(l, pcidev.Options{})
	if err != nil {
		return "", err
	}
	c.end = append(c.end, f.Close)
	dir, err := os.MkdirTemp("", "ivshmem-clinic-")
	if err != nil {
		return "", err
	}
	c.end = append(c.end, func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "sock")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return "", err
	}
	var served sync.WaitGroup
	served.Go(func() {
		if conn, err := listener.AcceptUnix(); err == nil {
			_ = vfiouser.Serve(conn, truncatedDevice{f}, vfiouser.ServerOptions{}) // until QEMU ends
		}
	})
	c.end = append(c.end, func() { listener.Close(); served.Wait() })
	return path, nil
}

// Finding is what the doctor said.
type Finding struct {
	Name, Status, Found, Remedy string
}

// Doctor runs `ivshctl doctor` in a guest and returns the first check with a
// status, and the exit code, which has to fit what the doctor says.
func Doctor(ctx context.Context, g *vm.Guest, status string, argv ...string) (f Finding, exit int, err error) {
	r, err := g.Run(ctx, argv...)
	if err != nil {
		return f, 0, err
	}
	var d struct {
		Checks []Finding
		Usable bool
	}
	exit = r.ExitCode()
	if err := json.Unmarshal(r.Stdout, &d); err != nil {
		return f, exit, fmt.Errorf("%q: %v, %w: %s%s", argv, r.Status, err, r.Stdout, r.Stderr)
	}
	if d.Usable != (exit == 0) {
		return f, exit, fmt.Errorf("usable: %v, but exit code %d", d.Usable, exit)
	}
	for _, c := range d.Checks {
		if c.Status == status {
			return c, exit, nil
		}
	}
	return f, exit, fmt.Errorf("expected a check with %s, found %+v", status, d.Checks)
}

// Examine brings a guest into a set-up and asks the doctor. The error says what
// it did not name; the finding is there all the same.
func (c *Clinic) Examine(ctx context.Context, guests []*vm.Guest, s Setup) (f Finding, exit int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*Patience)
	defer cancel()
	g := guests[s.guest]
	if c.Healthy {
		g, s.device, s.script, s.user, s.gone = guests[0], whole, bindTo("vfio-pci", whole), false, false
	}
	if s.gone {
		_ = c.services[s.device].Kill()
	}
	r, err := g.Run(ctx, "sh", "-ec", s.script)
	if err != nil {
		return f, 0, err
	}
	if r.ExitCode() != 0 {
		return f, 0, fmt.Errorf("%s: %v: %s%s", s.script, r.Status, r.Stdout, r.Stderr)
	}
	argv := []string{"ivshctl", "doctor", "--json", "--device", s.device}
	if s.user {
		argv = []string{"su", "user", "-c", strings.Join(argv, " ")}
	}
	if f, exit, err = Doctor(ctx, g, s.Status, argv...); err != nil {
		return f, exit, err
	}
	switch {
	case exit != s.Exit:
		err = fmt.Errorf("exit code %d, expected %d", exit, s.Exit)
	case f.Name != s.Check || !strings.Contains(f.Found, s.Cause):
		err = fmt.Errorf("it does not name the cause: expected %q in %s, found %+v", s.Cause, s.Check, f)
	case !strings.Contains(f.Remedy, s.Remedy):
		err = errors.New("it does not name the remedy: expected " + s.Remedy + ", found " + f.Remedy)
	}
	return f, exit, err
}
