package fetch

import (
	"slices"
	"testing"
)

func TestNotConfigured(t *testing.T) {
	const config = "# Linux/x86 Kernel Configuration\nCONFIG_PCI=y\nCONFIG_HZ=250\n# CONFIG_VFIO is not set\n# CONFIG_SMP is not set\n"
	got := notConfigured("# a comment\n\nCONFIG_PCI=y\n  CONFIG_HZ=100\nCONFIG_VFIO=y\nCONFIG_IOMMUFD=y\n# CONFIG_SMP is not set\n# CONFIG_GONE is not set\n# CONFIG_PCI is not set\n", config)
	if want := []string{"CONFIG_HZ=100", "CONFIG_VFIO=y", "CONFIG_IOMMUFD=y", "# CONFIG_PCI is not set"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
