package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Requests of ioctl(2) to a device (linux/nbd.h). The kernel's other interface,
// generic netlink, leaves the device behind when its server is killed.
const (
	setSocket     = 0xab00
	setBlockSize  = 0xab01
	doIt          = 0xab03 // returns when the device has ended
	clearSocket   = 0xab04
	setSizeBlocks = 0xab07
	disconnect    = 0xab08
	setFlags      = 0xab0a
)

// Attach has the kernel show a disk as a device: that of a path such as
// /dev/nbd0, or the first free one where the path is empty. It tells ready of
// its path, and returns when the context ends, after all that is to be written
// has been, or when somebody disconnects the device.
func Attach(ctx context.Context, path string, d Disk, ready func(path string)) error {
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer ours.Close()
	defer unix.Close(theirs)
	k := &kernel{disk: d, socket: theirs, claimed: make(chan error, 1), ended: make(chan error, 1)}
	go k.run(path)
	if err := <-k.claimed; err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() {
		served <- serve(context.Background(), ours, d)
		ours.Close() // the device ends
	}()
	if err := k.await(); err == nil {
		ready(k.path)
		select {
		case <-ctx.Done():
			k.detach()
		case err := <-k.ended:
			k.ended <- err
		}
	}
	err = <-k.ended
	ours.Close()
	if e := <-served; e != nil && !errors.Is(e, net.ErrClosed) {
		err = e
	}
	if err != nil {
		return fmt.Errorf("%s: %w", k.path, err)
	}
	return nil
}

// socketPair is a connection of which the kernel gets one end.
func socketPair() (ours net.Conn, theirs int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, err
	}
	f := os.NewFile(uintptr(fds[0]), "nbd")
	defer f.Close()
	if ours, err = net.FileConn(f); err != nil {
		unix.Close(fds[1])
		return nil, -1, err
	}
	return ours, fds[1], nil
}

// kernel is a device of the kernel.
type kernel struct {
	disk    Disk
	socket  int
	claimed chan error // once: whether there is a device
	ended   chan error // once

	// Set when there is.
	path string
	fd   int
}

// run is the device's life, in one thread: a signal would end it.
func (k *kernel) run(path string) {
	runtime.LockOSThread() // for ever: the thread ends with the goroutine
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, nil); err != nil {
		k.claimed <- err
		return
	}
	if err := k.claim(path); err != nil {
		k.claimed <- err
		return
	}
	defer unix.Close(k.fd)
	k.claimed <- nil
	err := k.set()
	if err == nil {
		err = k.ioctl(doIt, 0)
	}
	k.ioctl(clearSocket, 0)
	k.ended <- err
}

func (k *kernel) ioctl(request uint, v int) error {
	if err := unix.IoctlSetInt(k.fd, request, v); err != nil {
		return fmt.Errorf("ioctl %#x: %w", request, err)
	}
	return nil
}

// claim takes a device.
func (k *kernel) claim(path string) error {
	paths := []string{path}
	if path == "" {
		var err error
		if paths, err = filepath.Glob("/dev/nbd*"); err != nil {
			return err
		}
		if len(paths) == 0 {
			return errors.New("found no /dev/nbd0: load the kernel's module (modprobe nbd), or serve a socket")
		}
	}
	for _, p := range paths {
		if path == "" && strings.Contains(filepath.Base(p)[len("nbd"):], "p") {
			continue // a partition
		}
		err := k.try(p)
		if path == "" && errors.Is(err, unix.EBUSY) {
			continue
		}
		return err
	}
	return fmt.Errorf("%s to %s: %w: all of them are in use", paths[0], paths[len(paths)-1], unix.EBUSY)
}

func (k *kernel) try(path string) (err error) {
	k.path = path
	k.fd, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%s: %w: load the kernel's module (modprobe nbd), or serve a socket", path, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w: run as root, or serve a socket", path, err)
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	}
	if err = k.ioctl(setSocket, k.socket); err == nil {
		return nil
	}
	unix.Close(k.fd)
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EINVAL):
		// In use by another process, or by way of netlink.
		return fmt.Errorf("%s: %w: the device is in use", path, unix.EBUSY)
	case errors.Is(err, unix.ENOTTY):
		return fmt.Errorf("%s: expected a device of NBD", path)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w: run as root, or serve a socket", path, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// set says what the disk is.
func (k *kernel) set() error {
	for _, s := range []struct {
		request uint
		v       int
	}{{setBlockSize, sector}, {setSizeBlocks, int(k.disk.Size() / sector)}, {setFlags, int(flags(k.disk))}} {
		if err := k.ioctl(s.request, s.v); err != nil {
			return err
		}
	}
	return nil
}

// await waits until the device is there, or has ended.
func (k *kernel) await() error {
	for {
		if _, err := os.Stat(filepath.Join("/sys/block", filepath.Base(k.path), "pid")); err == nil {
			break
		}
		select {
		case err := <-k.ended:
			k.ended <- err
			return err
		case <-time.After(time.Millisecond):
		}
	}
	// The kernel looks for partitions when it is opened.
	f, err := os.Open(k.path)
	if err == nil {
		f.Close()
	}
	return err
}

// detach ends the device. File systems that are still mounted on it write what
// they have before.
func (k *kernel) detach() {
	unix.Sync()
	if fd, err := unix.Open(k.path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.IoctlSetInt(fd, disconnect, 0)
		unix.Close(fd)
	}
}
