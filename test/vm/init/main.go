// Command init is the first process of a test guest. It mounts the kernel's
// file systems, loads modules, binds the wanted driver to the ivshmem devices
// and then runs a second copy of itself, the agent, which starts commands for
// the host. The first copy only reaps orphans.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/ivshmem-go/ivshmem/test/vm/internal/wire"
	"golang.org/x/sys/unix"
)

const environment = "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func main() {
	if os.Getpid() != 1 {
		bootError := os.Getenv("BOOT_ERROR")
		os.Unsetenv("BOOT_ERROR") // not for the commands
		agent(bootError)
		return
	}
	err := boot()
	if err != nil {
		fmt.Println("init:", err)
	}
	// The agent inherits the console for its own messages.
	_, err = syscall.ForkExec("/init", []string{"/init"}, &syscall.ProcAttr{
		Env:   []string{environment, "HOME=/root", "TERM=linux", "BOOT_ERROR=" + message(err)},
		Files: []uintptr{0, 1, 2},
	})
	for err == nil {
		_, err = syscall.Wait4(-1, nil, 0, nil)
		if err == syscall.EINTR {
			err = nil
		}
	}
	// No child is left, so the agent has failed: end this guest visibly.
	fmt.Println("init: agent is gone:", err)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func boot() error {
	for _, m := range []struct{ kind, dir, data string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"devpts", "/dev/pts", "ptmxmode=666"},
		{"tmpfs", "/dev/shm", ""},
		{"tmpfs", "/tmp", ""},
		{"tmpfs", "/run", ""},
		{"debugfs", "/sys/kernel/debug", ""},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.dir, err)
		}
	}
	for name, target := range map[string]string{"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		_ = os.Symlink("/proc/self/"+target, "/dev/"+name)
	}
	// It leaves programs of packages that have an applet's name alone.
	if out, err := exec.Command("/usr/bin/busybox", "--install", "-s", "/usr/bin").CombinedOutput(); err != nil && len(out) == 0 {
		return fmt.Errorf("install the applets of busybox: %w", err)
	}
	b, err := readBoot()
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(b.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := loadModules(b.Modules); err != nil {
		return err
	}
	if b.Driver != "" {
		return bind(b.Driver)
	}
	return nil
}

func readBoot() (wire.Boot, error) {
	var b wire.Boot
	text, err := os.ReadFile(wire.BootFile)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	return b, err
}

func loadModules(files []string) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	dir := filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:]))
	for _, name := range files {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
}

// bind gives every ivshmem v2 device (vendor 110Ah, device 4106h) to driver.
func bind(driver string) error {
	devices, err := filepath.Glob("/sys/bus/pci/devices/*")
	if err != nil {
		return err
	}
	for _, d := range devices {
		vendor, _ := os.ReadFile(d + "/vendor")
		device, _ := os.ReadFile(d + "/device")
		if strings.TrimSpace(string(vendor)) != "0x110a" || strings.TrimSpace(string(device)) != "0x4106" {
			continue
		}
		if err := os.WriteFile(d+"/driver_override", []byte(driver), 0); err != nil {
			return err
		}
		address := filepath.Base(d)
		if err := os.WriteFile("/sys/bus/pci/drivers_probe", []byte(address), 0); err != nil {
			return fmt.Errorf("bind %s to %s: %w", address, driver, err)
		}
		bound, err := os.Readlink(d + "/driver")
		if err != nil || filepath.Base(bound) != driver {
			return fmt.Errorf("bind %s to %s: the driver did not take the device (module not loaded, or no IOMMU?)", address, driver)
		}
	}
	return nil
}
