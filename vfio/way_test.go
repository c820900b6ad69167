package vfio

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/u-root/u-root/pkg/pci"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
)

// TestFindWay has the device files that kernels have, and rights to some.
func TestFindWay(t *testing.T) {
	const container, group, noIOMMU = "vfio/vfio", "vfio/7", "vfio/noiommu-7"
	const iommufd, own = "iommu", "vfio/devices/vfio3"
	for _, c := range []struct {
		name      string
		group     string // of the device
		entry     bool   // sysfs shows a character device
		files     []string
		forbidden []string
		want      string
		opened    []string
	}{
		{"a Debian kernel", "7", false, []string{container, group}, nil, WayGroup, []string{container, group}},
		{"with iommufd", "7", true, []string{container, group, iommufd, own}, nil, WayIOMMUFD, []string{iommufd, own}},
		{"without groups", "7", true, []string{iommufd, own}, nil, WayIOMMUFD, []string{iommufd, own}},
		{"without /dev/iommu", "7", true, []string{container, group, own}, nil, WayGroup, []string{container, group}},
		{"no right to /dev/iommu", "7", true, []string{container, group, iommufd, own}, []string{iommufd}, WayGroup, []string{container, group}},
		{"no right to the device", "7", true, []string{container, group, iommufd, own}, []string{own}, WayGroup, []string{container, group}},
		{"no right to anything", "7", true, []string{container, group, iommufd, own}, []string{own, group}, WayIOMMUFD, []string{iommufd, own}},
		{"no-IOMMU mode", "7", false, []string{container, noIOMMU}, nil, WayNoIOMMU, []string{container, noIOMMU}},
		{"no-IOMMU mode, an entry without a file", "7", true, []string{container, noIOMMU, iommufd}, nil, WayNoIOMMU, []string{container, noIOMMU}},
		{"no IOMMU", "", false, []string{container}, nil, "", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			devices, entry := t.TempDir(), t.TempDir()
			for _, f := range c.files {
				path := filepath.Join(devices, f)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			if c.entry {
				if err := os.MkdirAll(filepath.Join(entry, "vfio-dev/vfio3"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			mayOpen := func(path string) error {
				name, err := filepath.Rel(devices, path)
				if slices.Contains(c.forbidden, name) {
					return os.ErrPermission
				}
				return errors.Join(err, exists(path))
			}
			w, err := findWay(&sysfs.Device{PCI: &pci.PCI{FullPath: entry}, IOMMUGroup: c.group}, devices, mayOpen)
			if c.want == "" {
				if !errors.Is(err, fault.ErrNotSupported) {
					t.Errorf("got %v, %v, want ErrNotSupported", w, err)
				}
				return
			}
			var opened []string
			for _, f := range c.opened {
				opened = append(opened, filepath.Join(devices, f))
			}
			if err != nil || w.Name != c.want || !slices.Equal(w.Files, opened) {
				t.Errorf("got %s by %q, %v; want %s by %q", w.Name, w.Files, err, c.want, opened)
			}
		})
	}
}
