package fetch

import (
	"context"
	"fmt"
	"path/filepath"
)

// IGBUIO builds igb_uio, DPDK's UIO driver, for the kernel that Kernel returns
// for the suite and architecture, from Debian's package of its source, and
// returns the path of the .ko file.
func (c *Cache) IGBUIO(ctx context.Context, suite, arch string) (string, error) {
	const name = "dpdk-kmods-dkms"
	base := baseSuite(suite)
	dir, err := c.folder(ctx, request{
		key: "igb-uio-source-" + base, what: "the source of igb_uio", suite: base, release: base, arch: arch,
		packages: []string{name}, keep: func(p string) bool { return p == name },
	})
	if err != nil {
		return "", err
	}
	found, _ := filepath.Glob(filepath.Join(dir, "usr/src/*/igb_uio.c"))
	if len(found) == 0 {
		found, _ = filepath.Glob(filepath.Join(dir, "usr/src/*/*/igb_uio.c"))
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s: expected the source of igb_uio, found %d", dir, len(found))
	}
	return c.Module(ctx, suite, arch, filepath.Dir(found[0]))
}
