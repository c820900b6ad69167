package sysfs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/internal/sysfs"
)

// tree is a sysfs in a folder of its own.
type tree struct {
	testing.TB
	root string
}

func newTree(t testing.TB) *tree {
	f := &tree{t, t.TempDir()}
	f.write("bus/pci/devices/.keep", "")
	if err := os.Remove(filepath.Join(f.root, "bus/pci/devices/.keep")); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *tree) fs() sysfs.FS { return sysfs.FS(f.root) }

func (f *tree) write(name, content string) {
	f.Helper()
	p := filepath.Join(f.root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		f.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		f.Fatal(err)
	}
}

func (f *tree) link(name, target string) {
	f.Helper()
	if err := os.Symlink(target, filepath.Join(f.root, name)); err != nil {
		f.Fatal(err)
	}
}

func (f *tree) read(name string) string {
	f.Helper()
	b, err := os.ReadFile(filepath.Join(f.root, name))
	if err != nil {
		f.Fatal(err)
	}
	return string(b)
}

// resource is a line of a resource file.
func resource(base, size uint64, flags uint32) string {
	if size == 0 {
		return "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
	}
	return fmt.Sprintf("%#016x %#016x %#016x\n", base, base+size-1, flags)
}

// device adds an ivshmem device as the kernel shows it: 3 peers, sections of
// 1000h, 9000h and 2000h bytes, the calling peer is number 1, user-defined
// protocol 4001h; BAR0, BAR1 and the 64-bit BAR2. It returns its folder.
func (f *tree) device(address string) (dir string) {
	f.Helper()
	dir = "devices/pci0000:00/" + address
	f.write(dir+"/vendor", "0x110a\n")
	f.write(dir+"/device", "0x4106\n")
	f.write(dir+"/class", "0xff4001\n")
	f.write(dir+"/irq", "0\n")
	f.write(dir+"/enable", "0\n")
	f.write(dir+"/resource", resource(0xfebf1000, 0x1000, 0x40200)+resource(0xfebf2000, 0x1000, 0x40200)+
		resource(0x7_0000_0000, 0x10000, 0x14220c)+strings.Repeat(resource(0, 0, 0), 10))
	config := make([]byte, 256)
	copy(config, "\x0a\x11\x06\x41\x02\x00\x10\x00\x00\x01\x40\xff")
	config[0x34] = 0x40
	copy(config[0x40:], "\x09\x60\x18\x00\x00\x10\x00\x00\x00\x90\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00\x00\x00\x00")
	copy(config[0x60:], "\x11\x00\x0f\x00\x01\x00\x00\x00\x01\x01\x00\x00")
	f.write(dir+"/config", string(config))
	registers := make([]byte, 4096)
	copy(registers, "\x01\x00\x00\x00\x03\x00\x00\x00")
	f.write(dir+"/resource0", string(registers))
	memory := make([]byte, 0x10000)
	copy(memory, "\x00\x00\x00\x00\x07\x00\x00\x00\x09\x00\x00\x00") // states
	memory[0x1000] = 0x10
	memory[0xa000], memory[0xc000], memory[0xe000] = 0xa0, 0xa1, 0xa2
	f.write(dir+"/resource2", string(memory))
	f.link("bus/pci/devices/"+address, "../../../"+dir)
	return dir
}

// foreign adds a device of another kind.
func (f *tree) foreign(address string, files map[string]string) {
	f.Helper()
	dir := "devices/pci0000:00/" + address
	for name, content := range files {
		f.write(dir+"/"+name, content)
	}
	f.link("bus/pci/devices/"+address, "../../../"+dir)
}
