package fetch

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"
)

//go:embed small.config
var smallConfig string

// smallSource is the Debian package of the small kernel's source.
const smallSource = "linux-source-6.12"

// smallKernel builds a kernel with what Debian's lack (iommufd, VFIO's
// character devices, no-IOMMU mode) and little else, from Debian's source. It
// is for amd64 and has no modules. The compiler is the machine's; what it
// takes besides is unpacked into the cache. It takes some minutes, once.
func (c *Cache) smallKernel(ctx context.Context, arch string) (Kernel, error) {
	if runtime.GOARCH != "amd64" || arch != "amd64" {
		return Kernel{}, fmt.Errorf("the small kernel is built on amd64 for amd64 only, not on %s for %s", runtime.GOARCH, arch)
	}
	sum := sha256.Sum256([]byte(smallSource + smallConfig))
	dir := filepath.Join(c.Dir, "kernel-small-"+hex.EncodeToString(sum[:6]))
	if exists(dir) {
		return findKernel(dir)
	}
	// Minutes: others may fetch in the meantime.
	unlock, err := c.lock(ctx, "lock-small")
	if err != nil {
		return Kernel{}, err
	}
	defer unlock()
	if exists(dir) { // another process was faster
		return findKernel(dir)
	}
	compiler, err := exec.LookPath("gcc")
	if err != nil {
		return Kernel{}, fmt.Errorf("the small kernel is built with the machine's C compiler: install gcc and libc6-dev: %w", err)
	}
	b := smallBuild{compiler: compiler}
	if b.tools, err = c.folder(ctx, request{
		key: "tools-small", what: "programs to build a kernel with", suite: Trixie, release: Trixie, arch: arch,
		packages: []string{"bc", "bison", "flex", "make", "xz-utils"},
		keep:     regexp.MustCompile(`^(lib|zlib1g$|bc$|bison$|flex$|m4$|make$|xz-utils$)`).MatchString,
		finish:   func(root string) error { return relocatePrograms(root, filepath.Join(c.Dir, "tools-small")) },
	}); err != nil {
		return Kernel{}, err
	}
	// An older one, which links with an older C library, too.
	if b.libelf, err = c.folder(ctx, request{
		key: "libelf", what: "libelf", suite: Bookworm, release: Bookworm, arch: arch,
		packages: []string{"libelf-dev", "zlib1g-dev"},
		keep:     regexp.MustCompile(`^(libelf|zlib1g)-dev$`).MatchString,
	}); err != nil {
		return Kernel{}, err
	}
	source, err := c.folder(ctx, request{
		key: smallSource, what: "a kernel's source", suite: Trixie, release: Trixie, arch: arch,
		packages: []string{smallSource}, keep: func(name string) bool { return name == smallSource },
	})
	if err != nil {
		return Kernel{}, err
	}
	start := time.Now()
	c.say("building a small kernel (once, for some minutes)")
	b.dir = filepath.Join(c.Dir, "build-small")
	if err := os.RemoveAll(b.dir); err != nil { // of a killed run
		return Kernel{}, err
	}
	defer os.RemoveAll(b.dir)
	if err := b.run(ctx, filepath.Join(source, "usr/src", smallSource+".tar.xz")); err != nil {
		return Kernel{}, fmt.Errorf("build the small kernel: %w", err)
	}
	if err := os.Rename(filepath.Join(b.dir, "done"), dir); err != nil {
		return Kernel{}, err
	}
	c.say("built the small kernel in %.0f s", time.Since(start).Seconds())
	_ = os.RemoveAll(source) // large, and of no more use
	return findKernel(dir)
}

type smallBuild struct {
	dir           string
	compiler      string
	tools, libelf string // unpacked packages
}

func (b *smallBuild) run(ctx context.Context, archive string) error {
	tree, done := filepath.Join(b.dir, "tree"), filepath.Join(b.dir, "done")
	if err := errors.Join(os.MkdirAll(tree, 0o755), os.MkdirAll(done, 0o755)); err != nil {
		return err
	}
	if err := b.command(ctx, "tar", "-C", tree, "--strip-components=1", "-xf", archive); err != nil {
		return err
	}
	fragment := filepath.Join(b.dir, "small.config")
	if err := os.WriteFile(fragment, []byte(smallConfig), 0o644); err != nil {
		return err
	}
	if err := b.make(ctx, tree, "KCONFIG_ALLCONFIG="+fragment, "allnoconfig"); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(tree, ".config"))
	if err != nil {
		return err
	}
	if missing := notConfigured(smallConfig, string(config)); len(missing) > 0 {
		return fmt.Errorf("the source does not allow %s as small.config has it: something that it depends on is missing", strings.Join(missing, ", "))
	}
	if err := b.make(ctx, tree, fmt.Sprintf("-j%d", runtime.NumCPU()), "bzImage"); err != nil {
		return err
	}
	release, err := os.ReadFile(filepath.Join(tree, "include/config/kernel.release"))
	if err != nil {
		return err
	}
	// Where findKernel looks.
	modules := filepath.Join(done, "lib/modules", strings.TrimSpace(string(release)))
	return errors.Join(
		os.MkdirAll(filepath.Join(modules, "kernel"), 0o755),
		os.Rename(filepath.Join(tree, "modules.builtin"), filepath.Join(modules, "modules.builtin")),
		os.Rename(filepath.Join(tree, "arch/x86/boot/bzImage"), filepath.Join(modules, "vmlinuz")),
		os.Rename(filepath.Join(tree, ".config"), filepath.Join(done, "config")),
	)
}

// make runs the kernel's make. Its programs for the host are linked with
// libelf, which the machine need not have.
func (b *smallBuild) make(ctx context.Context, tree string, args ...string) error {
	libraries := filepath.Join(b.libelf, "usr/lib/x86_64-linux-gnu")
	return b.command(ctx, "make", append([]string{
		"-C", tree, "ARCH=x86_64", "CC=" + b.compiler, "HOSTCC=" + b.compiler,
		"LIBELF_FLAGS=-I" + filepath.Join(b.libelf, "usr/include"),
		"LIBELF_LIBS=" + filepath.Join(libraries, "libelf.a") + " " + filepath.Join(libraries, "libz.a"),
	}, args...)...)
}

func (b *smallBuild) command(ctx context.Context, name string, args ...string) error {
	bin := filepath.Join(b.tools, "usr/bin")
	program := filepath.Join(bin, name)
	if !exists(program) {
		program = name
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = []string{
		"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + b.dir, "LC_ALL=C",
		// Both look for m4, and bison for its skeletons, where they were to be
		// installed.
		"M4=" + filepath.Join(bin, "m4"), "BISON_PKGDATADIR=" + filepath.Join(b.tools, "usr/share/bison"),
		"KBUILD_BUILD_USER=ivshmem", "KBUILD_BUILD_HOST=ivshmem",
	}
	text, err := runChild(cmd)
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, text[max(0, len(text)-4000):])
	}
	return nil
}

// notConfigured lists the lines of a fragment that a configuration does not
// follow.
func notConfigured(fragment, config string) (missing []string) {
	has := map[string]bool{}
	for line := range strings.Lines(config) {
		has[strings.TrimSpace(line)] = true
	}
	for line := range strings.Lines(fragment) {
		line = strings.TrimSpace(line)
		off, isOff := strings.CutSuffix(line, " is not set")
		switch {
		case isOff && has[strings.TrimPrefix(off, "# ")+"=y"]: // an absent option is not set, too
			missing = append(missing, line)
		case strings.HasPrefix(line, "CONFIG_") && !has[line]:
			missing = append(missing, line)
		}
	}
	return missing
}
