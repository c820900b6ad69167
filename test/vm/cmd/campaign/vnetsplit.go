package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"

	"github.com/google/pprof/profile"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/vnet"
	"github.com/ivshmem-go/ivshmem/vnet/tap"
)

// vnetEnd is the argument by which this program is an end of virtual Ethernet
// as `ivshctl net up` is, and writes a profile of it: FILE, INTERFACE, MTU,
// DEVICE.
const vnetEnd = "vnet-end"

func runVnetEnd(args []string) error {
	if len(args) != 4 {
		return errors.New("expected FILE INTERFACE MTU DEVICE")
	}
	runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0)))
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	mtu, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	d, err := ivshmem.Open(args[3])
	if err != nil {
		return err
	}
	defer d.Close()
	link, err := vnet.Open(d, vnet.Config{MTU: mtu})
	if err != nil {
		return err
	}
	defer link.Close()
	t, err := tap.Open(tap.Config{Name: args[1], MTU: mtu})
	if err != nil {
		return err
	}
	defer t.Close()
	f, err := os.Create(args[0])
	if err != nil {
		return err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return err
	}
	fmt.Println("ready")
	if err = t.Run(ctx, link); errors.Is(err, context.Canceled) {
		err = nil
	}
	pprof.StopCPUProfile()
	return errors.Join(err, f.Close())
}

// split finds what the CPU time of a transfer goes into.
func (v *vnetBench) split(network, iface string, mtu int, record func(string, float64)) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	const other = "split0"
	n := 0
	stop, err := v.startEnds(func(socket string) []string {
		n++
		return []string{self, vnetEnd, filepath.Join(v.dir, fmt.Sprintf("profile%d", n)), other, strconv.Itoa(mtu), socket}
	})
	if err != nil {
		return err
	}
	network = strings.Replace(network, "10.", "10.1", 1)
	err = errors.Join(v.a.configure(other, network+"1/24", mtu), v.b.configure(other, network+"2/24", mtu))
	if err == nil {
		if err = v.reach(network + "2"); err == nil {
			_, err = v.iperf(network+"2", 3)
		}
	}
	stop()
	if err != nil {
		return err
	}
	var tapCalls, sums, rest float64
	for i := range n {
		b, err := os.ReadFile(filepath.Join(v.dir, fmt.Sprintf("profile%d", i+1)))
		if err != nil {
			return err
		}
		p, err := profile.ParseData(b)
		if err != nil {
			return err
		}
		for _, s := range p.Sample {
			share := &rest
			for _, l := range s.Location {
				for _, line := range l.Line {
					switch name := line.Function.Name; {
					case strings.HasSuffix(name, "vnet/tap.transfer"):
						share = &tapCalls
					case strings.HasSuffix(name, "vnet/tap.sum"):
						share = &sums
					}
				}
			}
			*share += float64(s.Value[len(s.Value)-1])
		}
	}
	total := tapCalls + sums + rest
	if total == 0 {
		return errors.New("the profiles are empty")
	}
	record("tap_percent", 100*tapCalls/total)
	record("checksum_percent", 100*sums/total)
	record("rest_percent", 100*rest/total)
	return nil
}

// tables shows the medians and their spread.
func (v *vnetBench) tables(mtus []int) {
	spread := func(mtu int, way, what, format string) string {
		s := v.r.Samples[sampleName(mtu, way, what)]
		if len(s) == 0 {
			return ""
		}
		low, high := s[0], s[0]
		for _, x := range s {
			low, high = min(low, x), max(high, x)
		}
		return fmt.Sprintf(format+" ("+format+"–"+format+")", median(s), low, high)
	}
	for _, mtu := range mtus {
		t := Table{
			Title: fmt.Sprintf("Two name spaces of one host, MTU %d: median (range)", mtu),
			Head:  []string{"way", "TCP, Gbit/s", "64-byte datagrams, 1000/s", "ping, µs"},
		}
		for _, way := range ways {
			t.Rows = append(t.Rows, []string{way, spread(mtu, way, "tcp_gbit", "%.2f"), spread(mtu, way, "small_kpps", "%.0f"), spread(mtu, way, "ping_us", "%.0f")})
		}
		v.r.Tables = append(v.r.Tables, t, Table{
			Title: fmt.Sprintf("CPU time of both ends of vnet, TCP, MTU %d, percent", mtu),
			Head:  []string{"TAP system calls", "checksums", "all else"},
			Rows:  [][]string{{spread(mtu, wayVnet, "tap_percent", "%.1f"), spread(mtu, wayVnet, "checksum_percent", "%.1f"), spread(mtu, wayVnet, "rest_percent", "%.1f")}},
		})
	}
}

// ratio checks the median of the ratios within rounds.
func (v *vnetBench) ratio(mtu int, way string, least float64) {
	ours, theirs := v.r.Samples[sampleName(mtu, wayVnet, "tcp_gbit")], v.r.Samples[sampleName(mtu, way, "tcp_gbit")]
	var ratios []float64
	for i := range min(len(ours), len(theirs)) {
		ratios = append(ratios, ours[i]/theirs[i])
	}
	v.r.atLeast(fmt.Sprintf("MTU %d: TCP, of %s", mtu, way), median(ratios), least)
}

// lineWatch waits for a text in what a program prints.
type lineWatch struct {
	text []byte
	seen chan struct{}

	mu  sync.Mutex
	got []byte
}

func newLineWatch(text string) *lineWatch {
	return &lineWatch{text: []byte(text), seen: make(chan struct{})}
}

func (w *lineWatch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.text == nil {
		return len(p), nil
	}
	if w.got = append(w.got, p...); bytes.Contains(w.got, w.text) {
		w.text = nil
		close(w.seen)
	}
	return len(p), nil
}
