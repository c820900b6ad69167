package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
)

// disk is a virtio disk of this host in a guest, which has a file system on it
// and writes files.
type disk struct {
	ctx     context.Context
	r       *Report
	service *vm.Service
	image   string
	bin     string // folder of the host's commands
	device  *checks.Process
	guest   *vm.Guest
	attach  *checks.Process
	writer  *checks.Process

	started int // files that were begun
	// files is what has to be there: those that the writer said it has
	// flushed, and their checksums.
	files          map[string]string
	rows           [][]string
	kills, flushed int
}

const diskSize = 64 << 20

// Kinds of death.
const (
	killDevice = "device side" // the process: the image keeps what was written
	killGuest  = "guest"
	killPower  = "power" // the device side's cache and the guest
)

// blockDisk makes a file system in a guest on a disk of the host, and kills either,
// or both and what the disk has not flushed, at random moments between and in
// flushes. What was flushed has to be there, in a file system without errors.
func blockDisk(ctx context.Context, r *Report) error {
	d, err := startDisk(ctx, r)
	if err != nil {
		return err
	}
	defer d.close()
	begin := time.Now()
	err = d.rounds()
	r.Tables = []Table{{Title: "A file system over virtio block and NBD, in a guest under emulation; its device side and the guest are killed",
		Head: []string{"killed", "after", "what has to be there", "s"}, Rows: d.rows}}
	if err != nil {
		for _, p := range []*checks.Process{d.device, d.attach} {
			if p != nil && p.Stderr() != "" {
				err = fmt.Errorf("%w\n%s", err, p.Stderr())
			}
		}
		return err
	}
	r.atLeast("kills", float64(d.kills), 2)
	r.atLeast("files flushed and found", float64(d.flushed), float64(5*d.kills))
	for _, name := range []string{"fio_reads_per_s", "fio_writes_per_s"} {
		if all := r.Samples[name]; len(all) > 0 {
			r.info(strings.ReplaceAll(name, "_", " ")+", at best", slices.Max(all))
		}
	}
	r.info("seconds in all", time.Since(begin).Seconds())
	return nil
}

func startDisk(ctx context.Context, r *Report) (*disk, error) {
	ivshctl, err := vm.HostBinary(ctx, "ivshctl")
	if err != nil {
		return nil, err
	}
	service, err := vm.Serve(ctx, nil, "--protocol", "0x8002", "--peers", "2", "--vectors", "2", "--rw", "8M", "--output", "0", "--socket-per-peer", "--quiet")
	if err != nil {
		return nil, err
	}
	d := &disk{ctx: ctx, r: r, service: service, bin: filepath.Dir(ivshctl), files: map[string]string{}}
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err == nil {
		d.image = filepath.Join(dir, "image")
		if err = os.WriteFile(d.image, nil, 0o600); err == nil {
			err = os.Truncate(d.image, diskSize)
		}
	}
	if err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (d *disk) close() {
	if d.guest != nil {
		d.guest.Close()
	}
	if d.device != nil {
		d.device.Kill()
	}
	d.service.Close()
	os.RemoveAll(filepath.Dir(d.image))
}

// serve starts the device side; volatile, with a cache that dies with it.
func (d *disk) serve(volatile bool) (err error) {
	argv := []string{"ivshctl", "block", "--image", d.image, "--serial", "campaign", "--device", d.service.Socket + ".0"}
	if volatile {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		argv = []string{self, volatileDisk, d.image, d.service.Socket + ".0", fmt.Sprint(d.r.rand.Uint64()), fmt.Sprint(d.r.Sabotage)}
	}
	if d.device, err = checks.Start(checks.Host(d.bin), argv...); err != nil {
		return err
	}
	_, err = d.device.Line(d.ctx)
	return err
}

// swap ends the device side in an orderly way, and starts another one.
func (d *disk) swap(volatile bool) error {
	if err := d.device.Signal(syscall.SIGINT); err != nil {
		return err
	}
	if err := d.device.End(d.ctx, 0); err != nil {
		return err
	}
	return d.serve(volatile)
}

// boot boots a guest and attaches the disk.
func (d *disk) boot() (err error) {
	d.guest, err = vm.Start(d.ctx, vm.Config{
		Name: "guest", Driver: "vfio-pci", Devices: []vm.Device{{Socket: d.service.Socket + ".1"}},
		Packages: []string{"e2fsprogs", "fio"}, Modules: []string{"nbd"}, Progress: func(s string) { d.r.say("%s", s) },
	})
	if err != nil {
		return err
	}
	return d.startAttach()
}

func (d *disk) startAttach() (err error) {
	if d.attach, err = checks.Start(checks.Guest(d.guest), "ivshctl", "block", "attach", "--nbd", "/dev/nbd0"); err != nil {
		return err
	}
	line, err := d.attach.Line(d.ctx)
	if err == nil && line != "ready /dev/nbd0" {
		err = fmt.Errorf("block attach: %q", line)
	}
	return err
}

func (d *disk) sh(script string) (string, error) { return guestShell(d.ctx, d.guest, script) }

// rounds kills.
func (d *disk) rounds() error {
	d.r.say("booting a guest")
	if err := errors.Join(d.serve(false), d.boot()); err != nil {
		return err
	}
	if _, err := d.sh("mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0; mount /dev/nbd0 /mnt"); err != nil {
		return err
	}
	kinds := []string{killDevice, killPower}
	if d.r.Sabotage {
		kinds = []string{killPower}
	}
	d.r.Config["image_mib"] = diskSize >> 20
	for end, i := time.Now().Add(d.r.Duration), 0; i < len(kinds) || time.Now().Before(end); i++ {
		if i == len(kinds) {
			kinds = append(kinds, []string{killDevice, killDevice, killGuest, killPower}[d.r.rand.IntN(4)])
		}
		begin := time.Now()
		d.r.say("round %d: %s", i, kinds[i])
		found, err := d.round(kinds[i])
		if err != nil {
			return fmt.Errorf("round %d, %s: %w", i, kinds[i], err)
		}
		d.rows = append(d.rows, append(found, fmt.Sprintf("%.1f", time.Since(begin).Seconds())))
	}
	return d.finish()
}

// round lets the guest write, kills, and looks at what is there.
func (d *disk) round(kind string) ([]string, error) {
	if kind == killPower {
		if err := d.swap(true); err != nil {
			return nil, err
		}
	}
	if err := d.write(); err != nil {
		return nil, err
	}
	var load *checks.Process
	if kind == killDevice {
		var err error
		if load, err = checks.Start(checks.Guest(d.guest), d.fio()...); err != nil {
			return nil, err
		}
	}
	n := 5 + d.r.rand.IntN(20)
	if err := d.progress(n); err != nil {
		return nil, err
	}
	if err := d.noErrors(); err != nil {
		return nil, err
	}
	time.Sleep(time.Duration(d.r.rand.IntN(50)) * time.Millisecond) // to any moment between two flushes
	d.kills++
	var found string
	var err error
	if kind == killDevice {
		d.device.Kill()
		found, err = d.goOn(load)
	} else {
		if kind == killPower {
			d.device.Kill()
		}
		d.guest.Kill()
		found, err = d.again(kind)
	}
	return []string{kind, fmt.Sprintf("%d files", n), found}, err
}

// goOn starts the device side again: the guest has to go on as if nothing had
// happened.
func (d *disk) goOn(load *checks.Process) (string, error) {
	if err := d.serve(false); err != nil {
		return "", err
	}
	if err := d.progress(5); err != nil {
		return "", err
	}
	if err := d.stop(); err != nil {
		return "", err
	}
	speed, err := d.loaded(load)
	if err != nil {
		return "", err
	}
	if err := d.noErrors(); err != nil {
		return "", err
	}
	// What the writer was killed in the middle of ends by itself.
	if _, err := d.sh("until umount /mnt; do sleep 0.1; done; e2fsck -fn /dev/nbd0; mount /dev/nbd0 /mnt"); err != nil {
		return "", err
	}
	found, err := d.check()
	return found + "; " + speed, err
}

// again boots another guest, and the device side if that died with it.
func (d *disk) again(kind string) (string, error) {
	d.rest()
	d.guest.Close()
	if kind == killPower {
		if err := d.serve(false); err != nil {
			return "", err
		}
	}
	if err := d.boot(); err != nil {
		return "", err
	}
	// The kernel replays the journal; then there must be nothing to repair.
	if _, err := d.sh("mount /dev/nbd0 /mnt; umount /mnt; e2fsck -fn /dev/nbd0; mount /dev/nbd0 /mnt"); err != nil {
		return "", err
	}
	return d.check()
}

// noErrors says what the guest's kernel does not like.
func (d *disk) noErrors() error {
	out, err := d.sh("dmesg | grep -i -e 'I/O error' -e 'EXT4-fs.*error' || :")
	if err == nil && out != "" {
		err = fmt.Errorf("the guest's kernel saw errors: %s", out)
	}
	return err
}

// finish ends the device in several ways, and leaves nothing behind.
func (d *disk) finish() error {
	// Interrupted with a file system on it, it writes what is to be written.
	sum, err := d.sh("head -c 300000 /dev/urandom >/mnt/last; sha256sum </mnt/last")
	if err != nil {
		return err
	}
	if err := d.detach(syscall.SIGINT); err != nil {
		return err
	}
	if err := d.reattach("umount /mnt"); err != nil {
		return err
	}
	if after, err := d.sh("mount /dev/nbd0 /mnt; sha256sum </mnt/last; umount /mnt; e2fsck -fn /dev/nbd0 >/dev/null"); err != nil || after != sum {
		return fmt.Errorf("after an interrupt: %w: a file is %s, expected %s", err, after, sum)
	}
	// Killed, it is gone from the kernel as well.
	if err := d.detach(syscall.SIGKILL); err != nil {
		return err
	}
	if err := d.reattach(""); err != nil {
		return err
	}
	if err := d.detach(syscall.SIGINT); err != nil {
		return err
	}
	if out, err := d.sh("cat /sys/block/nbd0/size; ls /sys/block/nbd0/pid 2>/dev/null || :"); err != nil || out != "0" {
		return fmt.Errorf("the device outlived its command: %w: %s", err, out)
	}
	return nil
}

// detach ends the driver side.
func (d *disk) detach(sig syscall.Signal) error {
	want := 0
	if sig == syscall.SIGKILL {
		want = 128 + int(sig)
	}
	if err := d.attach.Signal(sig); err != nil {
		return err
	}
	return d.attach.End(d.ctx, want)
}

// reattach starts it again, on the same device, after a script.
func (d *disk) reattach(script string) error {
	if _, err := d.sh(script); err != nil {
		return err
	}
	return d.startAttach()
}
