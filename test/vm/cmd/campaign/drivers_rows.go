package main

import (
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

// driverRow is a way to the device on an architecture.
type driverRow struct {
	name    string
	place   string // which machine it is tried on, of driverMachines; or onHost
	peer    string // the machine of the peer; "" for this host, or the same place
	device  string // the name of a device there
	driver  string
	backEnd string
	killed  uint32 // state after a program was killed
	// absent says why there is no such way on this architecture at all.
	absent string
	// cannot is what cannot work, by the name of the check: why, and what the
	// failing command has to say.
	cannot map[string]refusal
	// oneVector is a device with a single vector, for checks in which all
	// vectors have to arrive.
	oneVector string
}

type refusal struct{ why, says string }

// driverMachine is a guest with devices.
type driverMachine struct {
	name   string
	config vm.Config
	igb    bool
	// links are the options of the service of each device, by its address.
	links map[string]string
	// peer is the machine whose links it is on instead; "" for none.
	peer string
}

// onHost is the place of processes of this host.
const onHost = ""

// Places of the devices.
const (
	atMSIX = "0000:00:0e.0"
	atOne  = "0000:00:0f.0" // one vector
	atINTx = "0000:00:10.0"
	atIO   = "0000:00:11.0" // registers in I/O space
	atPin  = "0000:00:12.0" // INTx: its first interrupt makes a device's memory slow until the guest is reset, so each row has its own
)

const threeVectors = "--vectors 3"

// debian is the links of a guest with Debian's kernel.
var debian = map[string]string{atMSIX: threeVectors, atOne: "--vectors 1", atINTx: "--intx", atPin: "--intx", atIO: threeVectors + " --io-registers"}

var driverMachines = []driverMachine{
	{name: "amd64", config: vm.Config{Modules: []string{vm.OwnModule}}, igb: true, links: debian},
	{name: "arm64", config: vm.Config{Arch: vm.ARM64, Modules: []string{vm.OwnModule}}, igb: true, links: debian},
	{name: "small", config: vm.Config{Kernel: fetch.Small}, links: map[string]string{atMSIX: threeVectors}},
	{name: "no-iommu", config: vm.Config{Kernel: fetch.Small, NoIOMMU: true, Append: []string{"vfio.enable_unsafe_noiommu_mode=1"}}, links: map[string]string{atMSIX: threeVectors}},
	// Where there is no BAR2, a host process cannot be the peer.
	{name: "base", config: withoutBAR2, links: map[string]string{atMSIX: threeVectors + " --base-address 4G"}},
	{name: "base-peer", config: withoutBAR2, peer: "base"},
}

var withoutBAR2 = vm.Config{Modules: []string{vm.OwnModule}, QEMU: []string{"-m", "maxmem=2G"}}

// What several ways cannot do.
var (
	noRights     = refusal{"sysfs shows the first 64 bytes of configuration space only", "permission denied"}
	noInterrupts = map[string]refusal{
		"interrupt ping-pong": {"no interrupts", "mode interrupt: not supported by back end sysfs"},
		"two vectors apart":   {"no interrupts", "has no interrupts as it is held"},
		"one-shot":            {"no interrupts", "has no interrupts as it is held"},
		"as ordinary user":    noRights,
		"removal":             {"no interrupts, so no wait that could end", "has no interrupts as it is held"},
	}
	oneCounter  = map[string]refusal{"two vectors apart": {"one counter for all vectors", "a doorbell on vector 1 arrived as"}}
	firstVector = map[string]refusal{
		"two vectors apart": {"the driver enables vector 0 only", "does not arrive through igb_uio"},
		"as ordinary user":  noRights,
	}
	onePin  = map[string]refusal{"two vectors apart": {"INTx is one vector", "expected a vector below 1"}}
	oneLine = map[string]refusal{
		"two vectors apart": onePin["two vectors apart"],
		"as ordinary user":  noRights,
	}
)

// debianRows is the ways in guests with Debian's kernel.
func debianRows(place string) []driverRow {
	return []driverRow{
		{name: "vfio-pci, group", place: place, device: atMSIX, driver: "vfio-pci", backEnd: "vfio-pci", killed: 5},
		{name: "vfio-pci, group, INTx", place: place, device: atINTx, driver: "vfio-pci", backEnd: "vfio-pci", killed: 5, cannot: onePin},
		{name: "vfio-pci, group, I/O space", place: place, device: atIO, driver: "vfio-pci", backEnd: "vfio-pci", killed: 5},
		{name: "uio_ivshmem (kmod/)", place: place, device: atMSIX, driver: vm.OwnModule, backEnd: "uio_ivshmem", cannot: oneCounter},
		{name: "igb_uio", place: place, device: atMSIX, oneVector: atOne, driver: "igb_uio", backEnd: "igb_uio", killed: 5, cannot: firstVector},
		{name: "uio_pci_generic", place: place, device: atMSIX, driver: "uio_pci_generic", backEnd: "sysfs", cannot: noInterrupts},
		{name: "uio_pci_generic, INTx", place: place, device: atPin, driver: "uio_pci_generic", backEnd: "uio_pci_generic", killed: 5, cannot: oneLine},
		{name: "no driver (sysfs)", place: place, device: atMSIX, backEnd: "sysfs", cannot: noInterrupts},
		{name: "no driver (sysfs), I/O space", place: place, device: atIO, backEnd: "sysfs", cannot: noInterrupts},
	}
}

const baseAddress = "uio_ivshmem (kmod/), Base Address"

var driverRows = map[string][]driverRow{
	vm.AMD64: append(debianRows(vm.AMD64), []driverRow{
		{name: baseAddress, place: "base", peer: "base-peer", device: atMSIX, driver: vm.OwnModule, backEnd: "uio_ivshmem", cannot: oneCounter},
		{name: "vfio-pci, iommufd", place: "small", device: atMSIX, driver: "vfio-pci", backEnd: "vfio-pci (iommufd)", killed: 5},
		{name: "vfio-pci, no-IOMMU", place: "no-iommu", device: atMSIX, driver: "vfio-pci", backEnd: "vfio-pci (no-IOMMU)", killed: 5,
			cannot: map[string]refusal{"as ordinary user": {"needs CAP_SYS_RAWIO", "CAP_SYS_RAWIO"}}},
		{name: "vfio-user (host process)", backEnd: "vfio-user"},
	}...),
	vm.ARM64: append(debianRows(vm.ARM64), []driverRow{
		{name: baseAddress, absent: "Debian's QEMU for arm64 has no virtio-pmem, which brings the memory"},
		{name: "vfio-pci, iommufd", absent: "no arm64 kernel with it: Debian's lack it"},
		{name: "vfio-pci, no-IOMMU", absent: "no arm64 kernel with it: Debian's lack it"},
		{name: "vfio-user (processes in a guest)", place: vm.ARM64, backEnd: "vfio-user"},
	}...),
}
