package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

const modulePath = "github.com/ivshmem-go/ivshmem"

// sourceRoot returns the folder of the project's go.mod: $IVSHMEM_SOURCE, or
// the first one found from the working directory upwards.
func sourceRoot() (string, error) {
	if dir := os.Getenv("IVSHMEM_SOURCE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if first, _, _ := strings.Cut(string(text), "\n"); err == nil && strings.TrimSpace(first) == "module "+modulePath {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("the project's source is not around the working directory: set IVSHMEM_SOURCE to its folder")
		}
	}
}

// Binaries builds the init program and the project's commands without cgo for
// Linux on arch and returns them by name (init, ivshctl, ...). They are built
// into a folder of the cache, so that nothing is linked again while the
// source stays the same.
func Binaries(ctx context.Context, cacheDir, arch string) (map[string]string, error) {
	root, err := sourceRoot()
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(root))
	dir := filepath.Join(cacheDir, "build-"+arch+"-"+hex.EncodeToString(sum[:6]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return nil, err
	}
	type target struct{ module, pkg string }
	targets := map[string]target{"init": {filepath.Join(root, "test/vm"), "./init"}}
	commands, err := filepath.Glob(filepath.Join(root, "cmd", "*"))
	if err != nil {
		return nil, err
	}
	for _, c := range commands {
		if sources, _ := filepath.Glob(filepath.Join(c, "*.go")); len(sources) > 0 {
			name := filepath.Base(c)
			targets[name] = target{root, "./cmd/" + name}
		}
	}
	out := map[string]string{}
	for name, t := range targets {
		out[name] = filepath.Join(dir, name)
		cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-ldflags=-s -w", "-o", out[name], t.pkg)
		cmd.Dir = t.module
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
		if text, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build %s: %w\n%s", t.pkg, err, text)
		}
	}
	return out, nil
}

// OwnModule is the name of the project's kernel module, and of its driver.
const OwnModule = "uio_ivshmem"

// BuildModule builds the project's kernel module for the kernel of a release,
// if it has not been built yet, and returns the path of the .ko file. A
// warning is an error.
func BuildModule(ctx context.Context, cache *fetch.Cache, release, arch string) (string, error) {
	root, err := sourceRoot()
	if err != nil {
		return "", err
	}
	return cache.Module(ctx, release, arch, filepath.Join(root, "kmod"), "W=1", "KCFLAGS=-Werror")
}
