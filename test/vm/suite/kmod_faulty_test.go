package suite

import (
	"encoding/binary"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// faulty is a device that says something else than a link's device would. The
// maps can change while the guest runs.
type faulty struct {
	*pcidev.Function
	noBAR2, noMSIX bool

	mu     sync.Mutex
	config map[uint64]byte   // by offset
	regs   map[uint64]uint32 // by offset
	intx   int               // eventfd of INTx; -1 if there is none
}

func (f *faulty) Region(index uint32) vfiouser.Region {
	if f.noBAR2 && index == vfiouser.RegionBAR2 {
		return vfiouser.Region{FD: -1}
	}
	return f.Function.Region(index)
}

func (f *faulty) ReadRegion(index uint32, offset uint64, p []byte) error {
	if err := f.Function.ReadRegion(index, offset, p); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch index {
	case vfiouser.RegionConfig:
		for i := range p {
			if b, ok := f.config[offset+uint64(i)]; ok {
				p[i] = b
			}
		}
	case vfiouser.RegionBAR0:
		if v, ok := f.regs[offset]; ok && len(p) == 4 {
			binary.LittleEndian.PutUint32(p, v)
		}
	}
	return nil
}

func (f *faulty) IRQ(index uint32) vfiouser.IRQ {
	switch {
	case !f.noMSIX:
		return f.Function.IRQ(index)
	case index == vfiouser.IRQINTx && f.config[0x3d] != 0:
		return vfiouser.IRQ{Flags: 7, Count: 1} // eventfd, maskable, automasked
	}
	return vfiouser.IRQ{}
}

func (f *faulty) SetIRQs(s vfiouser.IRQSet) error {
	if s.Index != vfiouser.IRQINTx {
		return f.Function.SetIRQs(s)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.Action == vfiouser.IRQTrigger && len(s.FDs) == 1 {
		f.intx = s.FDs[0]
	}
	return nil
}

// raise raises INTx.
func (f *faulty) raise() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := unix.Write(f.intx, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	return err
}

// set replaces what the device says.
func (f *faulty) set(config map[uint64]byte, regs map[uint64]uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.config, f.regs = config, regs
}

// serveFaulty gives f a peer of a link of its own, serves it, and returns the
// path of its socket.
func serveFaulty(t *testing.T, f *faulty) string {
	t.Helper()
	l, err := link.New(link.Config{Peers: 2, Vectors: 2, Protocol: 0x4000, ReadWrite: 64 << 10, Output: 8 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if f.Function, err = pcidev.New(l, pcidev.Options{Mode: pcidev.ModeShared}); err != nil {
		t.Fatal(err)
	}
	f.intx = -1
	path := filepath.Join(t.TempDir(), "sock")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	t.Cleanup(func() {
		listener.Close()
		served.Wait()
		f.Function.Close()
		unix.Close(f.intx)
	})
	served.Go(func() {
		conn, err := listener.AcceptUnix()
		if err != nil {
			return
		}
		_ = vfiouser.Serve(conn, f, vfiouser.ServerOptions{}) // until QEMU ends
	})
	return path
}

// The vendor-specific capability of the link's device.
const vendorCap = 0x40

// at returns the bytes of a little-endian value of the capability.
func at[T uint8 | uint32 | uint64](offset uint64, v T) map[uint64]byte {
	m := map[uint64]byte{}
	for i := range binary.Size(v) {
		m[vendorCap+offset+uint64(i)] = byte(uint64(v) >> (8 * i))
	}
	return m
}

func merge(all ...map[uint64]byte) map[uint64]byte {
	m := map[uint64]byte{}
	for _, a := range all {
		for k, v := range a {
			m[k] = v
		}
	}
	return m
}

// TestKernelModuleRefuses shows the kernel module devices that contradict
// their specification: it says what is wrong, and the kernel goes on. It also
// shows it one without BAR2, whose memory is elsewhere.
func TestKernelModuleRefuses(t *testing.T) {
	const (
		shmemSize = 0x20000
		memory    = "0000:00:10.0"
	)
	devices := []*faulty{
		{},
		{noBAR2: true},
		{noMSIX: true, config: map[uint64]byte{vendorCap + 1: 0, 0x3d: 1}},
		{noMSIX: true, config: map[uint64]byte{vendorCap + 1: 0}},
		{config: map[uint64]byte{0x34: 0x60}}, // MSI-X is the only capability
		{config: map[uint64]byte{0x10: 1}},
	}
	a, b, pin := devices[0], devices[1], devices[2]
	config := vm.Config{
		Kernel: "bookworm", Modules: []string{vm.OwnModule},
		Files: map[string]string{"/bin/guestprog": buildFor(t, vm.AMD64, "build", module+"/test/vm/guestprog", "guestprog")},
		// Memory at an address that the guest chooses, outside of its RAM:
		// BAR2 of another device, which is used as such by nobody.
		QEMU: []string{
			"-object", fmt.Sprintf("memory-backend-ram,id=shm,share=on,size=%d", shmemSize),
			"-device", "ivshmem-plain,memdev=shm,addr=0x10",
		},
	}
	addresses := make([]string, len(devices))
	for i, f := range devices {
		config.Devices = append(config.Devices, vm.Device{Socket: serveFaulty(t, f), Address: fmt.Sprintf("%#x", 4+i)})
		addresses[i] = fmt.Sprintf("0000:00:%02x.0", 4+i)
	}
	withBAR2, withoutBAR2 := addresses[0], addresses[1]
	g := guests(t, nil, config)[0]
	// tryBind says whether a device is bound, and what the kernel logs.
	tryBind := func(t *testing.T, address string) (bool, string) {
		t.Helper()
		out := run(t, g, 0, "sh", "-c", fmt.Sprintf(`
			n=$(dmesg | wc -l)
			echo uio_ivshmem >/sys/bus/pci/devices/%[1]s/driver_override
			echo %[1]s >/sys/bus/pci/drivers_probe
			if test -e /sys/bus/pci/devices/%[1]s/driver; then
				echo bound
				echo %[1]s >/sys/bus/pci/drivers/uio_ivshmem/unbind
			fi
			dmesg | tail -n +$((n+1))`, address))
		return strings.HasPrefix(out, "bound\n"), out
	}
	refused := func(t *testing.T, address, want string) {
		t.Helper()
		if bound, log := tryBind(t, address); bound || !strings.Contains(log, want) {
			t.Errorf("got %q, want a refusal with %q", log, want)
		}
	}
	accepted := func(t *testing.T, address string) {
		t.Helper()
		if bound, log := tryBind(t, address); !bound {
			t.Errorf("got %q, want it to be bound", log)
		}
	}
	accepted(t, withBAR2)
	for _, c := range []struct {
		name   string
		config map[uint64]byte
		regs   map[uint64]uint32
		want   string
	}{
		{"gone", nil, map[uint64]uint32{0: ^uint32(0), 4: ^uint32(0)}, "Maximum Peers: expected 2 to 65536, found 0xffffffff"},
		{"one peer", nil, map[uint64]uint32{4: 1}, "Maximum Peers: expected 2 to 65536, found 0x1"},
		{"too many peers", nil, map[uint64]uint32{4: 65537}, "Maximum Peers: expected 2 to 65536, found 0x10001"},
		{"own ID", nil, map[uint64]uint32{0: 2}, "ID: expected less than Maximum Peers (2), found 0x2"},
		{"short capability", at(2, uint8(0x17)), nil, "expected a length of at least 0x18"},
		{"State Table absent", at(4, uint32(0)), nil, "State Table: expected at least 0x8 bytes for 2 peers, found 0x0"},
		{"State Table too small", at(4, uint32(4096)), map[uint64]uint32{4: 1025}, "State Table: expected at least 0x1004 bytes for 1025 peers, found 0x1000"},
		{"State Table not of pages", at(4, uint32(4097)), nil, "State Table: expected a multiple of this kernel's page size 0x1000, found 0x1001"},
		{"R/W section not of pages", at(8, uint64(1)), nil, "R/W section: expected a multiple of this kernel's page size 0x1000, found 0x1"},
		{"output section not of pages", at(0x10, uint64(0x1800)), nil, "output section: expected a multiple of this kernel's page size 0x1000, found 0x1800"},
		{"sections larger than BAR2", at(8, uint64(1<<20)), nil, "BAR2: expected memory for sections of 0x105000 bytes"},
		{"too large with a carry to 64 bits", at(0x10, uint64(1<<32)), nil, "BAR2: expected memory for sections of 0x200011000 bytes"},
		{"product overflows", at(0x10, uint64(1<<63)), nil, "the sections exceed 64 bits"},
		{"sum overflows", at(8, ^uint64(0xfff)), nil, "the sections exceed 64 bits"},
		{"sum with outputs overflows", merge(at(8, uint64(1<<63)), at(0x10, uint64(1<<62))), nil, "the sections exceed 64 bits"},
		{"no one-shot mode", at(3, uint8(0)), nil, "Privileged Control: expected the device to keep 0x1 (one-shot mode), found 0x0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a.set(c.config, c.regs)
			refused(t, withBAR2, c.want)
		})
	}
	a.set(nil, nil)
	accepted(t, withBAR2)

	line := strings.Fields(strings.Split(run(t, g, 0, "cat", "/sys/bus/pci/devices/"+memory+"/resource"), "\n")[2])
	base, err := strconv.ParseUint(line[0], 0, 64)
	if err != nil || base == 0 {
		t.Fatalf("BAR2 of %s: %q, %v", memory, line, err)
	}
	long := at(2, uint8(0x20))
	for _, c := range []struct {
		name   string
		config map[uint64]byte
		want   string
	}{
		{"no BAR2 and no base address", nil, "without BAR2 it holds the base address"},
		{"base address 0", merge(long, at(0x18, uint64(0))), "base address: expected"},
		{"not a page", merge(long, at(0x18, base+0x800)), "base address: expected"},
		{"wraps", merge(long, at(0x18, ^uint64(0xfff))), "base address: expected"},
		{"no such physical address", merge(long, at(0x18, uint64(1<<60))), "base address: expected"},
		{"RAM", merge(long, at(0x18, uint64(16<<20))), "in use by another driver, or RAM"},
		{"another driver's", merge(long, at(0x18, uint64(0xfec00000))), "in use by another driver, or RAM"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b.set(c.config, nil)
			refused(t, withoutBAR2, c.want)
		})
	}
	t.Run("base address", func(t *testing.T) {
		b.set(merge(long, at(0x18, base)), nil)
		accepted(t, withoutBAR2)
		bind(t, g, withoutBAR2, vm.OwnModule)
		// Two devices whose memory is the same one.
		a.set(nil, nil)
		out := run(t, g, 0, "sh", "-c", `grep -A1 "`+fmt.Sprintf("%x-", base)+`" /proc/iomem; grep . /sys/class/uio/uio0/maps/*/addr`)
		for i, want := range []uint64{0, 0x1000, 0x11000, 0x11000} {
			if want := fmt.Sprintf("map%d/addr:%#016x", i+1, base+want); !strings.Contains(out, want) {
				t.Errorf("got %s, want %s", out, want)
			}
		}
		if !strings.Contains(out, "uio_ivshmem") {
			t.Errorf("memory is not claimed: %s", out)
		}
		if out := run(t, g, 0, "guestprog", "uio-words", withoutBAR2); strings.TrimSpace(out) != "{}" {
			t.Errorf("got %s", out)
		}
	})
	t.Run("no interrupt", func(t *testing.T) { refused(t, addresses[3], "expected MSI-X or an interrupt pin, found neither") })
	t.Run("no capability", func(t *testing.T) {
		refused(t, addresses[4], "expected a vendor-specific capability, found none")
	})
	t.Run("registers in I/O space", func(t *testing.T) {
		refused(t, addresses[5], "BAR0: expected registers in memory space, found [io")
	})
	t.Run("INTx", func(t *testing.T) {
		bind(t, g, addresses[2], vm.OwnModule)
		w := start(t, g, "guestprog", "uio-wait", addresses[2])
		if got := w.line(); got != "control 0" {
			t.Errorf("got %q", got)
		}
		for range 10 {
			if got := w.line(); got != "armed" {
				t.Errorf("got %q", got)
			}
			if err := pin.raise(); err != nil {
				t.Fatal(err)
			}
			if got := w.line(); !strings.HasPrefix(got, "grown 1 ") {
				t.Errorf("got %q", got)
			}
		}
		if err := w.Signal(9); err != nil {
			t.Fatal(err)
		}
		w.end(128 + 9)
	})
	checkKernelLog(t, g)
}
