// Package archtest keeps the direction of the imports.
package archtest

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/ivshmem-go/ivshmem"

// rule says what a package may import: of this module, and of others.
// Test files are not looked at.
type rule struct {
	own    []string
	others []string // "x/..." is all below x
	why    string
}

const unix = "golang.org/x/sys/unix"

var rules = map[string]rule{
	"regs":  {why: "facts of the device: everybody imports it, so it imports nobody"},
	"shmem": {why: "the memory: standard library only"},

	"internal/fault":    {why: "a leaf that all rooms share"},
	"internal/evfd":     {others: []string{unix}, why: "eventfds only"},
	"internal/fdpass":   {others: []string{unix}, why: "descriptor passing only"},
	"internal/sockpath": {own: []string{"internal/fault"}, others: []string{unix}, why: "socket paths only"},
	"internal/mem":      {own: []string{"regs", "shmem"}, others: []string{unix}, why: "mappings, whoever needs them"},
	"internal/sysfs": {own: []string{"regs", "shmem", "internal/evfd", "internal/fault", "internal/mem"},
		others: []string{unix, "github.com/u-root/u-root/pkg/pci"}, why: "a way to a device: below the root, beside the others"},

	"vfiouser":               {own: []string{"internal/fdpass", "internal/sockpath", "vfiouser/internal/wire"}, others: []string{unix}, why: "the wire knows nothing of ivshmem"},
	"vfiouser/internal/wire": {others: []string{unix}, why: "bytes to values"},

	"link": {own: []string{"regs", "shmem", "internal/evfd", "internal/mem"}, others: []string{unix},
		why: "the device model on the host knows no way to a device in a guest"},
	"link/pcidev": {own: []string{"regs", "shmem", "link", "vfiouser", "internal/evfd", "internal/fdpass", "internal/mem", "internal/sockpath"}, others: []string{unix},
		why: "a PCI function over the wire"},
	"link/ivshsock": {own: []string{"link", "internal/fdpass", "internal/sockpath"}, others: []string{unix},
		why: "the socket of ivshmem2-server"},

	"vfio": {own: []string{"regs", "shmem", "internal/evfd", "internal/fault", "internal/mem", "internal/sysfs"}, others: []string{unix},
		why: "a way to a device: it knows neither the root nor the other ways"},
	"peer": {own: []string{"regs", "shmem", "vfiouser", "internal/evfd", "internal/fault", "internal/mem"}, others: []string{unix},
		why: "a way to a device: it knows neither the root nor the other ways"},

	"uio": {own: []string{"regs", "shmem", "internal/evfd", "internal/fault", "internal/mem", "internal/sysfs"}, others: []string{unix},
		why: "a way to a device: it knows neither the root nor the other ways"},

	"": {own: []string{"regs", "shmem", "uio", "vfio", "peer", "internal/evfd", "internal/fault", "internal/sysfs"}, others: []string{unix},
		why: "the only chooser of a way; no service, no protocol"},
	"stream": {own: []string{"", "regs", "shmem"}, others: []string{unix},
		why: "a protocol knows a device, and not what carries it"},
	"vnet": {own: []string{"", "regs", "shmem"},
		why: "a protocol knows a device, and not what carries it"},
	"vnet/tap": {own: []string{"vnet", "internal/evfd"}, others: []string{unix, "github.com/vishvananda/netlink"},
		why: "between virtual Ethernet and the kernel's"},
	"internal/capture": {own: []string{"vnet"}, others: []string{"github.com/gopacket/gopacket", "github.com/gopacket/gopacket/layers", "github.com/gopacket/gopacket/pcapgo"},
		why: "frames to a file"},
	"vnet/netstack": {own: []string{"vnet"}, others: []string{"gvisor.dev/gvisor/..."},
		why: "the only place that knows gVisor"},
	"virtio": {own: []string{"", "regs", "shmem"},
		why: "a protocol knows a device, and not what carries it"},
	"virtio/block":   {own: []string{"", "virtio"}, others: []string{unix}, why: "a device type knows the transport only"},
	"virtio/console": {own: []string{"", "virtio"}, why: "a device type knows the transport only"},
	"virtio/net":     {own: []string{"", "virtio"}, why: "a device type knows the transport only"},
	"virtio/entropy": {own: []string{"", "virtio"}, why: "a device type knows the transport only"},
	"ivshmemtest":    {own: []string{"", "link", "link/pcidev"}, others: []string{unix}, why: "for tests: the service and its peers in one process"},

	"internal/cuse":      {own: []string{"virtio/console"}, others: []string{unix}, why: "between a port and the kernel's character devices"},
	"internal/boardtest": {own: []string{"", "regs", "shmem"}, others: []string{unix}, why: "for tests: a link of nothing but memory"},
	"internal/filecopy":  {why: "a protocol over any connection"},
	"internal/ports": {own: []string{"internal/cuse", "internal/sockpath", "virtio/console"}, others: []string{unix, "github.com/creack/pty", "golang.org/x/term"},
		why: "between ports and files that programs open"},
	"internal/relay":   {why: "joins any two connections"},
	"internal/nbd":     {others: []string{unix}, why: "a protocol for any disk"},
	"internal/compare": {others: []string{unix}, why: "what a link is compared with is nothing of ours"},
	"internal/pingpong": {own: []string{"", "shmem", "stream"}, others: []string{unix, "github.com/HdrHistogram/hdrhistogram-go"},
		why: "a protocol never knows what carries it"},
	"cmd/ivshctl": {own: []string{"", "regs", "shmem", "link", "link/pcidev", "link/ivshsock", "internal/sockpath", "stream", "vnet", "virtio", "virtio/block", "virtio/console", "virtio/entropy", "virtio/net", "vnet/netstack", "vnet/tap", "internal/capture", "internal/fdpass", "internal/filecopy", "internal/nbd", "internal/ports", "internal/relay", "internal/sysfs"}, others: []string{unix, "github.com/urfave/cli/v2", "golang.org/x/term"},
		why: "commands parse, call and print"},
	"examples/http":   {own: []string{"", "stream"}, why: "what a user would write"},
	"examples/rpc":    {own: []string{"", "stream"}, why: "what a user would write"},
	"examples/pubsub": {own: []string{"", "stream"}, why: "what a user would write"},
	"examples/sensor": {own: []string{"", "shmem"}, why: "what a user would write"},
	"cmd/ivsh-pingpong": {own: []string{"", "regs", "link", "link/pcidev", "stream", "internal/compare", "internal/pingpong"},
		others: []string{unix, "github.com/urfave/cli/v2", "github.com/HdrHistogram/hdrhistogram-go"},
		why:    "commands parse, call and print"},
}

func TestImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,GoFiles", module+"/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath       string
			Imports, GoFiles []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if len(p.GoFiles) == 0 {
			continue // tests only
		}
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		r, ok := rules[name]
		if !ok {
			t.Errorf("package %q has no rule here: say what it may import, and why", name)
			continue
		}
		seen++
		for _, i := range p.Imports {
			own, isOwn := strings.CutPrefix(i, module)
			own = strings.TrimPrefix(own, "/")
			standard := !strings.Contains(strings.Split(i, "/")[0], ".")
			switch {
			case isOwn && !slices.Contains(r.own, own):
				t.Errorf("%q imports %q: %s", name, own, r.why)
			case !isOwn && !standard && !slices.ContainsFunc(r.others, func(o string) bool {
				all, is := strings.CutSuffix(o, "...")
				return o == i || is && strings.HasPrefix(i, all)
			}):
				t.Errorf("%q imports %s: %s", name, i, r.why)
			}
		}
	}
	if seen != len(rules) {
		t.Errorf("%d packages were found for %d rules", seen, len(rules))
	}
}

// linked is every module whose code is in ivshctl. A new one is a decision,
// to be seen in a review.
var linked = []string{
	"github.com/cpuguy83/go-md2man/v2", // of urfave/cli
	"github.com/creack/pty",
	"github.com/google/btree", // of gvisor
	"github.com/gopacket/gopacket",
	"github.com/ivshmem-go/ivshmem",
	"github.com/russross/blackfriday/v2", // of urfave/cli
	"github.com/u-root/u-root",
	"github.com/urfave/cli/v2",
	"github.com/vishvananda/netlink",
	"github.com/vishvananda/netns",
	"github.com/xrash/smetrics", // of urfave/cli
	"golang.org/x/exp",          // of gopacket
	"golang.org/x/net",          // of gopacket
	"golang.org/x/sys",
	"golang.org/x/term",
	"golang.org/x/time", // of gvisor
	"gvisor.dev/gvisor",
}

func TestLinkedModules(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", module+"/cmd/ivshctl").Output()
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Fields(string(out))
	slices.Sort(got)
	got = slices.Compact(got)
	if !slices.Equal(got, linked) {
		t.Errorf("modules in ivshctl: got %q, want %q", got, linked)
	}
}
