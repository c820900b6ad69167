package sysfs

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// User is a process that uses a device.
type User struct {
	Owner
	File string // the device file it has open; "" for the owner of the device
}

func (u User) String() string {
	if u.File == "" {
		return u.Owner.String() + " owns it"
	}
	return u.Owner.String() + " has " + u.File + " open"
}

func userError(users []User) error {
	var s []string
	for _, u := range users {
		s = append(s, u.String())
	}
	return errors.New(strings.Join(s, ", "))
}

// users lists the owner of a device and those who have its VFIO group or its
// UIO file open or mapped, as far as the calling process may see them.
func (b *Binder) users(d *Device) []User {
	var users []User
	if o, ok := d.Owner(); ok {
		users = append(users, User{Owner: o})
	}
	var files []string
	if d.IOMMUGroup != "" {
		files = append(files, filepath.Join(b.Dev, "vfio", d.IOMMUGroup), filepath.Join(b.Dev, "vfio/noiommu-"+d.IOMMUGroup))
	}
	for pattern, dir := range map[string]string{"uio/uio*": "", "vfio-dev/vfio*": "vfio/devices"} {
		found, _ := filepath.Glob(filepath.Join(d.FullPath, pattern))
		for _, f := range found {
			files = append(files, filepath.Join(b.Dev, dir, filepath.Base(f)))
		}
	}
	if len(files) == 0 {
		return users
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range processes {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || slices.ContainsFunc(users, func(u User) bool { return u.PID == pid }) {
			continue
		}
		if file := holds(p, files); file != "" {
			users = append(users, User{Owner: newOwner(pid), File: file})
		}
	}
	return users
}

// holds is the one of the files that a process has open or mapped, or "".
func holds(process string, files []string) string {
	fds, _ := os.ReadDir(process + "/fd")
	for _, fd := range fds {
		if target, _ := os.Readlink(process + "/fd/" + fd.Name()); slices.Contains(files, target) {
			return target
		}
	}
	// A mapping keeps a UIO file open.
	maps, _ := os.ReadFile(process + "/maps")
	for line := range strings.Lines(string(maps)) {
		if i := strings.IndexByte(line, '/'); i >= 0 && slices.Contains(files, strings.TrimSpace(line[i:])) {
			return strings.TrimSpace(line[i:])
		}
	}
	return ""
}
