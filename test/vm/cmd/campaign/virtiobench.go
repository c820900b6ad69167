package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/internal/portbench"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

const (
	portBenchDevice = "0000:00:08.0"
	portBenchName   = "bench"
)

// portJob is a measurement in the guest.
type portJob struct {
	name    string
	measure string
	size    int
	link    bool
	spin    time.Duration
}

var portJobs = []portJob{
	{"trip", "round trip", 64, true, 0},
	{"trip, serial", "round trip", 64, false, 0},
	{"trip, spinning", "round trip", 64, true, time.Second},
	{"from", "from the guest", 64 << 10, true, 0},
	{"from, serial", "from the guest", 64 << 10, false, 0},
	{"to", "to the guest", 64 << 10, true, 0},
	{"to, serial", "to the guest", 64 << 10, false, 0},
}

// portBar is a figure of the link's port beside that of QEMU's.
type portBar struct {
	what         string
	own, against string
	value        func(portbench.Figures) float64
	unit         string
	want         float64
	atLeast      bool
}

func p50(f portbench.Figures) float64       { return f.P50 }
func bytesPerS(f portbench.Figures) float64 { return f.BytesPerS }

var portBars = []portBar{
	{"round trip, 64 bytes, both sleep", "trip", "trip, serial", p50, "ns", 3, false},
	{"round trip, 64 bytes, the driver looks", "trip, spinning", "trip, serial", p50, "ns", 1, false},
	{"throughput, guest to host, 64 KiB writes", "from", "from, serial", bytesPerS, "B/s", 1, true},
	{"throughput, host to guest, 64 KiB writes", "to", "to, serial", bytesPerS, "B/s", 1, true},
}

// virtioBench compares ports of the link, between a guest and the host, with one
// of QEMU's own virtio serial device in the same guest.
func virtioBench(ctx context.Context, r *Report) error {
	b := &portGuest{report: r}
	defer b.close()
	if err := b.start(ctx); err != nil {
		return err
	}
	long := time.Second
	if r.Quick {
		long = 300 * time.Millisecond
	}
	found := map[string][]portbench.Figures{}
	rounds := 0
	for begin := time.Now(); rounds < 1 || !r.Quick && (rounds < 7 || time.Since(begin) < r.Duration); rounds++ {
		r.say("round %d, %v", rounds+1, time.Since(begin).Round(time.Second))
		for _, j := range portJobs {
			f, err := b.measure(ctx, j, long)
			if err != nil {
				return fmt.Errorf("%s: %w", j.name, err)
			}
			found[j.name] = append(found[j.name], f)
		}
	}
	r.Config["rounds"], r.Config["machine"] = rounds, cpuModel()
	t := Table{
		Title: fmt.Sprintf("A port between a guest and a host process, beside one of QEMU's virtio-serial in the same guest, emulated (%s), %d rounds, everything in turn", r.Config["machine"], rounds),
		Head:  []string{"what", "median", "virtio-serial, median", "ratio, median (lowest – highest)", "bar"},
	}
	for _, bar := range portBars {
		var own, against, ratios []float64
		for i := range rounds {
			x, y := bar.value(found[bar.own][i]), bar.value(found[bar.against][i])
			own, against, ratios = append(own, x), append(against, y), append(ratios, x/y)
		}
		r.sample(bar.what, ratios...)
		sign := "<="
		if bar.atLeast {
			sign = ">="
		}
		t.Rows = append(t.Rows, []string{bar.what, withUnit(median(own), bar.unit), withUnit(median(against), bar.unit),
			fmt.Sprintf("**%.2f** (%.2f – %.2f)", median(ratios), slices.Min(ratios), slices.Max(ratios)), fmt.Sprintf("%s %g", sign, bar.want)})
		switch want := bar.want; {
		case bar.atLeast:
			if r.Quick { // a busy machine, for a moment
				want /= 4
			}
			r.atLeast(bar.what, median(ratios), want)
		default:
			if r.Quick {
				want *= 4
			}
			r.atMost(bar.what, median(ratios), want)
		}
	}
	r.Tables = append(r.Tables, t)
	if r.Sabotage {
		return nil // has failed
	}
	ends, err := openBlockEnds(ctx, b.dir, b.guest.Monitor())
	defer ends.close()
	if err != nil {
		return err
	}
	return ends.bench(r, rounds, long/2)
}

// portGuest is a guest with both kinds of ports, and their host ends.
type portGuest struct {
	report  *Report
	dir     string
	service *vm.Service
	guest   *vm.Guest
	cancel  context.CancelFunc
	ended   []chan error
	device  *ivshmem.Device
}

func (b *portGuest) close() {
	if b.guest != nil {
		b.guest.Close()
	}
	if b.cancel != nil {
		b.cancel()
	}
	for _, end := range b.ended {
		<-end
	}
	if b.device != nil {
		b.device.Close()
	}
	if b.service != nil {
		b.service.Close()
	}
	os.RemoveAll(b.dir)
}

func (b *portGuest) start(parent context.Context) (err error) {
	if b.dir, err = os.MkdirTemp("", "ivshmem-campaign-"); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(parent)
	b.cancel = cancel
	program, err := buildGuestProgram(ctx, b.dir, vm.AMD64)
	if err != nil {
		return err
	}
	if b.service, err = vm.Serve(ctx, nil, "--protocol", "0x8003", "--peers", "2", "--vectors", "3", "--rw", "4M", "--output", "0", "--quiet"); err != nil {
		return err
	}
	// Peer 0 is the device.
	if b.device, err = ivshmem.Open(b.service.Socket); err != nil {
		return err
	}
	d, err := console.NewDevice(b.device, console.Config{MaxPorts: 2, Entries: 16})
	if err != nil {
		return err
	}
	port, err := d.AddPort(console.PortConfig{Name: portBenchName})
	if err != nil {
		return err
	}
	if err := port.Open(); err != nil {
		return err
	}
	b.run(func() error { return d.Serve(ctx) })
	b.run(func() error {
		defer port.Close()
		for port.WaitOpen(ctx) == nil {
			if err := portbench.Follow(&slowPort{port, b.report.Sabotage}); err != nil {
				return err
			}
		}
		return nil
	})
	serial := filepath.Join(b.dir, "serial.sock")
	listener, err := net.Listen("unix", serial)
	if err != nil {
		return err
	}
	b.run(func() error {
		stop := context.AfterFunc(ctx, func() { listener.Close() })
		defer stop()
		c, err := listener.Accept()
		if err != nil {
			return nil
		}
		stopped := context.AfterFunc(ctx, func() { c.Close() })
		defer stopped()
		portbench.Follow(c)
		return nil
	})
	disk, err := nbdImage(b.dir)
	if err != nil {
		return err
	}
	b.report.say("booting a guest")
	b.guest, err = vm.Start(ctx, vm.Config{
		Name: "guest", Driver: "vfio-pci", CPUs: 2,
		Devices: []vm.Device{{Socket: b.service.Socket, Address: "0x8"}},
		Files:   map[string]string{"/bin/guestprog": program},
		QEMU: append(disk,
			"-device", "virtio-serial-pci,id=serial,addr=0x11",
			"-chardev", "socket,id=serial,path="+serial,
			"-device", "virtserialport,bus=serial.0,chardev=serial,name="+portBenchName,
		),
	})
	return err
}

// slowPort waits before it answers, when it has to show that this is seen.
type slowPort struct {
	*console.Port
	slow bool
}

func (p *slowPort) Write(b []byte) (int, error) {
	if p.slow {
		time.Sleep(20 * time.Millisecond)
	}
	return p.Port.Write(b)
}

func (b *portGuest) run(f func() error) {
	ended := make(chan error, 1)
	b.ended = append(b.ended, ended)
	go func() {
		err := f()
		if err != nil {
			b.report.say("%v", err)
			b.cancel()
		}
		ended <- err
	}()
}

func (b *portGuest) measure(ctx context.Context, j portJob, long time.Duration) (f portbench.Figures, err error) {
	argv := []string{"guestprog", "port-bench", "-port", portBenchName, "-measure", j.measure, "-size", fmt.Sprint(j.size), "-duration", long.String(), "-spin", j.spin.String()}
	if j.link {
		argv = append(argv, "-device", portBenchDevice)
	}
	ctx, cancel := context.WithTimeout(ctx, long+2*patience)
	defer cancel()
	res, err := b.guest.Run(ctx, argv...)
	if err == nil && res.ExitCode() != 0 {
		err = fmt.Errorf("%s: %v: %s", strings.Join(argv, " "), res.Status, res.Stderr)
	}
	if err != nil {
		return f, err
	}
	err = json.Unmarshal(res.Stdout, &f)
	return f, err
}
