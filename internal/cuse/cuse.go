// Package cuse makes a character device in /dev for a console port, through the
// kernel's CUSE (character devices in user space, /dev/cuse; Linux 3.9 or newer,
// module cuse). It needs root, and a /dev that the kernel fills (devtmpfs).
//
// What a program gets is what the original proposal of ports promised it:
//
//   - One at a time has the file open; others get EBUSY. The port's own end is
//     open while the file is.
//   - read waits for data, or says EAGAIN with O_NONBLOCK. It gives 0 when the
//     other side is closed and all is read. A signal ends it with EINTR.
//   - write waits for room until all is taken, or says EAGAIN with O_NONBLOCK.
//     ENOSPC says that the other side has throttled the port: on the original
//     wire always, on the others with O_NONBLOCK. A write that was taken in part
//     says how much that was. Writes are taken one after the other.
//   - poll, select and epoll say IN, OUT and HUP as [console.Port.Ready] does.
//   - FIONREAD is the number of unread bytes, and TIOCGWINSZ the size of the
//     window of a console.
//   - When the port is removed the node disappears at once. A file that is still
//     open then says ENODEV, and HUP to poll.
//   - When the service ends, or is killed, the node disappears and open files
//     fail with an error.
//
// CUSE has no fasync, fsync and mmap, so there is no SIGIO, and no SIGWINCH; lseek
// does nothing. The messages are those of the kernel's linux/fuse.h.
package cuse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// Config is what a character device is made of.
type Config struct {
	// Name is the node's in /dev: 1 to 200 letters, digits and any of "._+@:-",
	// not with "." at the beginning. There may be folders before it, as in
	// "virtio-ports/log".
	Name string
	Port *console.Port
	// Ready, unless it is nil, is called when the node is there. Nobody is
	// answered before it returns.
	Ready func()
	// Gone, unless it is nil, is called when the port was removed and with it the
	// node. A program may still have the file open.
	Gone func()
	// Left, unless it is nil, is called when a program has closed the file, and
	// the port is closed. It must not wait.
	Left func()
}

// Serve makes the node and serves it until ctx ends, or the port is removed and
// the file closed; it then returns nil. A name that is taken is an error that
// wraps [fs.ErrExist]. A removed port's name is taken as long as somebody keeps
// its file open.
func Serve(ctx context.Context, c Config) error {
	if err := checkName(c.Name); err != nil {
		return err
	}
	node := filepath.Join("/dev", c.Name)
	// The kernel would make the device without a node, or fail without a reason.
	for _, taken := range []string{node, filepath.Join("/sys/class/cuse", strings.ReplaceAll(c.Name, "/", "!"))} {
		if _, err := os.Lstat(taken); err == nil {
			return fmt.Errorf("character device %s: %s is there already: %w", c.Name, taken, fs.ErrExist)
		}
	}
	kernel, err := os.OpenFile("/dev/cuse", os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("character devices need the kernel's CUSE: load the module cuse (modprobe cuse): %w", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("character devices need root: %w", err)
	case err != nil:
		return err
	}
	defer kernel.Close()
	d := newDevice(kernel, c.Port, node)
	if c.Gone != nil {
		d.gone = c.Gone
	}
	if c.Left != nil {
		d.left = c.Left
	}
	if err := d.init(c.Name); err != nil {
		return err
	}
	// It was made, or not, within the write of the answer.
	if st, err := os.Lstat(node); err != nil || st.Mode()&fs.ModeCharDevice == 0 {
		return fmt.Errorf("the kernel made no character device %s: expected a devtmpfs at /dev; the kernel's log may say more", node)
	}
	if c.Ready != nil {
		c.Ready()
	}
	return d.run(ctx)
}

func checkName(name string) error {
	bad := len(name) > 200
	for part := range strings.SplitSeq(name, "/") {
		bad = bad || part == "" || part[0] == '.' || strings.ContainsFunc(part, func(r rune) bool {
			return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && !strings.ContainsRune("._+@:-", r)
		})
	}
	if bad {
		return fmt.Errorf("name of a character device: expected up to 200 letters, digits and any of \"._+@:-\", found %.250q", name)
	}
	return nil
}
