package sysfs_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
)

const target = "0000:00:04.0"

// kernel does what Linux does when the files of a tree are written.
type kernel struct {
	*tree
	b   *sysfs.Binder
	dir string // of the device
	// probe is what a driver says to the device.
	probe map[string]error
	log   []string // writes, as "file=data"
}

var errDeferred = errors.New("deferred")

func newKernel(t *testing.T, drivers ...string) *kernel {
	f := newTree(t)
	k := &kernel{tree: f, dir: f.device(target), probe: map[string]error{}}
	f.write(k.dir+"/driver_override", "(null)\n")
	f.write("bus/pci/drivers_probe", "")
	f.write("kernel/iommu_groups/5/type", "DMA")
	f.link(k.dir+"/iommu_group", "../../../kernel/iommu_groups/5")
	f.write("class/iommu/dmar0", "")
	f.write("module/vfio_iommu_type1/refcnt", "0")
	for _, d := range drivers {
		f.write("bus/pci/drivers/"+d+"/unbind", "")
	}
	k.b = &sysfs.Binder{FS: f.fs(), Dev: filepath.Join(f.root, "dev"), Run: filepath.Join(f.root, "run"), Rules: filepath.Join(f.root, "rules.d"), Modules: filepath.Join(f.root, "modules")}
	k.b.SetWrite(k.serve)
	return k
}

func (k *kernel) serve(path, data string) error {
	name, _ := filepath.Rel(k.root, path)
	name = strings.TrimPrefix(strings.TrimPrefix(name, "bus/pci/"), "devices/"+target+"/")
	k.log = append(k.log, name+"="+strings.TrimSpace(data))
	if err := sysfs.WriteFile(path, data); err != nil {
		return err
	}
	link := filepath.Join(k.root, k.dir, "driver")
	switch filepath.Base(path) {
	case "unbind":
		return os.Remove(link)
	case "driver_override":
		if data == "\n" {
			return sysfs.WriteFile(path, "(null)\n")
		}
	case "drivers_probe":
		driver := strings.TrimSpace(k.read(k.dir + "/driver_override"))
		switch err := k.probe[driver]; err {
		case nil:
			k.link(k.dir+"/driver", "../../../bus/pci/drivers/"+driver)
		case errDeferred:
			return &os.PathError{Op: "write", Path: path, Err: unix.EINVAL}
		}
	}
	return nil
}

func (k *kernel) device() *sysfs.Device {
	k.Helper()
	d, err := k.b.FS.Device(target)
	if err != nil {
		k.Fatal(err)
	}
	return d
}

// bound says what the device is bound to, and that nothing else is left over.
func (k *kernel) bound(driver string) {
	k.Helper()
	if got := k.device().Driver; got != driver {
		k.Errorf("bound to %q, want %q", got, driver)
	}
	if got := k.read(k.dir + "/driver_override"); got != "(null)\n" {
		k.Errorf("driver_override is %q", got)
	}
}

func (k *kernel) bind(driver string) {
	k.Helper()
	c, err := k.b.Bind(k.device(), driver, false, false)
	if err == nil {
		err = c.Do()
	}
	if err != nil {
		k.Fatal(err)
	}
	k.bound(driver)
}

func (k *kernel) unbind(driver string) {
	k.Helper()
	c, err := k.b.Unbind(k.device(), false)
	if err == nil {
		err = c.Do()
	}
	if err != nil {
		k.Fatal(err)
	}
	if c.Driver != driver {
		k.Errorf("driver after unbind is said to be %q, want %q", c.Driver, driver)
	}
	k.bound(driver)
}

func TestBind(t *testing.T) {
	k := newKernel(t, "vfio-pci", "uio_pci_generic")
	k.bind("vfio-pci")
	want := []string{"driver_override=vfio-pci", "drivers_probe=" + target, "driver_override="}
	if d := cmp.Diff(want, k.log); d != "" {
		t.Error(d)
	}
	k.log = nil
	k.bind("vfio-pci") // again: nothing to do
	if len(k.log) > 0 {
		t.Errorf("writes for a device that is bound already: %q", k.log)
	}
	k.unbind("")
	want = []string{"drivers/vfio-pci/unbind=" + target, "driver_override="}
	if d := cmp.Diff(want, k.log); d != "" {
		t.Error(d)
	}
	k.unbind("")

	// Unbind gives it back to the driver before the first bind.
	k.bind("uio_pci_generic")
	k.unbind("")
	k.link(k.dir+"/driver", "../../../bus/pci/drivers/uio_pci_generic")
	k.bind("vfio-pci")
	k.unbind("uio_pci_generic")
	k.unbind("") // it was not bind that bound it
	k.link(k.dir+"/driver", "../../../bus/pci/drivers/uio_pci_generic")
	k.bind("vfio-pci")
	k.bind("uio_pci_generic") // back by hand
	k.unbind("")
}

// What bind remembers counts only while the device is where bind put it.
func TestBindRecordIsStale(t *testing.T) {
	k := newKernel(t, "vfio-pci", "uio_pci_generic", "igb_uio")
	k.link(k.dir+"/driver", "../../../bus/pci/drivers/uio_pci_generic")
	k.bind("vfio-pci")
	if err := os.Remove(filepath.Join(k.root, k.dir, "driver")); err != nil {
		t.Fatal(err)
	}
	k.link(k.dir+"/driver", "../../../bus/pci/drivers/igb_uio")
	k.unbind("")

	// Over two binds the first driver is the one to go back to.
	k.link(k.dir+"/driver", "../../../bus/pci/drivers/uio_pci_generic")
	k.bind("vfio-pci")
	k.bind("igb_uio")
	k.unbind("uio_pci_generic")
}

// noGroup takes the IOMMU group from the device.
func noGroup(k *kernel) {
	if err := os.Remove(filepath.Join(k.root, k.dir, "iommu_group")); err != nil {
		k.Fatal(err)
	}
}

// noIOMMU takes the IOMMU from the machine.
func noIOMMU(k *kernel) {
	noGroup(k)
	if err := os.Remove(filepath.Join(k.root, "class/iommu/dmar0")); err != nil {
		k.Fatal(err)
	}
}

// Whatever goes wrong is said, and leaves the device as it was.
func TestBindFails(t *testing.T) {
	virtioIOMMU := func(k *kernel) {
		k.foreign("0000:00:01.0", map[string]string{"vendor": "0x1af4\n", "device": "0x1057\n"})
	}
	for name, c := range map[string]struct {
		driver  string
		prepare func(*kernel)
		is      error
		say     []string
	}{
		"no such driver": {"nonsense", func(*kernel) {}, nil, []string{"expected kernel driver nonsense", "check the name"}},
		"not installed":  {"igb_uio", func(*kernel) {}, nil, []string{"expected kernel driver igb_uio", "dpdk-kmods-dkms"}},
		"refused":        {"vfio-pci", func(k *kernel) { k.probe["vfio-pci"] = errors.New("no") }, nil, []string{"refused the device", "dmesg | grep " + target}},
		"deferred":       {"vfio-pci", func(k *kernel) { k.probe["vfio-pci"] = errDeferred }, unix.EINVAL, []string{"put the probe off", "load that driver"}},
		"deferred by virtio-iommu": {"vfio-pci", func(k *kernel) { virtioIOMMU(k); k.probe["vfio-pci"] = errDeferred }, unix.EINVAL,
			[]string{"put the probe off", "modprobe virtio-iommu"}},
		"no IOMMU":          {"vfio-pci", noIOMMU, fault.ErrNotSupported, []string{"expects an IOMMU group", "intel_iommu=on"}},
		"virtio-iommu idle": {"vfio-pci", func(k *kernel) { noIOMMU(k); virtioIOMMU(k) }, fault.ErrNotSupported, []string{"expects an IOMMU group", "modprobe virtio-iommu"}},
		"IOMMU for others": {"vfio-pci", func(k *kernel) { noGroup(k); k.probe["vfio-pci"] = errors.New("no group") }, fault.ErrNotSupported,
			[]string{"expects an IOMMU group"}},
		"virtio-iommu serves others": {"vfio-pci", func(k *kernel) { noIOMMU(k); virtioIOMMU(k); k.write("bus/virtio/drivers/virtio_iommu/bind", "") },
			fault.ErrNotSupported, []string{"expects an IOMMU group", "intel_iommu=on"}},
		"bad name":           {"../vfio-pci", func(*kernel) {}, nil, []string{"expected the name of a kernel driver"}},
		"shell":              {"x;reboot", func(*kernel) {}, nil, []string{"expected the name of a kernel driver"}},
		"no driver_override": {"vfio-pci", func(k *kernel) { os.Remove(filepath.Join(k.root, k.dir, "driver_override")) }, os.ErrNotExist, []string{"driver_override"}},
	} {
		for _, former := range []string{"", "uio_pci_generic"} {
			t.Run(name+" from "+former, func(t *testing.T) {
				t.Setenv("PATH", "") // no modprobe
				k := newKernel(t, "vfio-pci", "uio_pci_generic")
				if former != "" {
					k.link(k.dir+"/driver", "../../../bus/pci/drivers/"+former)
				}
				c.prepare(k)
				change, err := k.b.Bind(k.device(), c.driver, false, true)
				if err == nil {
					err = change.Do()
				}
				e, ok := errors.AsType[*fault.DeviceError](err)
				if !ok || e.Device != target || c.is != nil && !errors.Is(err, c.is) {
					t.Fatalf("%v, want %v", err, c.is)
				}
				for _, say := range c.say {
					if !strings.Contains(err.Error(), say) {
						t.Errorf("%v does not say %q", err, say)
					}
				}
				if strings.Contains(err.Error(), "not as it was") {
					t.Error(err)
				}
				if c.is != os.ErrNotExist {
					k.bound(former)
				}
				for _, path := range []string{k.b.Run, k.b.Rules} {
					if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("%s: %v, want nothing there", path, err)
					}
				}
			})
		}
	}
}

// A driver_override that was there is there again after a failure; and if the
// former driver does not take the device back, that is said.
func TestBindUndo(t *testing.T) {
	k := newKernel(t, "vfio-pci", "uio_pci_generic")
	k.write(k.dir+"/driver_override", "mine\n")
	k.probe["vfio-pci"] = errors.New("no")
	c, err := k.b.Bind(k.device(), "vfio-pci", false, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Do(); err == nil || strings.Contains(err.Error(), "not as it was") {
		t.Error(err)
	}
	if got := k.read(k.dir + "/driver_override"); got != "mine\n" {
		t.Errorf("driver_override is %q", got)
	}
	k.link(k.dir+"/driver", "../../../bus/pci/drivers/uio_pci_generic")
	k.probe["uio_pci_generic"] = errors.New("no")
	if c, err = k.b.Bind(k.device(), "vfio-pci", false, false); err != nil {
		t.Fatal(err)
	}
	if err := c.Do(); err == nil || !strings.Contains(err.Error(), `not as it was: expected it back at driver "uio_pci_generic", found ""`) {
		t.Error(err)
	}

	// A rule that cannot be written: nothing is half done.
	k = newKernel(t, "vfio-pci", "uio_pci_generic")
	k.link(k.dir+"/driver", "../../../bus/pci/drivers/uio_pci_generic")
	k.write("rules.d", "a file, not a folder")
	if c, err = k.b.Bind(k.device(), "vfio-pci", false, true); err != nil {
		t.Fatal(err)
	}
	if err := c.Do(); !errors.Is(err, unix.ENOTDIR) {
		t.Error(err)
	}
	k.bound("uio_pci_generic")
}

// vfio-pci without IOMMU is possible where the user has switched that on.
func TestBindNoIOMMUMode(t *testing.T) {
	k := newKernel(t, "vfio-pci")
	noIOMMU(k)
	k.write("module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
	k.bind("vfio-pci")
}

// On arm64 a device gets its group with its first driver.
func TestBindGroupComesLate(t *testing.T) {
	k := newKernel(t, "vfio-pci")
	noGroup(k)
	k.bind("vfio-pci")
}

func shell(c *sysfs.Change) (lines []string) {
	for _, s := range c.Steps {
		if s.Shell != "" {
			lines = append(lines, s.Shell)
		}
	}
	return lines
}

// Planning changes nothing, and names every step.
func TestBindSteps(t *testing.T) {
	t.Setenv("PATH", "")
	k := newKernel(t, "uio_pci_generic")
	k.link(k.dir+"/driver", "../../../bus/pci/drivers/uio_pci_generic")
	// As depmod writes it (all that is needed) for one, and as a list of
	// what is needed directly for another.
	k.write("modules/modules.dep", `kernel/drivers/vfio/vfio.ko.xz:
kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/pci/vfio-pci-core.ko.xz
kernel/drivers/vfio/pci/vfio-pci-core.ko.xz: kernel/drivers/vfio/vfio.ko.xz kernel/virt/lib/irqbypass.ko.xz
kernel/virt/lib/irqbypass.ko.xz:
kernel/drivers/vfio/vfio_iommu_type1.ko.xz: kernel/drivers/vfio/vfio.ko.xz
`)
	k.write("module/irqbypass/refcnt", "0") // loaded
	if err := os.RemoveAll(filepath.Join(k.root, "module/vfio_iommu_type1")); err != nil {
		t.Fatal(err)
	}
	c, err := k.b.Bind(k.device(), "vfio-pci", false, true)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(k.root, "bus/pci/devices", target)
	modules := k.b.Modules + "/kernel/drivers/vfio/"
	rule := k.b.Rules + "/70-ivshctl-" + target + ".rules"
	want := []string{
		"insmod " + modules + "vfio.ko.xz",
		"insmod " + modules + "pci/vfio-pci-core.ko.xz",
		"insmod " + modules + "pci/vfio-pci.ko.xz",
		"insmod " + modules + "vfio_iommu_type1.ko.xz",
		"echo " + target + " >" + k.root + "/bus/pci/drivers/uio_pci_generic/unbind",
		"echo vfio-pci >" + dir + "/driver_override",
		"echo " + target + " >" + k.root + "/bus/pci/drivers_probe",
		"echo >" + dir + "/driver_override",
		"mkdir -p " + k.b.Run + `; printf 'vfio-pci\nuio_pci_generic\n' >` + k.b.Run + "/" + target,
		"cat >" + rule + " <<'EOF'\n" + c.Rule + "EOF",
	}
	if d := cmp.Diff(want, shell(c)); d != "" {
		t.Error(d)
	}
	if len(k.log) > 0 {
		t.Errorf("planning wrote %q", k.log)
	}
	k.bound("uio_pci_generic")

	// Loading fails (these are no modules): nothing was touched.
	if err := c.Do(); err == nil || !strings.Contains(err.Error(), "expected kernel driver vfio-pci, or a module for it, found neither") {
		t.Error(err)
	}
	if len(k.log) > 0 {
		t.Errorf("writes after loading failed: %q", k.log)
	}
}

func TestPersist(t *testing.T) {
	k := newKernel(t, "vfio-pci")
	c, err := k.b.Bind(k.device(), "vfio-pci", false, true)
	if err == nil {
		err = c.Do()
	}
	if err != nil {
		t.Fatal(err)
	}
	rule := "rules.d/70-ivshctl-" + target + ".rules"
	got := k.read(rule)
	for _, part := range []string{`KERNEL=="` + target + `"`, `ATTR{vendor}=="0x110a"`, `ATTR{device}=="0x4106"`, `ATTR{driver_override}="vfio-pci"`, `kmod load vfio-pci`} {
		if !strings.Contains(got, part) {
			t.Errorf("%q lacks %q", got, part)
		}
	}
	if c.Rule != got || c.RulePath != filepath.Join(k.root, rule) {
		t.Errorf("said to be %s: %s", c.RulePath, c.Rule)
	}
	// On a device that is bound already, the rule is all there is to do.
	if err := os.Remove(c.RulePath); err != nil {
		t.Fatal(err)
	}
	if c, err = k.b.Bind(k.device(), "vfio-pci", false, true); err != nil || len(shell(c)) != 1 {
		t.Fatalf("%q, %v", shell(c), err)
	}
	if err := c.Do(); err != nil {
		t.Fatal(err)
	}
	k.unbind("")
	if _, err := os.Stat(c.RulePath); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after unbind: %v", err)
	}
}

func TestBindInUse(t *testing.T) {
	for name, use := range map[string]func(*kernel) (say string, end func()){
		"owner": func(k *kernel) (string, func()) {
			release, err := k.device().Own()
			if err != nil {
				k.Fatal(err)
			}
			return "owns it", func() { release() }
		},
		"VFIO group": func(k *kernel) (string, func()) { return openFile(k, "dev/vfio/5") },
		"iommufd": func(k *kernel) (string, func()) {
			k.write(k.dir+"/vfio-dev/vfio3/dev", "")
			return openFile(k, "dev/vfio/devices/vfio3")
		},
		"UIO": func(k *kernel) (string, func()) {
			k.write(k.dir+"/uio/uio7/name", "")
			return openFile(k, "dev/uio7")
		},
		"UIO mapped": func(k *kernel) (string, func()) {
			k.write(k.dir+"/uio/uio7/name", "")
			say, end := openFile(k, "dev/uio7")
			f, err := os.Open(filepath.Join(k.root, "dev/uio7"))
			if err != nil {
				k.Fatal(err)
			}
			m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
			if err != nil {
				k.Fatal(err)
			}
			f.Close()
			end()
			return say, func() { unix.Munmap(m) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(t, "vfio-pci", "uio_pci_generic")
			k.link(k.dir+"/driver", "../../../bus/pci/drivers/uio_pci_generic")
			say, end := use(k)
			_, errBind := k.b.Bind(k.device(), "vfio-pci", false, false)
			_, errUnbind := k.b.Unbind(k.device(), false)
			me := sysfs.Owner{PID: os.Getpid()}.String()
			for _, err := range []error{errBind, errUnbind} {
				if !errors.Is(err, fault.ErrBusy) || !strings.Contains(err.Error(), me) || !strings.Contains(err.Error(), say) || !strings.Contains(err.Error(), "--force") {
					t.Errorf("%v, want ErrBusy, %q and %q", err, me, say)
				}
			}
			c, err := k.b.Bind(k.device(), "vfio-pci", true, false)
			if err != nil || len(c.Users) != 1 || c.Users[0].PID != os.Getpid() {
				t.Fatalf("forced: %v, %v", c, err)
			}
			if err := c.Do(); err != nil {
				t.Error(err)
			}
			k.bound("vfio-pci")
			end()
			k.unbind("uio_pci_generic")
		})
	}
}

func openFile(k *kernel, name string) (say string, end func()) {
	k.write(name, strings.Repeat("\x00", 4096))
	f, err := os.Open(filepath.Join(k.root, name))
	if err != nil {
		k.Fatal(err)
	}
	return "has " + f.Name() + " open", func() { f.Close() }
}

func TestGroupRules(t *testing.T) {
	for _, name := range []string{"", "Ivshmem", "a b", `a"`, "-a", strings.Repeat("a", 33)} {
		if rules, err := sysfs.GroupRules(name); err == nil {
			t.Errorf("group %q: %s", name, rules)
		}
	}
	rules, err := sysfs.GroupRules("users")
	if err != nil || strings.Count(rules, `GROUP="users", MODE="0660"`) != 4 || !strings.Contains(rules, "PCI_ID=110A:4106") {
		t.Errorf("%q, %v", rules, err)
	}
}

// modprobe puts a command of that name into PATH, which runs a script in the
// root of the tree.
func (k *kernel) modprobe(t *testing.T, script string) {
	dir := t.TempDir()
	text := "#!/bin/sh\nPATH=/usr/bin:/bin\ncd " + k.root + "\necho $1 >>modprobe.log\n" + script + "\n"
	if err := os.WriteFile(filepath.Join(dir, "modprobe"), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
}

func TestBindLoadsModule(t *testing.T) {
	k := newKernel(t)
	if err := os.RemoveAll(filepath.Join(k.root, "module/vfio_iommu_type1")); err != nil {
		t.Fatal(err)
	}
	// The second module is missing: that is for who opens the device to say.
	k.modprobe(t, "[ $1 = vfio-pci ] && mkdir -p bus/pci/drivers/$1 && : >bus/pci/drivers/$1/unbind")
	k.bind("vfio-pci")
	if got := k.read("modprobe.log"); got != "vfio-pci\nvfio_iommu_type1\n" {
		t.Errorf("modules: %q", got)
	}
	k.unbind("")

	// What only shows once the module is there leaves the device untouched.
	for say, prepare := range map[string]func(){
		"no PCI driver has that name": func() { k.modprobe(t, "true") },
		"expects an IOMMU group": func() {
			k.modprobe(t, "mkdir -p bus/pci/drivers/$1")
			noIOMMU(k)
		},
		"modprobe vfio-pci: exit status 3: from modprobe": func() { k.modprobe(t, "echo from modprobe >&2; exit 3") },
	} {
		if err := os.RemoveAll(filepath.Join(k.root, "bus/pci/drivers/vfio-pci")); err != nil {
			t.Fatal(err)
		}
		prepare()
		k.log = nil
		c, err := k.b.Bind(k.device(), "vfio-pci", false, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Do(); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%v, want %q", err, say)
		}
		if len(k.log) > 0 {
			t.Errorf("%s: writes %q", say, k.log)
		}
	}
}
