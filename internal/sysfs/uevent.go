package sysfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/regs"
)

// Event is something that happened to an ivshmem v2 device of this machine.
type Event struct {
	Action  string `json:"action"` // "add", "remove", "bind", "unbind", "change"
	Address string `json:"address"`
	Driver  string `json:"driver"` // the driver concerned, "" if none
}

// Watch reports what the kernel announces of ivshmem v2 devices, until the
// context ends or report returns an error. Ready is called when nothing that
// happens from then on can be missed.
func Watch(ctx context.Context, ready func() error, report func(Event) error) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("open uevent socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uevent")
	defer f.Close()
	// Group 1 is the kernel's own announcements.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("listen to uevents: %w", err)
	}
	defer context.AfterFunc(ctx, func() { f.Close() })()
	if err := ready(); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS):
			return errors.New("the kernel announced more than could be read: start again")
		case err != nil:
			return fmt.Errorf("read uevents: %w", err)
		}
		if e, ok := parseUevent(buf[:n]); ok {
			if err := report(e); err != nil {
				return err
			}
		}
	}
}

// parseUevent reads an announcement: strings KEY=value, each ended by a zero
// byte, behind one of another form. It is not ok for other devices.
func parseUevent(b []byte) (e Event, ok bool) {
	pci, id := false, false
	for field := range bytes.SplitSeq(b, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		switch key {
		case "SUBSYSTEM":
			pci = value == "pci"
		case "PCI_ID":
			id = strings.EqualFold(value, fmt.Sprintf("%04X:%04X", regs.VendorID, regs.DeviceID))
		case "ACTION":
			e.Action = value
		case "PCI_SLOT_NAME":
			e.Address = value
		case "DRIVER":
			e.Driver = value
		}
	}
	return e, pci && id && e.Action != "" && e.Address != ""
}
