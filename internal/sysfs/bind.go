package sysfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/fault"
)

// Binder gives devices to kernel drivers and takes them away again. The
// fields are the places that it reads and writes.
type Binder struct {
	FS      FS
	Dev     string // device files
	Run     string // what has to be known until the next boot
	Rules   string // udev rules
	Modules string // the running kernel's modules

	write func(path, data string) error // of the files of FS
}

// NewBinder is the binder of this machine.
func NewBinder() (*Binder, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("release of the running kernel: %w", err)
	}
	return &Binder{
		FS: Root, Dev: "/dev", Run: "/run/ivshctl", Rules: "/etc/udev/rules.d",
		Modules: "/lib/modules/" + unix.ByteSliceToString(u.Release[:]), write: writeFile,
	}, nil
}

// writeFile writes a file that exists.
func writeFile(path, data string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(data)
	return errors.Join(err, f.Close())
}

// Change is a change of a device's driver that was planned, but not made.
type Change struct {
	Device *Device
	Driver string // the new one, "" for none
	// Users are the processes that have the device open; without force they
	// are an error instead.
	Users []User
	Steps []Step
	// RulePath is the file of the udev rule that is written, with this
	// content, or removed; "" if there is none.
	RulePath, Rule string

	b        *Binder
	op       string
	override string // driver_override as it was found
}

// Step is one step of a change.
type Step struct {
	Shell   string // the same as lines for a shell; "" for a check
	do      func() error
	touches bool // from here on there is something to undo
}

// driverName also keeps out what a shell or a path would take for more.
var driverName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

// Bind plans to give a device to a driver, whose module it loads if it has
// to. With persist it is bound at each boot, by a udev rule. A device that is
// bound to the driver already needs no steps.
func (b *Binder) Bind(d *Device, driver string, force, persist bool) (*Change, error) {
	c := &Change{Device: d, Driver: driver, b: b, op: "bind to " + driver}
	if !driverName.MatchString(driver) {
		return nil, c.failed(fmt.Errorf("expected the name of a kernel driver such as vfio-pci, found %q", driver))
	}
	if driver != d.Driver {
		former := b.former(d)
		if former == "" {
			former = d.Driver
		}
		if err := c.plan(force); err != nil {
			return nil, c.failed(err)
		}
		if former != "" && former != driver {
			c.remember(former)
		} else {
			c.remove(b.record(d))
		}
	}
	if persist {
		c.RulePath, c.Rule = b.rule(d), bindRule(d.Addr, driver)
		c.step(fmt.Sprintf("cat >%s <<'EOF'\n%sEOF", c.RulePath, c.Rule), func() error { return createFile(c.RulePath, c.Rule) })
	}
	return c, nil
}

// Unbind plans to take a device from its driver, and to give it back to the
// one it had before Bind. A rule of Bind goes as well.
func (b *Binder) Unbind(d *Device, force bool) (*Change, error) {
	c := &Change{Device: d, Driver: b.former(d), b: b, op: "unbind"}
	if d.Driver != "" {
		if err := c.plan(force); err != nil {
			return nil, c.failed(err)
		}
	}
	c.remove(b.record(d))
	if c.remove(b.rule(d)) {
		c.RulePath = b.rule(d)
	}
	return c, nil
}

func (c *Change) plan(force bool) error {
	d, b := c.Device, c.b
	c.Users = b.users(d)
	if len(c.Users) > 0 && !force {
		return &fault.Reason{Err: fmt.Errorf("%w: %w", fault.ErrBusy, userError(c.Users)),
			Remedy: "end it, or use --force, which takes the device away from it"}
	}
	override, err := os.ReadFile(c.file("driver_override"))
	if err != nil {
		return err
	}
	if c.override = strings.TrimSpace(string(override)); c.override == "(null)" {
		c.override = ""
	}
	if c.Driver != "" {
		if b.has(c.Driver) {
			if err := c.ready(); err != nil {
				return err
			}
		}
		modules, err := b.load(c.Driver)
		if err != nil {
			return err
		}
		c.Steps = append(c.Steps, modules...)
		c.step("", c.ready)
	}
	first := len(c.Steps)
	if d.Driver != "" {
		c.echo(d.Addr, b.driver(d.Driver, "unbind"))
	}
	if c.Driver != "" {
		c.echo(c.Driver, c.file("driver_override"))
		c.echo(d.Addr, b.path("drivers_probe"))
		probe := &c.Steps[len(c.Steps)-1]
		write := probe.do
		probe.do = func() error { return c.probed(write()) }
	}
	c.echo("", c.file("driver_override"))
	c.Steps[first].touches = true
	return nil
}

func (c *Change) file(name string) string { return filepath.Join(c.Device.FullPath, name) }

func (b *Binder) path(names ...string) string {
	return filepath.Join(append([]string{string(b.FS), "bus/pci"}, names...)...)
}

func (b *Binder) driver(driver, file string) string { return b.path("drivers", driver, file) }

// has reports whether a driver is registered with the kernel.
func (b *Binder) has(driver string) bool { return exists(b.driver(driver, "")) }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (c *Change) step(shell string, do func() error) {
	c.Steps = append(c.Steps, Step{Shell: shell, do: do})
}

func (c *Change) echo(data, path string) {
	c.step(strings.TrimSpace("echo "+data)+" >"+path, func() error { return c.b.write(path, data+"\n") })
}

// remove adds a step for a file, if it is there.
func (c *Change) remove(path string) bool {
	if !exists(path) {
		return false
	}
	c.step("rm "+path, func() error { return os.Remove(path) })
	return true
}

func createFile(path, content string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(content), 0o644)
}

// record is the file that keeps the driver a device was bound to, and the one
// before, a line each.
func (b *Binder) record(d *Device) string { return filepath.Join(b.Run, d.Addr) }

func (c *Change) remember(former string) {
	path, driver := c.b.record(c.Device), c.Driver
	c.step(fmt.Sprintf("mkdir -p %s; printf '%s\\n%s\\n' >%s", c.b.Run, driver, former, path), func() error {
		return createFile(path, driver+"\n"+former+"\n")
	})
}

// former is the driver that a device had before Bind, "" if none or if
// somebody else has bound it since.
func (b *Binder) former(d *Device) string {
	content, _ := os.ReadFile(b.record(d))
	f := strings.Fields(string(content))
	if len(f) != 2 || f[0] != d.Driver || !driverName.MatchString(f[1]) {
		return ""
	}
	return f[1]
}

// Do makes the change. If a step fails the device is given back to the driver
// that it had.
func (c *Change) Do() error {
	if len(c.Steps) == 0 {
		return nil
	}
	if err := unix.Faccessat(unix.AT_FDCWD, c.file("driver_override"), unix.W_OK, unix.AT_EACCESS); err != nil {
		err = &os.PathError{Op: "write", Path: c.file("driver_override"), Err: err}
		return c.failed(&fault.Reason{Err: err, Remedy: "changing drivers needs root, and a sysfs that can be written: run as root"})
	}
	touched := false
	for _, s := range c.Steps {
		touched = touched || s.touches
		err := s.do()
		if err == nil {
			continue
		}
		if touched {
			if undo := c.undo(); undo != nil {
				err = errors.Join(err, fmt.Errorf("and the device is not as it was: %w", undo))
			}
		}
		return c.failed(err)
	}
	return nil
}

func (c *Change) failed(err error) error {
	e := &fault.DeviceError{Device: c.Device.Addr, Op: c.op, Err: err}
	if r := (*fault.Reason)(nil); errors.As(err, &r) && err == error(r) {
		e.Err, e.Remedy = r.Err, r.Remedy
	}
	return e
}

// undo leaves the device as it was found.
func (c *Change) undo() error {
	var errs []error
	write := func(data, path string) { errs = append(errs, c.b.write(path, data+"\n")) }
	was := c.Device.Driver
	if now := linkName(c.Device.FullPath, "driver"); now != was {
		if now != "" {
			write(c.Device.Addr, c.b.driver(now, "unbind"))
		}
		if was != "" {
			write(was, c.file("driver_override"))
			write(c.Device.Addr, c.b.path("drivers_probe"))
		}
	}
	write(c.override, c.file("driver_override"))
	if now := linkName(c.Device.FullPath, "driver"); now != was {
		errs = append(errs, fmt.Errorf("expected it back at driver %q, found %q", was, now))
	}
	return errors.Join(errs...)
}
