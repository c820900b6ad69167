package vm

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
	"github.com/ivshmem-go/ivshmem/test/vm/internal/wire"
	"golang.org/x/sys/unix"
)

// Config describes a guest. The zero value is a guest without an ivshmem
// device.
type Config struct {
	// Name is the guest's host name and appears in messages; "guest" if
	// empty.
	Name string
	// Devices are the vfio-user devices of the guest. Their services must
	// listen before the guest starts.
	Devices []Device
	// Driver is the kernel driver that init binds to every ivshmem device
	// ("vfio-pci", "uio_pci_generic", or OwnModule); "" leaves them unbound.
	Driver string
	// NoIOMMU leaves out the virtual IOMMU, without which vfio-pci cannot
	// be used.
	NoIOMMU bool
	// Memory is the guest's memory in MiB; 0 is enough for what is in it.
	Memory int
	// CPUs is the number of virtual processors; 0 is one.
	CPUs int
	// Arch is the guest's architecture, Debian's name; "" is AMD64.
	Arch string
	// Kernel is the Debian release whose cloud kernel boots and whose
	// packages are used; "" is fetch.Trixie. fetch.Small has the kernel that is
	// built from source, for AMD64 and without OwnModule.
	Kernel string
	// Append is added to the kernel's command line.
	Append []string
	// Modules are kernel modules that init loads, with those they depend
	// on, besides the VFIO and UIO drivers for PCI. OwnModule is built.
	Modules []string
	// Files are copied into the guest: path in the guest to path on the
	// host, with the permission bits they have there.
	Files map[string]string
	// Packages are Debian packages that are unpacked into the guest, with
	// those they depend on. Their installation scripts do not run.
	Packages []string
	// Env is added to the environment of commands, as KEY=value.
	Env []string
	// QEMU is added to QEMU's command line.
	QEMU []string
	// Progress is told when something is fetched; may be nil.
	Progress func(message string)

	connected func() // told when QEMU has connected to its devices' services
}

// Device is a vfio-user device of a guest.
type Device struct {
	// Socket is the path of the service's Unix socket.
	Socket string
	// Address is the place on the root bus, such as "0xe" or "0xe.1"; ""
	// is the first free one.
	Address string
	// RootPort puts the device behind a PCI Express root port of its own,
	// where vfio-pci can reset it.
	RootPort bool
}

// AMD64 and ARM64 are Debian's names of architectures.
const (
	AMD64 = "amd64"
	ARM64 = "arm64"
)

// modules are loaded in every guest, in this order. Until the one of the
// virtual IOMMU is there, an arm64 kernel defers the binding of all drivers.
func (c *Config) modules() []string {
	m := []string{"virtio_pci", "virtio_console", "vfio_iommu_type1", "vfio-pci", "uio_pci_generic"}
	if c.arch() == ARM64 && !c.NoIOMMU {
		m = append([]string{"virtio-iommu"}, m...)
	}
	if c.Driver == OwnModule {
		m = append(m, OwnModule)
	}
	return append(m, c.Modules...)
}

// image is what QEMU loads for a guest.
type image struct {
	qemu     []string
	kernel   string
	initrd   *os.File // a memfd: there is no file to clean up
	boot     wire.Boot
	memory   int // MiB
	cacheDir string
}

func (c *Config) prepare(ctx context.Context) (*image, error) {
	cache, err := fetch.Open(c.Progress)
	if err != nil {
		return nil, err
	}
	release := c.Kernel
	if release == "" {
		release = fetch.Trixie
	}
	img := &image{memory: c.Memory, cacheDir: cache.Dir}
	if img.qemu, err = cache.QEMU(ctx, c.arch()); err != nil {
		return nil, err
	}
	kernel, err := cache.Kernel(ctx, release, c.arch())
	if err != nil {
		return nil, err
	}
	img.kernel = kernel.Image
	root, err := systemArchive(ctx, cache, release, c.arch())
	if err != nil {
		return nil, err
	}
	img.boot = wire.Boot{GuestToken: token(), HostToken: token(), Hostname: c.name(), Env: c.Env, Driver: c.Driver}
	if len(c.Packages) > 0 {
		unpacked, err := cache.Packages(ctx, release, c.arch(), c.Packages)
		if err == nil {
			err = root.tree(unpacked)
		}
		if err != nil {
			return nil, err
		}
	}
	modules, extra := c.modules(), map[string]string{}
	if slices.Contains(modules, OwnModule) {
		if extra[OwnModule], err = BuildModule(ctx, cache, release, c.arch()); err != nil {
			return nil, err
		}
	}
	if img.boot.Modules, err = root.modules(kernel, extra, modules); err != nil {
		return nil, err
	}
	for to, from := range c.Files {
		if err := root.file(to, from); err != nil {
			return nil, err
		}
	}
	boot, err := json.Marshal(img.boot)
	if err != nil {
		return nil, err
	}
	root.data(wire.BootFile, boot, 0o600)
	content, err := root.bytes()
	if err != nil {
		return nil, err
	}
	if img.memory == 0 {
		// The archive is in memory twice while the kernel unpacks it,
		// and the root file system may fill half of the memory.
		img.memory = 192 + 3*len(content)>>20
	}
	fd, err := unix.MemfdCreate("initramfs", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	img.initrd = os.NewFile(uintptr(fd), "initramfs")
	if _, err := img.initrd.Write(content); err != nil {
		img.initrd.Close()
		return nil, err
	}
	return img, nil
}

func (c *Config) arch() string {
	if c.Arch == "" {
		return AMD64
	}
	return c.Arch
}

func (c *Config) name() string {
	if c.Name == "" {
		return "guest"
	}
	return c.Name
}

func token() []byte {
	b := make([]byte, wire.TokenSize)
	rand.Read(b) // never fails
	return b
}

// systems keeps what all guests of a release share.
var systems struct {
	sync.Mutex
	archives map[string]archive
}

// systemArchive returns a copy of what all guests of a release share.
func systemArchive(ctx context.Context, cache *fetch.Cache, release, arch string) (archive, error) {
	systems.Lock()
	defer systems.Unlock()
	if a := systems.archives[release+arch]; a != nil {
		return maps.Clone(a), nil
	}
	binaries, err := Binaries(ctx, cache.Dir, arch)
	if err != nil {
		return nil, err
	}
	busybox, err := cache.Busybox(ctx, release, arch)
	if err != nil {
		return nil, err
	}
	a := archive{}
	if err := a.system(busybox, binaries); err != nil {
		return nil, err
	}
	if systems.archives == nil {
		systems.archives = map[string]archive{}
	}
	systems.archives[release+arch] = a
	return maps.Clone(a), nil
}

// Descriptors that QEMU inherits.
const (
	agentFD = 3 + iota
	monitorFD
	initrdFD
)

// arguments returns QEMU's command line.
func (c *Config) arguments(img *image, kvm bool) ([]string, error) {
	accel, machine := "tcg", "q35"
	cmdline := []string{"console=ttyS0", "quiet", "panic=-1", "tsc=reliable", "cryptomgr.notests",
		// On a busy host an emulated timer may tick too late for the check.
		"no_timer_check"}
	iommu, kernelIOMMU := "intel-iommu,intremap=on,caching-mode=on", "intel_iommu=on"
	cpu := "max"
	if c.arch() == ARM64 {
		machine = "virt,gic-version=3"
		cmdline = []string{"console=ttyAMA0", "quiet", "panic=-1", "cryptomgr.notests"}
		iommu, kernelIOMMU = "virtio-iommu-pci", ""
		cpu = "max,pauth-impdef=on" // the architected algorithm is slow to emulate
	}
	if kvm {
		accel = "kvm"
	}
	if !c.NoIOMMU {
		if c.arch() == AMD64 {
			machine += ",kernel-irqchip=split" // for interrupt remapping with KVM
		}
		cmdline = append(cmdline, kernelIOMMU)
	}
	args := append(img.qemu[1:len(img.qemu):len(img.qemu)],
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none",
		"-name", c.name(), "-M", machine, "-accel", accel, "-cpu", cpu,
		"-m", strconv.Itoa(img.memory)+"M", "-smp", strconv.Itoa(max(c.CPUs, 1)),
		"-kernel", img.kernel, "-initrd", fmt.Sprintf("/proc/self/fd/%d", initrdFD),
		"-append", strings.Join(append(cmdline, c.Append...), " "),
		"-serial", "stdio",
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d", monitorFD), "-qmp", "chardev:monitor",
		// High on the bus, so that any lower address is free for devices.
		"-device", "virtio-serial-pci,addr=0x1e",
		"-chardev", fmt.Sprintf("socket,id=agent,fd=%d", agentFD), "-device", "virtserialport,chardev=agent,name="+wire.Port,
	)
	if !c.NoIOMMU {
		// Before the devices it is to serve.
		args = append(args, "-device", iommu)
	}
	for i, d := range c.Devices {
		socket, err := filepath.Abs(d.Socket)
		if err != nil {
			return nil, err
		}
		device := map[string]any{
			"driver": "vfio-user-pci", "id": fmt.Sprintf("ivshmem%d", i),
			"socket": map[string]string{"type": "unix", "path": socket},
		}
		if d.RootPort {
			port := fmt.Sprintf("pcie-root-port,id=port%d,chassis=%d", i, i+1)
			if d.Address != "" {
				port += ",addr=" + d.Address
			}
			args = append(args, "-device", port)
			device["bus"] = fmt.Sprintf("port%d", i)
		} else if d.Address != "" {
			device["addr"] = d.Address
		}
		text, err := json.Marshal(device)
		if err != nil {
			return nil, err
		}
		args = append(args, "-device", string(text))
	}
	return append(args, c.QEMU...), nil
}

// Fetch puts what a guest needs into the cache.
func Fetch(ctx context.Context, cache *fetch.Cache, release, arch string, packages []string) error {
	if _, err := cache.QEMU(ctx, arch); err != nil {
		return err
	}
	if _, err := cache.Kernel(ctx, release, arch); err != nil {
		return err
	}
	if _, err := cache.Busybox(ctx, release, arch); err != nil {
		return err
	}
	if len(packages) == 0 {
		return nil
	}
	_, err := cache.Packages(ctx, release, arch, packages)
	return err
}
