// Package fetch provides what a test guest needs and the machine may lack:
// a QEMU with vfio-user-pci, Debian kernels, and Debian packages. It unpacks
// packages into folders of a cache and installs nothing; no privileges are
// needed. Versions are resolved when a folder is made; remove the folder to
// get newer ones.
package fetch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Releases of Debian that packages are taken from.
const (
	Trixie   = "trixie"
	Bookworm = "bookworm"
	// Backports has newer kernels for Trixie; everything else is Trixie's.
	Backports = "trixie-backports"
	// Small is, where a kernel is meant, one for amd64 that is built from
	// Debian's source with what its own kernels lack: iommufd, the character
	// devices of VFIO, no-IOMMU mode. Everything else is Trixie's.
	Small = "small"
)

// baseSuite returns the suite whose packages go with a kernel.
func baseSuite(suite string) string {
	if suite == Small {
		return Trixie
	}
	return strings.TrimSuffix(suite, "-backports")
}

// PackagesFile lists, in each unpacked folder, the packages in it and their
// versions.
const PackagesFile = ".packages"

// ErrNoVfioUser means that a QEMU has no vfio-user-pci device.
var ErrNoVfioUser = errors.New("QEMU has no vfio-user-pci device (it is in QEMU 10.1 and later)")

// Cache is the folder of unpacked packages.
type Cache struct {
	// Dir is the folder's absolute path.
	Dir string
	// Progress is told about everything that takes more than a moment. It
	// may be nil.
	Progress func(message string)
}

// Open returns the cache in $IVSHMEM_CACHE, by default
// ${XDG_CACHE_HOME:-$HOME/.cache}/ivshmem. The folder is made when needed.
func Open(progress func(message string)) (*Cache, error) {
	dir := os.Getenv("IVSHMEM_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("no place for the cache: set IVSHMEM_CACHE or HOME: %w", err)
		}
		dir = filepath.Join(user, "ivshmem")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	return &Cache{Dir: dir, Progress: progress}, nil
}

func (c *Cache) say(format string, args ...any) {
	if c.Progress != nil {
		c.Progress(fmt.Sprintf(format, args...))
	}
}

// request describes one folder of the cache.
type request struct {
	key      string // name of the folder
	what     string // for messages
	suite    string // Trixie or Bookworm
	release  string // the suite or its backports
	arch     string // Debian's name: amd64, arm64
	packages []string
	keep     func(name string) bool  // which packages of the closure to unpack; nil for all
	finish   func(root string) error // checks or completes the unpacked folder; may be nil
}

// folder returns the folder of r, which it makes if it is not there yet.
func (c *Cache) folder(ctx context.Context, r request) (string, error) {
	dir := filepath.Join(c.Dir, r.key)
	if exists(dir) {
		return dir, nil
	}
	unlock, err := c.lock(ctx, "lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(dir) { // another process was faster
		return dir, nil
	}
	start := time.Now()
	c.say("fetching %s into %s (once)", r.what, dir)
	if err := c.unpack(ctx, r, dir); err != nil {
		return "", fmt.Errorf("fetch %s: %w", r.what, err)
	}
	c.say("fetched %s in %.1f s", r.what, time.Since(start).Seconds())
	return dir, nil
}

func (c *Cache) unpack(ctx context.Context, r request, dir string) error {
	// We hold the lock, so whatever is there was left by a killed run.
	left, _ := filepath.Glob(filepath.Join(c.Dir, "tmp-*"))
	for _, d := range left {
		os.RemoveAll(d)
	}
	tmp, err := os.MkdirTemp(c.Dir, "tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	debs, root := filepath.Join(tmp, "debs"), filepath.Join(tmp, "root")
	if err := errors.Join(os.Mkdir(debs, 0o755), os.Mkdir(root, 0o755)); err != nil {
		return err
	}
	a := apt{filepath.Join(c.Dir, "apt-"+r.suite+"-"+r.arch), r.suite, r.arch}
	fresh := a.stale()
	if fresh {
		if err := a.update(ctx); err != nil {
			return err
		}
	}
	names, err := download(ctx, a, r, debs)
	if err != nil && !fresh && ctx.Err() == nil {
		// An older index may name versions that are no longer there.
		if err = a.update(ctx); err == nil {
			names, err = download(ctx, a, r, debs)
		}
	}
	if err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if _, err := run(ctx, "", "dpkg-deb", "-x", f, root); err != nil {
			return err
		}
	}
	for _, d := range []string{"doc", "man", "locale", "info", "bug", "lintian"} {
		if err := os.RemoveAll(filepath.Join(root, "usr/share", d)); err != nil {
			return err
		}
	}
	if r.finish != nil {
		if err := r.finish(root); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(root, PackagesFile), []byte(strings.Join(names, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	return os.Rename(root, dir)
}

// download puts the packages of r into dir and returns their names with
// versions.
func download(ctx context.Context, a apt, r request, dir string) ([]string, error) {
	all, err := a.closure(ctx, r.release, r.packages)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, p := range all {
		if r.keep == nil || r.keep(p.name) {
			names = append(names, p.name+"="+p.version)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s of %s: nothing to unpack", strings.Join(r.packages, " "), r.release)
	}
	_, err = a.get(ctx, dir, append([]string{"-qq", "-t", r.release, "download"}, names...)...)
	return names, err
}

// lock keeps other processes from making the same thing at the same time, by
// a file of the cache. The kernel releases it when the process ends, however it
// ends.
func (c *Cache) lock(ctx context.Context, name string) (unlock func(), err error) {
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("cache folder (set IVSHMEM_CACHE to choose another): %w", err)
	}
	f, err := os.OpenFile(filepath.Join(c.Dir, name), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cache folder (set IVSHMEM_CACHE to choose another): %w", err)
	}
	for told := false; ; told = true {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !told {
			c.say("waiting for another run that is fetching into %s", c.Dir)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// QEMU returns the command line that starts a QEMU which emulates guests of
// the given architecture and has vfio-user-pci, up to and including its data
// folders. $IVSHMEM_QEMU names one of the machine instead; it is used if it
// has the device, and is an error if not.
func (c *Cache) QEMU(ctx context.Context, arch string) ([]string, error) {
	guest, ok := map[string]struct{ binary, pkg string }{
		"amd64": {"qemu-system-x86_64", "qemu-system-x86"},
		"arm64": {"qemu-system-aarch64", "qemu-system-arm"},
	}[arch]
	if !ok {
		return nil, fmt.Errorf("no QEMU for guests of architecture %q", arch)
	}
	if own := os.Getenv("IVSHMEM_QEMU"); own != "" {
		return []string{own}, probe(ctx, []string{own})
	}
	command := func(root string) []string {
		u := filepath.Join(root, "usr")
		loaders, _ := filepath.Glob(filepath.Join(u, "lib*", "ld-linux-*.so.*"))
		libraries, _ := filepath.Glob(filepath.Join(u, "lib", "*-linux-gnu"))
		if len(loaders) == 0 || len(libraries) == 0 {
			return nil
		}
		return []string{loaders[0], "--inhibit-cache", "--library-path", strings.Join(libraries, ":"),
			"--argv0", guest.binary, filepath.Join(u, "bin", guest.binary),
			"-L", filepath.Join(u, "share/qemu"), "-L", filepath.Join(u, "share/seabios")}
	}
	needed := regexp.MustCompile(`^(lib|zlib1g|qemu-system|seabios)`)
	dir, err := c.folder(ctx, request{
		key: "qemu-" + arch, what: "QEMU", suite: Trixie, release: Trixie + "-backports", arch: runtime.GOARCH,
		packages: []string{guest.pkg}, keep: needed.MatchString,
		finish: func(root string) error { return probe(ctx, command(root)) },
	})
	if err != nil {
		return nil, err
	}
	return command(dir), nil
}

// probe says whether the QEMU behind command has vfio-user-pci.
func probe(ctx context.Context, command []string) error {
	if len(command) == 0 {
		return errors.New("the packages contain no dynamic loader where it is expected")
	}
	args := append(slices.Clone(command[1:]), "-nodefaults", "-no-user-config", "-M", "none", "-device", "vfio-user-pci,help")
	if _, err := run(ctx, "", command[0], args...); err != nil {
		return fmt.Errorf("%w: %w", ErrNoVfioUser, err)
	}
	return nil
}

// Kernel is an unpacked Debian kernel.
type Kernel struct {
	Image   string // the bootable file
	Release string // as uname -r prints it
	Modules string // folder of its modules, with modules.builtin
}

// Kernel returns the cloud kernel of a Debian release for an architecture, or
// the one that is built from source (Small).
func (c *Cache) Kernel(ctx context.Context, suite, arch string) (Kernel, error) {
	if suite == Small {
		return c.smallKernel(ctx, arch)
	}
	needed := regexp.MustCompile(`^linux-(base|image|binary|modules)-[0-9]`)
	dir, err := c.folder(ctx, request{
		key: "kernel-" + suite + "-" + arch, what: "a kernel", suite: baseSuite(suite), release: suite, arch: arch,
		packages: []string{"linux-image-cloud-" + arch}, keep: needed.MatchString,
		finish: func(root string) error { _, err := findKernel(root); return err },
	})
	if err != nil {
		return Kernel{}, err
	}
	return findKernel(dir)
}

func findKernel(root string) (Kernel, error) {
	var k Kernel
	for _, pattern := range []string{"usr/lib/modules/*/kernel", "lib/modules/*/kernel"} {
		if m, _ := filepath.Glob(filepath.Join(root, pattern)); len(m) == 1 {
			k.Modules = filepath.Dir(m[0])
			k.Release = filepath.Base(k.Modules)
		}
	}
	for _, image := range []string{filepath.Join(root, "boot", "vmlinuz-"+k.Release), filepath.Join(k.Modules, "vmlinuz")} {
		if k.Release != "" && exists(image) {
			k.Image = image
			return k, nil
		}
	}
	return k, fmt.Errorf("%s: no kernel image with modules where Debian's packages have them", root)
}

// Busybox returns the path of a static busybox for an architecture.
func (c *Cache) Busybox(ctx context.Context, suite, arch string) (string, error) {
	suite = baseSuite(suite)
	dir, err := c.folder(ctx, request{
		key: "busybox-" + suite + "-" + arch, what: "busybox", suite: suite, release: suite, arch: arch,
		packages: []string{"busybox-static"}, keep: func(name string) bool { return name == "busybox-static" },
	})
	if err != nil {
		return "", err
	}
	for _, p := range []string{"usr/bin/busybox", "bin/busybox"} {
		if p = filepath.Join(dir, p); exists(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: the package has no busybox", dir)
}

// Packages returns a folder into which the named packages of a Debian release
// and everything they depend on (without recommended packages) are unpacked.
// Their installation scripts have not run.
func (c *Cache) Packages(ctx context.Context, suite, arch string, names []string) (string, error) {
	for _, n := range names {
		if !regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`).MatchString(n) {
			return "", fmt.Errorf("%q is not the name of a Debian package", n)
		}
	}
	suite = baseSuite(suite)
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	sum := sha256.Sum256([]byte(strings.Join(names, " ")))
	return c.folder(ctx, request{
		key: "packages-" + suite + "-" + arch + "-" + hex.EncodeToString(sum[:6]), what: strings.Join(names, " "),
		suite: suite, release: suite, arch: arch, packages: names,
	})
}
