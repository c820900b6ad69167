package ivshmem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
	"github.com/ivshmem-go/ivshmem/vfio"
)

// Status is the outcome of a [Check].
type Status string

// The outcomes: in order, usable with a restriction, and not usable.
const (
	StatusOK   Status = "ok"
	StatusWarn Status = "warn"
	StatusFail Status = "fail"
)

// Check is one precondition of using a device.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Found  string `json:"found"`
	// Remedy is what to do about it, unless it is in order.
	Remedy string `json:"remedy,omitempty"`
}

// Diagnosis is what [Diagnose] found, in the order in which things fail: the
// first failure is the one to mend first.
type Diagnosis struct {
	Address string  `json:"address"`
	Checks  []Check `json:"checks"`
	// Usable says that the device works, interrupts included.
	Usable bool `json:"usable"`
}

// Diagnose checks every precondition of using a device with interrupts. It
// owns the device for a moment, rings its own doorbell, and leaves State 0; a
// device that has an owner is looked at from outside only.
func Diagnose(ctx context.Context, address string) *Diagnosis {
	g := &Diagnosis{Address: address}
	if isSocket(address) {
		g.open(ctx, address)
		return g
	}
	dev, err := find(address)
	if err != nil {
		g.add("enumeration", StatusFail, err.Error(), "start this machine with the device (`ivshctl serve` prints the QEMU arguments), or name another: `ivshctl list`")
		return g
	}
	g.Address = dev.Addr
	g.add("enumeration", StatusOK, fmt.Sprintf("%04x:%04x at %s", dev.Vendor, dev.Device, dev.Addr), "")
	if !g.configuration(dev) {
		return g
	}
	g.bars(dev)
	if !g.driver(dev) {
		return g
	}
	if o, ok := dev.Owner(); ok {
		g.add("owner", StatusWarn, fmt.Sprintf("%v owns the device", o), "end it to have the device checked further; it can be used by one process at a time")
		return g
	}
	g.open(ctx, dev.Addr)
	return g
}

func (g *Diagnosis) add(name string, s Status, found, remedy string) {
	g.Checks = append(g.Checks, Check{name, s, found, remedy})
}

// Offsets in configuration space.
const (
	commandRegister = 0x04
	interruptPin    = 0x3d
)

// hasINTx reports whether a device has INTx in place of MSI-X.
func hasINTx(config []byte) bool {
	_, err := regs.ParseMSIX(config)
	return errors.Is(err, regs.ErrNoCapability)
}

// configuration checks what the configuration space tells, as far as it can be
// seen. It is false if there is no point in going on.
func (g *Diagnosis) configuration(dev *sysfs.Device) bool {
	config, err := dev.ReadConfig()
	if err != nil {
		g.add("configuration space", StatusFail, err.Error(), "see why the kernel does not show it: dmesg")
		return false
	}
	c, err := regs.ParseVendorCap(config)
	switch {
	case errors.Is(err, regs.ErrConfigShort):
		g.add("configuration space", StatusWarn, fmt.Sprintf("%d bytes; the capabilities lie behind", len(config)), "run as root to have them checked")
		return true
	case errors.Is(err, ErrGone):
		g.add("configuration space", StatusFail, err.Error(), "the service behind the device has ended: start `ivshctl serve` again, and then restart this virtual machine")
		return false
	case err != nil:
		g.add("configuration space", StatusFail, err.Error(), "the hypervisor's device is broken: report it with the output of lspci -xxx")
		return false
	}
	protocol, err := regs.ConfigProtocol(config)
	if err != nil {
		g.add("configuration space", StatusFail, err.Error(), "the hypervisor's device is broken")
		return false
	}
	g.add("configuration space", StatusOK, fmt.Sprintf("vendor capability at %02Xh, protocol %04Xh (%v)", c.Offset, uint16(protocol), protocol), "")
	g.sections(c, regs.ConfigStrict(config))
	switch m, err := regs.ParseMSIX(config); {
	case err == nil:
		g.add("vectors", StatusOK, fmt.Sprintf("%d MSI-X vectors", m.Vectors), "")
	case errors.Is(err, regs.ErrNoCapability) && config[interruptPin] == 0:
		g.add("vectors", StatusFail, "neither MSI-X nor an interrupt pin", "the hypervisor's device is broken; it can be polled")
	case errors.Is(err, regs.ErrNoCapability):
		g.add("vectors", StatusWarn, "no MSI-X: one vector, by INTx", "use a hypervisor, or a service (`ivshctl serve` without --intx), that gives the device MSI-X")
	default:
		g.add("vectors", StatusFail, err.Error(), "the hypervisor's device is broken")
		return false
	}
	return true
}

func (g *Diagnosis) sections(c regs.VendorCap, strict bool) {
	found := fmt.Sprintf("State Table %d, R/W section %d, output sections of %d bytes", c.StateTable, c.ReadWrite, c.Output)
	if strict {
		found += "; strict: the output sections of others are reached by messages"
	}
	switch {
	case c.ReadWrite == 0 && c.Output == 0:
		g.add("sections", StatusWarn, found, "the link has no memory but its states: serve it with --rw or --output")
		return
	case c.ReadWrite == 0 && strict:
		g.add("sections", StatusWarn, found, "no section is fast in both directions: serve it with --rw, or without --mode strict")
		return
	case c.ReadWrite == 0:
		g.add("sections", StatusWarn, found+": there is no R/W section, which some programs need", "for those, serve the link with --rw")
		return
	}
	g.add("sections", StatusOK, found, "")
}

// bars checks the base address registers.
func (g *Diagnosis) bars(dev *sysfs.Device) {
	_, _, registers := dev.BAR(0)
	_, memory, shared := dev.BAR(2)
	bar0 := "BAR0"
	if dev.IORegisters() {
		bar0 = "BAR0 in I/O space"
	}
	switch {
	case !registers:
		g.add("BARs", StatusFail, "BAR0 has no address", "the firmware or kernel found no place for it: look into dmesg, try pci=realloc")
	case dev.IORegisters() && dev.Driver == "uio_ivshmem":
		g.add("BARs", StatusFail, bar0, "that driver takes registers in memory space only: bind the device to vfio-pci")
	case shared:
		g.add("BARs", StatusOK, fmt.Sprintf("%s, and BAR2 with %d bytes", bar0, memory), "")
	default:
		g.baseAddress(dev, bar0)
	}
}

// baseAddress checks a device without BAR2.
func (g *Diagnosis) baseAddress(dev *sysfs.Device, bar0 string) {
	found := bar0 + ", no BAR2: the shared memory has a Base Address only"
	config, _ := dev.ReadConfig()
	if c, err := regs.ParseVendorCap(config); err == nil {
		if !c.HasBase {
			g.add("BARs", StatusFail, bar0+", and neither BAR2 nor a Base Address", "the hypervisor's device is broken")
			return
		}
		found += fmt.Sprintf(", %#x", c.BaseAddress)
	}
	if dev.Driver == "uio_ivshmem" {
		g.add("BARs", StatusOK, found, "")
		return
	}
	g.add("BARs", StatusFail, found, "no other driver than uio_ivshmem (kmod/) can reach the memory: `ivshctl bind --driver uio_ivshmem`")
}

const iommuOn = "intel_iommu=on or amd_iommu=on on the kernel command line, and a virtual one in QEMU: `ivshctl serve` prints it"

// driver checks the bound driver and what it needs. It is false if the device
// cannot be opened.
func (g *Diagnosis) driver(dev *sysfs.Device) bool {
	switch dev.Driver {
	case "":
		found, remedy := "none is bound: the device can be polled, but has no interrupts", "bind it: `ivshctl bind`"
		if dev.IOMMUGroup == "" {
			found += "; and there is no IOMMU, without which vfio-pci does not take it"
			remedy = "switch the IOMMU on (" + iommuOn + "), or take uio_ivshmem (kmod/), which needs none: `ivshctl bind --driver uio_ivshmem`"
		}
		g.add("driver", StatusFail, found, remedy)
	case vfio.Driver:
		g.add("driver", StatusOK, dev.Driver, "")
		return g.iommuGroup(dev)
	case "uio_ivshmem":
		g.add("driver", StatusOK, dev.Driver, "")
		return g.driverState(dev)
	case "igb_uio", "uio_pci_generic":
		if dev.InterruptPin() {
			g.add("driver", StatusOK, dev.Driver+", by INTx", "")
			break
		}
		if dev.Driver == "uio_pci_generic" {
			g.add("driver", StatusFail, "uio_pci_generic: it cannot deliver MSI-X, the device can only be polled", "bind it to vfio-pci: `ivshctl bind`")
			break
		}
		g.add("driver", StatusWarn, "igb_uio: only vector 0 arrives", "agree on vector 0 with the peers, or bind to vfio-pci: `ivshctl bind`")
	default:
		g.add("driver", StatusFail, dev.Driver+": a kernel driver uses the device itself", "leave it to that driver, or take it away: `ivshctl bind`")
		return false
	}
	return true
}

// driverState checks what uio_ivshmem set up when it was bound: opening the
// device does not set it up again. It is false if the device cannot be opened.
func (g *Diagnosis) driverState(dev *sysfs.Device) bool {
	const again = "another program changed it: bind the driver again (`ivshctl unbind`, `ivshctl bind --driver uio_ivshmem`)"
	config, err := dev.ReadConfig()
	if err != nil || len(config) < 6 {
		return true // seen above
	}
	if !g.checkCommand(config, again) {
		return false
	}
	if c, err := regs.ParseVendorCap(config); err == nil && c.Privileged&regs.OneShot == 0 {
		g.add("one-shot mode", StatusFail, "off, although the driver switches it on", again)
		return false
	}
	return true
}

// checkCommand reports whether the Command register lets the device work.
func (g *Diagnosis) checkCommand(config []byte, remedy string) bool {
	const io, memory, busMaster = 1 << 0, 1 << 1, 1 << 2
	const bar0 = 0x10
	inIO := len(config) > bar0 && config[bar0]&1 != 0
	switch c := binary.LittleEndian.Uint16(config[commandRegister:]); {
	case c&memory == 0:
		g.add("Command register", StatusFail, fmt.Sprintf("%04Xh: memory decoding is off, so registers and memory do not answer", c), remedy)
	case c&io == 0 && inIO:
		g.add("Command register", StatusFail, fmt.Sprintf("%04Xh: I/O decoding is off, so registers do not answer", c), remedy)
	case c&busMaster == 0 && !hasINTx(config):
		g.add("Command register", StatusFail, fmt.Sprintf("%04Xh: bus master is off, so no MSI-X message leaves the device", c), remedy)
	default:
		g.add("Command register", StatusOK, fmt.Sprintf("%04Xh", c), "")
		return true
	}
	return false
}

// iommuGroup checks what stands between the device and a process: its IOMMU
// group, and the device files of it.
func (g *Diagnosis) iommuGroup(dev *sysfs.Device) bool {
	way, err := vfio.FindWay(dev)
	if err != nil {
		g.add("IOMMU group", StatusFail, "none", "switch the IOMMU on ("+iommuOn+")")
		return false
	}
	others, _ := filepath.Glob(filepath.Join(dev.FullPath, "iommu_group/devices/*"))
	found := fmt.Sprintf("group %s, %d devices in it, reached by %s (%s)", dev.IOMMUGroup, len(others), strings.Join(way.Files, ", "), way.Name)
	for _, file := range way.Files {
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		switch {
		case errors.Is(err, unix.EPERM):
			g.add("IOMMU group", StatusFail, found+": "+err.Error(), "run as root: no-IOMMU mode needs the capability CAP_SYS_RAWIO")
			return false
		case errors.Is(err, os.ErrPermission):
			g.add("IOMMU group", StatusFail, found+": "+err.Error(), "run as root, or give yourself rights to that file (`ivshctl udev`)")
			return false
		case err != nil && !errors.Is(err, unix.EBUSY):
			g.add("IOMMU group", StatusFail, found+": "+err.Error(), "load the module vfio_iommu_type1, and bind the other devices of the group to vfio-pci or to nothing")
			return false
		case err == nil:
			f.Close()
		}
	}
	if way.Name == vfio.WayNoIOMMU {
		g.add("IOMMU group", StatusWarn, found+": nothing keeps devices of this machine from its memory", "it does not matter for this device, which has no DMA; an IOMMU would spare the need for root")
		return true
	}
	g.add("IOMMU group", StatusOK, found, "")
	return true
}

// open opens the device as its owner and tries what it can do.
func (g *Diagnosis) open(ctx context.Context, address string) {
	d, err := Open(address)
	if err != nil {
		remedy := "see the message"
		var e *DeviceError
		switch {
		case errors.Is(err, ErrGone):
			remedy = "the service behind the device has ended: start it again, and then restart this virtual machine"
		case errors.As(err, &e) && e.Remedy != "":
			remedy = e.Remedy
		}
		g.add("open", StatusFail, err.Error(), remedy)
		return
	}
	defer d.Close()
	g.add("open", StatusOK, fmt.Sprintf("peer %d of %d, through %s", d.ID(), d.MaxPeers(), d.Driver()), "")
	if config, err := d.back.Config(); err == nil && len(config) >= 6 && d.HasInterrupts() && d.Driver() != "uio_ivshmem" {
		g.checkCommand(config, "bind the driver again: `ivshctl unbind`, `ivshctl bind`")
	}
	g.oneShot(d)
	interrupts := g.doorbell(ctx, d)
	g.copyRate(d)
	g.peers(d)
	g.Usable = interrupts
	for _, c := range g.Checks {
		if c.Status == StatusFail {
			g.Usable = false
		}
	}
}

func (g *Diagnosis) oneShot(d *Device) {
	config, err := d.back.Config()
	if err != nil {
		return
	}
	c, err := regs.ParseVendorCap(config)
	if err != nil {
		return // seen above
	}
	on := c.Privileged&regs.OneShot != 0
	if on != d.OneShot() && d.HasInterrupts() {
		g.add("one-shot mode", StatusFail, fmt.Sprintf("on: %v, although %s was set", on, onOff(d.OneShot())), "another program writes Privileged Control: find it")
		return
	}
	g.add("one-shot mode", StatusOK, onOff(on), "")
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// doorbell rings the own doorbell on every vector that can be waited for, and
// measures how long the interrupt takes.
func (g *Diagnosis) doorbell(ctx context.Context, d *Device) bool {
	const patience = 5 * time.Second
	if !d.HasInterrupts() {
		g.add("interrupts", StatusFail, "the device has none as it is bound", "bind it to vfio-pci: `ivshctl bind`")
		return false
	}
	vectors := len(d.wait.fds)
	if !d.VectorsApart() {
		vectors = d.Vectors()
	}
	// These drivers take an interrupt for the device's by that bit.
	byStatus := d.wait.rearm != nil && d.wait.uio
	best := time.Duration(1<<63 - 1)
	for v := range vectors {
		count := v
		if !d.VectorsApart() {
			count = 0
		}
		before := d.Interrupts(count)
		start := time.Now()
		if err := d.Ring(d.ID(), v); err != nil {
			g.add("interrupts", StatusFail, err.Error(), "see the message")
			return false
		}
		limited, cancel := context.WithTimeout(ctx, patience)
		err := d.Wait(limited, nil, func() bool { return d.Interrupts(count) > before })
		cancel()
		if err != nil {
			remedy := "check that the service is alive, and that nobody else switches interrupts off"
			if byStatus {
				remedy = "INTx reaches " + d.Driver() + " only if the device sets Interrupt Status, which the specification forbids: bind it to uio_ivshmem"
			}
			g.add("interrupts", StatusFail, fmt.Sprintf("a doorbell to itself on vector %d did not arrive in %v: %v", v, patience, err), remedy)
			return false
		}
		best = min(best, time.Since(start))
	}
	found := fmt.Sprintf("a doorbell to itself arrives on each of %d vectors, in %v at best", vectors, best.Round(time.Microsecond))
	if byStatus {
		found += ", as the device sets Interrupt Status against the specification"
	}
	g.add("interrupts", StatusOK, found, "")
	return true
}

// copyRate measures copies out of the own section, and judges the memory type
// by it.
func (g *Diagnosis) copyRate(d *Device) {
	s := d.Sections()
	var w *shmem.ReadWrite
	if w = s.Output; w == nil {
		if w = s.ReadWrite; w == nil {
			return
		}
	}
	// Reading changes nothing that a peer might look at.
	n := min(w.Size(), 64<<10)
	at := int64(w.Size() - n)
	b := make([]byte, n)
	var moved uint64
	start := time.Now()
	for time.Since(start) < 50*time.Millisecond {
		if _, err := w.ReadAt(b, at); err != nil {
			g.add("copy rate", StatusFail, err.Error(), "see the message")
			return
		}
		moved += n
	}
	rate := float64(moved) / time.Since(start).Seconds() / 1e6
	found := fmt.Sprintf("%.0f MB/s out of the own section", rate)
	config, _ := d.back.Config()
	switch {
	case rate < 200 && hasINTx(config):
		g.add("copy rate", StatusWarn, found, "QEMU stops mapping BAR2 when INTx is raised: serve the link without --intx, or put the memory at a --base-address")
		return
	case rate < 200:
		g.add("copy rate", StatusWarn, found, "the memory is mapped uncached or trapped: on hardware, bind to uio_ivshmem, which maps it write-back")
		return
	}
	g.add("copy rate", StatusOK, found, "")
}

func (g *Diagnosis) peers(d *Device) {
	var there []uint32
	for peer := range d.MaxPeers() {
		v, err := d.State(peer)
		if err != nil {
			g.add("peers", StatusFail, err.Error(), "see the message")
			return
		}
		if peer != d.ID() && v != 0 {
			there = append(there, peer)
		}
	}
	if len(there) == 0 {
		g.add("peers", StatusWarn, "no other peer has a state", "start a program on another peer of the link")
		return
	}
	g.add("peers", StatusOK, fmt.Sprintf("with a state: %v", there), "")
}
