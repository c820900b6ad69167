package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The programs in this file use a UIO device of the project's kernel module
// with bare system calls, so that a mistake in the library cannot hide one in
// the module.

// Offsets of registers in the map "registers".
const (
	regID = iota * 4
	regMaxPeers
	regInterruptControl
	_
	regState
)

type uioMap struct {
	Name string `json:"name"`
	Addr uint64 `json:"addr"`
	Size uint64 `json:"size"`
}

// uioDevice is an opened UIO device.
type uioDevice struct {
	fd   int
	dir  string // in sysfs
	maps []uioMap
	regs []byte // nil until mapped
}

// openUIO opens the UIO device of a PCI device.
func openUIO(address string) (*uioDevice, error) {
	dirs, _ := filepath.Glob("/sys/bus/pci/devices/" + address + "/uio/uio*")
	if len(dirs) != 1 {
		return nil, fmt.Errorf("%s: expected one UIO device, found %d", address, len(dirs))
	}
	d := &uioDevice{dir: dirs[0]}
	for i := 0; ; i++ {
		text := func(file string) string {
			b, _ := os.ReadFile(fmt.Sprintf("%s/maps/map%d/%s", d.dir, i, file))
			return strings.TrimSuffix(string(b), "\n")
		}
		m := uioMap{Name: text("name")}
		if m.Name == "" {
			break
		}
		var err error
		if m.Addr, err = strconv.ParseUint(text("addr"), 0, 64); err != nil {
			return nil, err
		}
		if m.Size, err = strconv.ParseUint(text("size"), 0, 64); err != nil {
			return nil, err
		}
		if text("offset") != "0x0" {
			return nil, fmt.Errorf("map %s: offset %s, want 0x0", m.Name, text("offset"))
		}
		d.maps = append(d.maps, m)
	}
	var err error
	d.fd, err = unix.Open("/dev/"+filepath.Base(d.dir), unix.O_RDWR|unix.O_CLOEXEC, 0)
	return d, err
}

func (d *uioDevice) index(name string) int {
	for i, m := range d.maps {
		if m.Name == name {
			return i
		}
	}
	return -1
}

func (d *uioDevice) mmap(index int, length uint64, prot, flags int) ([]byte, error) {
	return unix.Mmap(d.fd, int64(index*os.Getpagesize()), int(length), prot, flags)
}

func (d *uioDevice) mapRegisters() error {
	var err error
	d.regs, err = d.mmap(0, d.maps[0].Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return err
}

//go:noinline
func load32(b []byte, at int) uint32 { return *(*uint32)(unsafe.Pointer(&b[at])) }

//go:noinline
func store32(b []byte, at int, v uint32) { *(*uint32)(unsafe.Pointer(&b[at])) = v }

// uioRules is what a UIO device looks like, and which of the rules for it do
// not hold.
type uioRules struct {
	Name    string   `json:"name"`
	Version string   `json:"version"`
	Maps    []uioMap `json:"maps"`
	// Types are the kernel's memory types of the maps, on x86.
	Types  map[string]string `json:"types"`
	Broken []string          `json:"broken"`
}

// rules tries what may be done with the UIO device of a PCI device, and what
// may not.
func rules(_ context.Context, args []string) (any, error) {
	if len(args) != 1 {
		return nil, errors.New("expected a PCI address")
	}
	d, err := openUIO(args[0])
	if err != nil {
		return nil, err
	}
	r := &uioRules{Maps: d.maps, Types: map[string]string{}}
	for file, to := range map[string]*string{"name": &r.Name, "version": &r.Version} {
		b, err := os.ReadFile(filepath.Join(d.dir, file))
		if err != nil {
			return nil, err
		}
		*to = strings.TrimSuffix(string(b), "\n")
	}
	want := func(what string, got, want error) {
		if got != want {
			r.Broken = append(r.Broken, fmt.Sprintf("%s: got %v, want %v", what, got, want))
		}
	}
	const ro, rw = unix.PROT_READ, unix.PROT_READ | unix.PROT_WRITE
	page := uint64(os.Getpagesize())
	unmap := func(b []byte) {
		if b != nil {
			want("munmap", unix.Munmap(b), nil)
		}
	}
	content := map[string][]byte{}
	for i, m := range d.maps {
		writable := m.Name != "state_table" && m.Name != "input_sections"
		// Reading first: then mprotect shows whether it can be upgraded.
		for _, c := range []struct {
			what    string
			flags   int
			upgrade bool
		}{{"shared", unix.MAP_SHARED, writable}, {"private", unix.MAP_PRIVATE, false}} {
			b, err := d.mmap(i, page, ro, c.flags)
			want(m.Name+": "+c.what+" mapping for reading", err, nil)
			if err == nil {
				allowed := error(nil)
				if !c.upgrade {
					allowed = unix.EACCES
				}
				want(m.Name+": mprotect for writing, "+c.what, unix.Mprotect(b, rw), allowed)
			}
			unmap(b)
			b, err = d.mmap(i, page, rw, c.flags)
			allowed := error(nil)
			if !c.upgrade {
				allowed = unix.EINVAL
			}
			want(m.Name+": "+c.what+" mapping for writing", err, allowed)
			unmap(b)
		}
		b, err := d.mmap(i, m.Size+page, ro, unix.MAP_SHARED)
		want(m.Name+": a page too long", err, unix.EINVAL)
		unmap(b)
		prot := ro
		if writable {
			prot = rw
		}
		content[m.Name], err = d.mmap(i, m.Size, prot, unix.MAP_SHARED)
		want(m.Name+": whole", err, nil)
	}
	for _, i := range []int{len(d.maps), len(d.maps) + 1, 1 << 20, 1 << 40} {
		b, err := d.mmap(i, page, ro, unix.MAP_SHARED)
		want(fmt.Sprintf("map %d", i), err, unix.EINVAL)
		unmap(b)
	}
	if r.Broken != nil {
		return r, nil
	}
	for name, line := range memoryTypes(d.maps) {
		r.Types[name] = line
	}

	// The sections are where they should be.
	id, state := load32(content["registers"], regID), content["state_table"]
	store32(content["registers"], regState, 0x1234)
	if got := load32(state, int(4*id)); got != 0x1234 {
		r.Broken = append(r.Broken, fmt.Sprintf("own entry of the State Table: %#x", got))
	}
	if own, in := content["output_section"], content["input_sections"]; own != nil {
		copy(own[len(own)-5:], "there")
		end := (int(id) + 1) * len(own)
		if end > len(in) || string(in[end-5:end]) != "there" {
			r.Broken = append(r.Broken, "the output section is not seen among the input sections")
		}
		if n := load32(content["registers"], regMaxPeers); int(n)*len(own) != len(in) {
			r.Broken = append(r.Broken, fmt.Sprintf("%d peers with %d bytes each: input sections of %d bytes", n, len(own), len(in)))
		}
	}
	if all := content["rw_section"]; all != nil {
		// In memory that is mapped as a device's, arm64 faults here.
		for offset := range 64 {
			n := copy(all[offset:offset+1000], all[2000:])
			clear(all[offset : offset+n-offset%7])
		}
		copy(all[len(all)-4:], "here")
		if got := string(all[len(all)-4:]); got != "here" {
			r.Broken = append(r.Broken, "R/W section: read "+got)
		}
	}

	// The file itself.
	_, err = unix.Read(d.fd, make([]byte, 8))
	want("read of 8 bytes", err, unix.EINVAL)
	want("O_NONBLOCK", unix.SetNonblock(d.fd, true), nil)
	_, err = unix.Read(d.fd, make([]byte, 4))
	want("read without an interrupt", err, unix.EAGAIN)
	_, err = unix.Write(d.fd, make([]byte, 4))
	want("write", err, unix.ENOSYS)
	return r, nil
}

// memoryTypes returns what the kernel's page attribute table says about maps
// that are mapped as a whole.
func memoryTypes(maps []uioMap) map[string]string {
	text, _ := os.ReadFile("/sys/kernel/debug/x86/pat_memtype_list")
	types := map[string]string{}
	for _, m := range maps {
		for line := range strings.SplitSeq(string(text), "\n") {
			if t, ok := strings.CutPrefix(line, fmt.Sprintf("PAT: [mem 0x%016x-0x%016x] ", m.Addr, m.Addr+m.Size)); ok {
				types[m.Name] = t
			}
		}
	}
	return types
}

// hold sets the own state, closes the file, and stays with the mapping alone.
func hold(ctx context.Context, args []string) (any, error) {
	if len(args) != 1 {
		return nil, errors.New("expected a PCI address")
	}
	d, err := openUIO(args[0])
	if err != nil {
		return nil, err
	}
	if err := d.mapRegisters(); err != nil {
		return nil, err
	}
	if err := unix.Close(d.fd); err != nil {
		return nil, err
	}
	store32(d.regs, regState, 7)
	fmt.Println("closed")
	<-ctx.Done()
	return nil, nil
}

// wait sets the own state, arms the device, and prints a line for each return
// of read until one fails: by how much the counter grew, and Interrupt
// Control.
func wait(_ context.Context, args []string) (any, error) {
	if len(args) != 1 {
		return nil, errors.New("expected a PCI address")
	}
	d, err := openUIO(args[0])
	if err != nil {
		return nil, err
	}
	if err := d.mapRegisters(); err != nil {
		return nil, err
	}
	fmt.Printf("control %d\n", load32(d.regs, regInterruptControl))
	text, err := os.ReadFile(filepath.Join(d.dir, "event"))
	if err != nil {
		return nil, err
	}
	before, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 32)
	if err != nil {
		return nil, err
	}
	last := int32(before)
	store32(d.regs, regState, 7)
	runtime.LockOSThread()
	for {
		store32(d.regs, regInterruptControl, 1)
		fmt.Println("armed")
		var b [4]byte
		if _, err := unix.Read(d.fd, b[:]); err != nil {
			fmt.Printf("error %v\n", err)
			return nil, nil
		}
		now := int32(binary.NativeEndian.Uint32(b[:]))
		fmt.Printf("grown %d control %d\n", now-last, load32(d.regs, regInterruptControl))
		last = now
	}
}

// words writes into the sections and reads it back through the memory that
// they share, without a State Table that follows the registers.
func words(_ context.Context, args []string) (any, error) {
	if len(args) != 1 {
		return nil, errors.New("expected a PCI address")
	}
	d, err := openUIO(args[0])
	if err != nil {
		return nil, err
	}
	content := map[string][]byte{}
	for i, m := range d.maps {
		prot := unix.PROT_READ
		if m.Name == "rw_section" || m.Name == "output_section" {
			prot |= unix.PROT_WRITE
		}
		if content[m.Name], err = d.mmap(i, m.Size, prot, unix.MAP_SHARED); err != nil {
			return nil, fmt.Errorf("%s: %w", m.Name, err)
		}
	}
	own := content["output_section"]
	copy(own, "output")
	copy(content["rw_section"], "both")
	if got := string(content["input_sections"][:6]); got != "output" {
		return nil, fmt.Errorf("input sections: %q", got)
	}
	if got := string(content["rw_section"][:4]); got != "both" {
		return nil, fmt.Errorf("R/W section: %q", got)
	}
	return struct{}{}, nil
}
