package sysfs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// load plans the loading of a driver's modules, unless it is registered.
func (b *Binder) load(driver string) ([]Step, error) {
	var steps []Step
	if !b.has(driver) {
		s, err := b.modprobe(driver)
		if err != nil {
			return nil, absent(driver, err)
		}
		steps = s
		for i, s := range steps {
			steps[i].do = func() error {
				if err := s.do(); err != nil {
					return absent(driver, err)
				}
				return nil
			}
		}
	}
	if driver != vfioPCI {
		return steps, nil
	}
	// Containers need it, and vfio-pci does not depend on it. Where it is
	// missing, no IOMMU mode or iommufd may do.
	s, err := b.modprobe("vfio_iommu_type1")
	if err != nil {
		return steps, nil
	}
	for _, s := range s {
		if slices.ContainsFunc(steps, func(o Step) bool { return o.Shell == s.Shell }) {
			continue
		}
		steps = append(steps, Step{Shell: s.Shell, do: func() error {
			_ = s.do()
			return nil
		}})
	}
	return steps, nil
}

// modprobe plans the loading of a module: by the command if there is one,
// else by the list of dependencies that the kernel came with.
func (b *Binder) modprobe(name string) ([]Step, error) {
	if exists(filepath.Join(string(b.FS), "module", canonical(name))) {
		return nil, nil
	}
	if path, err := exec.LookPath("modprobe"); err == nil {
		return []Step{{Shell: "modprobe " + name, do: func() error {
			out, err := exec.Command(path, name).CombinedOutput()
			if err != nil {
				return fmt.Errorf("modprobe %s: %w: %s", name, err, strings.TrimSpace(string(out)))
			}
			return nil
		}}}, nil
	}
	files, err := b.moduleFiles(name)
	if err != nil {
		return nil, err
	}
	var steps []Step
	for _, f := range files {
		steps = append(steps, Step{Shell: "insmod " + f, do: func() error { return insertModule(f) }})
	}
	return steps, nil
}

// canonical is the kernel's form of a module's name.
func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// moduleFiles lists the files of a module and those that it depends on, in
// the order of loading, without those that are loaded.
func (b *Binder) moduleFiles(name string) ([]string, error) {
	list := filepath.Join(b.Modules, "modules.dep")
	text, err := os.ReadFile(list)
	if err != nil {
		return nil, err
	}
	nameOf := func(file string) string {
		base, _, _ := strings.Cut(filepath.Base(file), ".ko")
		return canonical(base)
	}
	needs := map[string][]string{} // file to files
	wanted := ""
	for line := range strings.Lines(string(text)) {
		file, deps, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		needs[file] = strings.Fields(deps)
		if nameOf(file) == canonical(name) {
			wanted = file
		}
	}
	if wanted == "" {
		return nil, fmt.Errorf("%s lists no module %s", list, name)
	}
	var files []string
	seen := map[string]bool{}
	var visit func(file string)
	visit = func(file string) {
		if seen[file] || exists(filepath.Join(string(b.FS), "module", nameOf(file))) {
			return
		}
		seen[file] = true
		for _, f := range needs[file] {
			visit(f)
		}
		files = append(files, filepath.Join(b.Modules, file))
	}
	visit(wanted)
	return files, nil
}

func insertModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if filepath.Ext(path) != ".ko" {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	err = unix.FinitModule(int(f.Fd()), "", flags)
	switch {
	case err == nil || errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("load %s: %w: this kernel does not decompress modules: install modprobe (package kmod)", path, err)
	}
	return fmt.Errorf("load %s: %w", path, err)
}
