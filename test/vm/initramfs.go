package vm

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

// archive is an initramfs in the making: records by path, later ones replace
// earlier ones.
type archive map[string]cpio.Record

// add puts a record in, with the folders above it. As in today's Debian,
// /bin, /sbin and /lib* are links to their namesakes in /usr.
func (a archive) add(name string, make func(name string) cpio.Record) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	first, _, _ := strings.Cut(name, "/")
	switch first {
	case "bin", "sbin", "lib", "lib64":
		name = "usr/" + name
	}
	if name == "" {
		return
	}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if r, ok := a[dir]; !ok || r.Mode&cpio.S_IFMT != cpio.S_IFDIR {
			a[dir] = cpio.Directory(dir, 0o755)
		}
	}
	a[name] = make(name)
}

func (a archive) dir(name string, mode uint64) {
	a.add(name, func(n string) cpio.Record { return cpio.Directory(n, mode) })
}

func (a archive) link(name, target string) {
	a.add(name, func(n string) cpio.Record { return cpio.Symlink(n, target) })
}

func (a archive) data(name string, content []byte, mode uint64) {
	a.add(name, func(n string) cpio.Record { return cpio.StaticFile(n, string(content), mode) })
}

// file copies a file of the host.
func (a archive) file(name, from string) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	a.data(name, b, uint64(st.Mode().Perm()))
	return nil
}

// tree copies a folder of unpacked packages.
func (a archive) tree(root string) error {
	return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, p)
		if err != nil || name == "." || name == fetch.PackagesFile {
			return err
		}
		switch d.Type() {
		case fs.ModeDir:
			return nil // made for the files in it
		case fs.ModeSymlink:
			target, err := os.Readlink(p)
			a.link(name, target)
			return err
		case 0:
			return a.file(name, p)
		}
		return nil
	})
}

// bytes returns the archive in newc form.
func (a archive) bytes() ([]byte, error) {
	for _, n := range []string{"bin", "sbin", "lib", "lib64"} {
		a[n] = cpio.Symlink(n, "usr/"+n)
		if _, ok := a["usr/"+n]; !ok {
			a["usr/"+n] = cpio.Directory("usr/"+n, 0o755)
		}
	}
	if _, ok := a["usr"]; !ok {
		a["usr"] = cpio.Directory("usr", 0o755)
	}
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	for _, name := range slices.Sorted(maps.Keys(a)) { // a folder sorts before its files
		if err := w.WriteRecord(cpio.MakeReproducible(a[name])); err != nil {
			return nil, err
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// system adds what every guest has: init, busybox, the project's commands and
// a minimal /etc.
func (a archive) system(busybox string, binaries map[string]string) error {
	for _, d := range []string{"dev", "proc", "sys", "run", "root", "mnt", "var/tmp", "var/lib", "var/log", "etc"} {
		a.dir(d, 0o755)
	}
	a.dir("tmp", 0o777)
	a.add("dev/console", func(n string) cpio.Record { return cpio.CharDev(n, 0o600, 5, 1) })
	a.data("etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"), 0o644)
	a.data("etc/group", []byte("root:x:0:\nnogroup:x:65534:\n"), 0o644)
	a.data("etc/hosts", []byte("127.0.0.1 localhost\n"), 0o644)
	a.link("etc/mtab", "/proc/self/mounts")
	if err := a.file("usr/bin/busybox", busybox); err != nil {
		return err
	}
	for name, file := range binaries {
		to := "usr/bin/" + name
		if name == "init" {
			to = "init"
		}
		if err := a.file(to, file); err != nil {
			return err
		}
	}
	return nil
}

// modules adds the named kernel modules and those they depend on, without
// compression, and returns their files below /lib/modules/RELEASE in an order
// in which they can be loaded. Modules that are built into the kernel need
// nothing; modules that are not the kernel's own are in extra, file by name. It
// also writes a modules.dep for modprobe.
func (a archive) modules(k fetch.Kernel, extra map[string]string, names []string) ([]string, error) {
	canonical := func(file string) string {
		base, _, _ := strings.Cut(path.Base(file), ".ko")
		return strings.ReplaceAll(base, "-", "_")
	}
	files := map[string]string{}
	err := filepath.WalkDir(filepath.Join(k.Modules, "kernel"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && strings.Contains(d.Name(), ".ko") {
			files[canonical(p)] = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	maps.Copy(files, extra)
	text, err := os.ReadFile(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	builtin := map[string]bool{}
	for _, f := range strings.Fields(string(text)) {
		builtin[canonical(f)] = true
	}
	var order []string
	var dep strings.Builder
	done := map[string]string{} // name to file in the guest
	var visit func(name string) error
	visit = func(name string) error {
		name = canonical(name)
		if _, ok := done[name]; ok || builtin[name] {
			return nil
		}
		from, ok := files[name]
		if !ok {
			return fmt.Errorf("kernel %s has no module %q", k.Release, name)
		}
		content, err := readModule(from)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		needs, err := moduleDepends(content)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		rel, err := filepath.Rel(k.Modules, from)
		if err != nil {
			return err
		}
		if extra[name] != "" {
			rel = "extra/" + path.Base(from)
		}
		rel = strings.TrimSuffix(rel, ".xz")
		done[name] = rel
		line := rel + ":"
		for _, n := range needs {
			if err := visit(n); err != nil {
				return err
			}
			if f := done[canonical(n)]; f != "" {
				line += " " + f
			}
		}
		order = append(order, rel)
		dep.WriteString(line + "\n")
		a.data("usr/lib/modules/"+k.Release+"/"+rel, content, 0o644)
		return nil
	}
	for _, n := range names {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	a.data("usr/lib/modules/"+k.Release+"/modules.dep", []byte(dep.String()), 0o644)
	return order, nil
}

func readModule(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	switch filepath.Ext(file) {
	case ".ko":
		return io.ReadAll(f)
	case ".xz":
		r, err := xz.NewReader(f)
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	}
	return nil, errors.New("unknown compression")
}

// moduleDepends reads the depends= entry of a module's .modinfo section.
func moduleDepends(content []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo section")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
