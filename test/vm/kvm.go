package vm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"
)

// kvmPatience is how long a guest may take to boot with KVM. One that works
// needs a second; emulation needs no more than this either.
const kvmPatience = 15 * time.Second

var kvmMutex sync.Mutex

// kvmWorks says whether guests can use this machine's KVM. It is found out by
// booting one: a /dev/kvm may exist, open, and run simple code, and still
// fail in the middle of a kernel or be slower than emulation. The answer is
// kept in the cache until the machine boots again.
func kvmWorks(ctx context.Context, cacheDir string) bool {
	if runtime.GOARCH != AMD64 {
		return false
	}
	device, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	device.Close()
	kvmMutex.Lock()
	defer kvmMutex.Unlock()
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false
	}
	file := filepath.Join(cacheDir, "kvm-"+strings.TrimSpace(string(id)))
	if answer, err := os.ReadFile(file); err == nil {
		return string(answer) == "yes"
	}
	works := bootsWithKVM(ctx)
	if ctx.Err() != nil {
		return false // not found out
	}
	answer := "no"
	if works {
		answer = "yes"
	}
	old, _ := filepath.Glob(filepath.Join(cacheDir, "kvm-*"))
	for _, f := range old {
		os.Remove(f)
	}
	_ = os.WriteFile(file, []byte(answer), 0o644) // if it fails, the next run finds out again
	return works
}

func bootsWithKVM(ctx context.Context) bool {
	c := Config{Name: "kvm-probe"}
	img, err := c.prepare(ctx)
	if err != nil {
		return false
	}
	defer img.initrd.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, kvmPatience, errors.New("KVM is too slow"))
	defer cancel()
	g, err := c.start(ctx, img, true)
	if err != nil {
		return false
	}
	g.Close()
	return true
}
