package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
)

// Module builds the kernel module whose sources and Makefile are in the
// folder source, for the kernel that Kernel returns for the same suite and
// architecture, and returns the path of the .ko file. Compiler, make and
// kernel headers are Debian's own for that kernel, unpacked into the cache; for
// another architecture than this machine's it is a cross compiler. args are
// added to make's command line. A module is built again when its sources or
// args change.
func (c *Cache) Module(ctx context.Context, suite, arch, source string, args ...string) (string, error) {
	if suite == Small {
		return "", errors.New("no module can be built for the small kernel, of which no headers are kept: use one of Debian's")
	}
	kernel, err := c.Kernel(ctx, suite, arch)
	if err != nil {
		return "", err
	}
	sum, err := sourceSum(source, args)
	if err != nil {
		return "", err
	}
	headers, bin, err := c.toolchain(ctx, suite, arch, kernel.Release)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(c.Dir, "module-"+kernel.Release+"-"+sum)
	if exists(dir) {
		return findModule(dir)
	}
	unlock, err := c.lock(ctx, "lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(dir) { // another process was faster
		return findModule(dir)
	}
	c.say("building the module in %s for kernel %s (once)", source, kernel.Release)
	tmp, err := os.MkdirTemp(c.Dir, "tmp-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.CopyFS(filepath.Join(tmp, "src"), os.DirFS(source)); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "make"), append([]string{
		"-C", headers, "M=" + filepath.Join(tmp, "src"), "modules"}, args...)...)
	cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "LC_ALL=C", "HOME=" + tmp}
	if text, err := runChild(cmd); err != nil {
		return "", fmt.Errorf("build the module in %s for kernel %s: %w\n%s", source, kernel.Release, err, text)
	}
	ko, err := findModule(filepath.Join(tmp, "src"))
	if err != nil {
		return "", err
	}
	done := filepath.Join(tmp, "done")
	if err := os.Mkdir(done, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(ko, filepath.Join(done, filepath.Base(ko))); err != nil {
		return "", err
	}
	if err := os.Rename(done, dir); err != nil {
		return "", err
	}
	return findModule(dir)
}

// sourceSum identifies the files of a folder and the arguments.
func sourceSum(source string, args []string) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", args)
	err := filepath.WalkDir(source, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		fmt.Fprintf(h, "%q %x\n", strings.TrimPrefix(p, source), sha256.Sum256(b))
		return err
	})
	return hex.EncodeToString(h.Sum(nil)[:6]), err
}

func findModule(dir string) (string, error) {
	m, _ := filepath.Glob(filepath.Join(dir, "*.ko"))
	if len(m) != 1 {
		return "", fmt.Errorf("%s: expected one module (.ko), found %d", dir, len(m))
	}
	return m[0], nil
}

// toolchain returns the folder of the headers of a kernel release, and the
// folder of the programs that build modules for it on this machine.
func (c *Cache) toolchain(ctx context.Context, suite, arch, release string) (headers, bin string, err error) {
	key := "headers-" + release
	final := filepath.Join(c.Dir, key)
	pkg := "linux-headers-" + release
	tools := request{
		what: "a compiler for kernel modules", suite: baseSuite(suite), release: suite, arch: runtime.GOARCH,
		packages: []string{"binutils", "make"},
		keep:     regexp.MustCompile(`^(lib|zlib1g|gcc|cpp|binutils|linux-headers|linux-kbuild|make$|pahole)`).MatchString,
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\nif the archive has only a newer kernel, remove the kernel's folder from %s", err, c.Dir)
		}
	}()
	if arch == runtime.GOARCH {
		// The headers depend on everything else.
		tools.key, tools.packages = key, append(tools.packages, pkg)
		tools.finish = func(root string) error {
			return errors.Join(relocateHeaders(root, final), relocatePrograms(root, final))
		}
		dir, err := c.folder(ctx, tools)
		return filepath.Join(dir, "usr/src", pkg), filepath.Join(dir, "usr/bin"), err
	}

	// The headers are for the kernel, the programs for this machine.
	version := release[:max(0, strings.Index(release, "-cloud"))]
	common, kbuild := "linux-headers-"+version+"-common", "linux-kbuild-"+version
	tools.key = "tools-" + release
	toolsFinal := filepath.Join(c.Dir, tools.key)
	dir, err := c.folder(ctx, request{
		key: key, what: "kernel headers", suite: tools.suite, release: suite, arch: arch,
		packages: []string{pkg}, keep: func(name string) bool { return name == pkg },
		finish: func(root string) error {
			return errors.Join(relocateHeaders(root, final), os.MkdirAll(filepath.Join(root, "usr/lib"), 0o755),
				os.Symlink(filepath.Join(toolsFinal, "usr/src", common), filepath.Join(root, "usr/src", common)),
				os.Symlink(filepath.Join(toolsFinal, "usr/lib", kbuild), filepath.Join(root, "usr/lib", kbuild)))
		},
	})
	if err != nil {
		return "", "", err
	}
	headers = filepath.Join(dir, "usr/src", pkg)
	variables, err := os.ReadFile(filepath.Join(headers, ".kernelvariables"))
	if err != nil {
		return "", "", err
	}
	gcc := regexp.MustCompile(`gcc-[0-9]+`).Find(variables)
	triplet := regexp.MustCompile(`CROSS_COMPILE = (\S+-linux-gnu)-`).FindSubmatch(variables)
	if gcc == nil || triplet == nil {
		return "", "", fmt.Errorf("%s: no compiler named in .kernelvariables", headers)
	}
	tools.packages = append(tools.packages, string(gcc)+"-"+string(triplet[1]), common, kbuild)
	tools.finish = func(root string) error { return relocatePrograms(root, toolsFinal) }
	dir, err = c.folder(ctx, tools)
	return headers, filepath.Join(dir, "usr/bin"), err
}

// relocateHeaders replaces the place where the headers expect to be installed
// in their Makefiles.
func relocateHeaders(root, final string) error {
	files, err := filepath.Glob(filepath.Join(root, "usr/src/linux-headers-*/Makefile"))
	if err != nil {
		return err
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if len(text) > 1000 { // the kernel's own
			continue
		}
		text = bytes.ReplaceAll(text, []byte("/usr/src/"), []byte(final+"/usr/src/"))
		if err := os.WriteFile(f, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// relocatePrograms puts a script in the place of each program, which runs it
// with the C library that it was built for: the machine's may be an older one.
func relocatePrograms(root, final string) error {
	loaders, _ := filepath.Glob(filepath.Join(root, "*/ld-linux-*.so.*"))
	more, _ := filepath.Glob(filepath.Join(root, "usr/lib*/ld-linux-*.so.*"))
	if loaders = append(loaders, more...); len(loaders) == 0 {
		return errors.New("the packages contain no dynamic loader where it is expected")
	}
	place := func(p string) string { return final + strings.TrimPrefix(p, root) }
	var libraries []string
	for _, pattern := range []string{"lib/*-linux-gnu", "usr/lib/*-linux-gnu"} {
		found, _ := filepath.Glob(filepath.Join(root, pattern))
		for _, d := range found {
			libraries = append(libraries, place(d))
		}
	}
	return filepath.WalkDir(filepath.Join(root, "usr"), func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.Contains(d.Name(), ".so") || !hasInterpreter(p) {
			return err
		}
		script := fmt.Sprintf("#!/bin/sh\nexec '%s' --inhibit-cache --library-path '%s' --argv0 \"$0\" '%s' \"$@\"\n",
			place(loaders[0]), strings.Join(libraries, ":"), place(p)+".real")
		if err := os.Rename(p, p+".real"); err != nil {
			return err
		}
		return os.WriteFile(p, []byte(script), 0o755)
	})
}

// hasInterpreter says whether a file is a program that needs a dynamic loader.
func hasInterpreter(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return true
		}
	}
	return false
}

// runChild runs a program that ends with us and returns what it printed.
func runChild(cmd *exec.Cmd) (string, error) {
	runtime.LockOSThread() // the signal is tied to the thread that starts it
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	text, err := cmd.CombinedOutput()
	return string(text), err
}
