package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/regs"
)

// A peer of the campaign doorbell-cost is told what to do in its words of the
// R/W section, so that nothing but the doorbell in question is rung. The
// campaign has the same numbers.
const (
	costStride = 512 // bytes for each peer, by its ID

	costSeq    = 8 * 0 // of the command; what follows belongs to it
	costOp     = 8 * 1
	costArg    = 8 * 2
	costAck    = 8 * 3 // of the last command that was carried out
	costAsleep = 8 * 4 // of the last one that is about to sleep
	costFirst  = 8 * 5 // results: nanoseconds of the peer's own clock
	costSecond = 8 * 6
	costV1ID   = 8 * 7 // 1 + the ID of its v1 device
	costPing   = 8 * 8
	costPong   = 8 * 16
	costClock  = 8 * 17
)

// Commands.
const (
	costSync   = 1 + iota // answer arg pings with the clock
	costWait              // sleep until vector 1 is rung
	costRing              // ring vector 1 of peer arg
	costWaitV1            // the same through the v1 device
	costRingV1
	costLoad     // read a register: a message to the service, and back
	costWaitBare // costWait by poll(2) on the vector's eventfd, and nothing else
)

// costPeer is such a peer.
type costPeer struct {
	dev   *ivshmem.Device
	back  ivshmem.Backend
	v1    *v1Device
	start time.Time
}

// cost carries out what it is told until it is killed.
func cost(ctx context.Context, args []string) (any, error) {
	f := flags("cost")
	device := f.String("device", "", "PCI address or socket path")
	v1 := f.String("v1", "", "PCI address of an ivshmem v1 device")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	p := &costPeer{start: time.Now()}
	var err error
	if p.back, err = backEnd(*device); err != nil {
		return nil, err
	}
	if p.dev, err = ivshmem.New(p.back); err != nil {
		return nil, err
	}
	defer p.dev.Close()
	s, err := p.dev.Sections().ReadWrite.View(costStride*uint64(p.dev.ID()), costStride)
	if err != nil {
		return nil, err
	}
	load := func(at uint64) uint64 { v, _ := s.Load64(at); return v }
	store := func(at, v uint64) { _ = s.Store64(at, v) }
	if *v1 != "" {
		if p.v1, err = openV1(*v1); err != nil {
			return nil, fmt.Errorf("v1 device: %w", err)
		}
		store(costV1ID, uint64(1+p.v1.id()))
	}
	runtime.LockOSThread()
	last := load(costSeq)
	fmt.Println("ready", p.dev.ID())
	for ctx.Err() == nil {
		seq := load(costSeq)
		if seq == last {
			time.Sleep(100 * time.Microsecond)
			continue
		}
		last = seq
		asleep := func() { store(costAsleep, seq) }
		first, second, err := p.do(ctx, load(costOp), load(costArg), asleep, load, store)
		if err != nil {
			return nil, err
		}
		store(costFirst, uint64(first))
		store(costSecond, uint64(second))
		store(costAck, seq)
	}
	return nil, ctx.Err()
}

func (p *costPeer) clock() int64 { return int64(time.Since(p.start)) }

func (p *costPeer) do(ctx context.Context, op, arg uint64, asleep func(), load func(uint64) uint64, store func(at, v uint64)) (first, second int64, err error) {
	switch op {
	case costSync:
		seen := load(costPong)
		for range arg {
			for load(costPing) == seen {
			}
			seen = load(costPing)
			store(costClock, uint64(p.clock()))
			store(costPong, seen)
		}
	case costWait:
		before := p.dev.Interrupts(1)
		told := false
		err = p.dev.Wait(ctx, []int{1}, func() bool {
			if !told {
				told = true
				asleep()
			}
			return p.dev.Interrupts(1) > before
		})
		first = p.clock()
	case costRing:
		first = p.clock()
		err = p.dev.Ring(uint32(arg), 1)
		second = p.clock()
	case costLoad:
		first = p.clock()
		_, err = p.dev.Register(regs.ID)
		second = p.clock()
	case costWaitBare:
		asleep()
		fd := p.back.Interrupts().FDs[1]
		for {
			if _, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err != unix.EINTR {
				break
			}
		}
		first = p.clock()
		var b [8]byte
		unix.Read(fd, b[:])
	case costWaitV1:
		asleep()
		var b [8]byte
		for {
			if _, err = unix.Read(p.v1.eventfds[1], b[:]); err != unix.EINTR {
				break
			}
		}
		first = p.clock()
	case costRingV1:
		first = p.clock()
		err = p.v1.ring(uint32(arg), 1)
		second = p.clock()
	default:
		err = fmt.Errorf("command %d: unknown", op)
	}
	return first, second, err
}

// v1Device is QEMU's ivshmem-doorbell through vfio-pci, by bare system calls.
// Its registers (QEMU, ivshmem-spec): IVPosition at 8, Doorbell at 12.
type v1Device struct {
	registers []byte
	eventfds  []int // by vector
}

func (d *v1Device) id() uint32 { return load32(d.registers, 8) }

func (d *v1Device) ring(peer, vector uint32) error {
	store32(d.registers, 12, peer<<16|vector)
	return nil
}

// openV1 binds the device to vfio-pci and enables two MSI-X vectors. The
// numbers are those of the kernel's include/uapi/linux/vfio.h.
func openV1(address string) (*v1Device, error) {
	dir := "/sys/bus/pci/devices/" + address
	if err := os.WriteFile(dir+"/driver_override", []byte("vfio-pci"), 0); err != nil {
		return nil, err
	}
	if err := os.WriteFile("/sys/bus/pci/drivers_probe", []byte(address), 0); err != nil {
		return nil, err
	}
	link, err := os.Readlink(dir + "/iommu_group")
	if err != nil {
		return nil, err
	}
	container, err := unix.Open("/dev/vfio/vfio", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	group, err := unix.Open("/dev/vfio/"+filepath.Base(link), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	call := func(fd int, request, arg uintptr) (int, error) {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
		if errno != 0 {
			return -1, fmt.Errorf("ioctl %#x: %w", request, errno)
		}
		return int(n), nil
	}
	const setContainer, setIOMMU, getDevice, setIRQs, type1v2 = 0x3b68, 0x3b66, 0x3b6a, 0x3b6e, 3
	fd := int32(container)
	if _, err := call(group, setContainer, uintptr(unsafe.Pointer(&fd))); err != nil {
		return nil, err
	}
	if _, err := call(container, setIOMMU, type1v2); err != nil {
		return nil, err
	}
	name, err := unix.BytePtrFromString(address)
	if err != nil {
		return nil, err
	}
	device, err := call(group, getDevice, uintptr(unsafe.Pointer(name)))
	if err != nil {
		return nil, err
	}
	// Memory decoding and bus master, in the Command register of region 7.
	if _, err := unix.Pwrite(device, []byte{6, 0}, 7<<40+4); err != nil {
		return nil, err
	}
	d := &v1Device{}
	set := []uint32{0, 1<<2 | 1<<5, 2, 0, 2} // size; eventfd, trigger; MSI-X; from 0; two
	for range 2 {
		e, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return nil, err
		}
		d.eventfds = append(d.eventfds, e)
		set = append(set, uint32(e))
	}
	set[0] = uint32(binary.Size(set))
	if _, err := call(device, setIRQs, uintptr(unsafe.Pointer(&set[0]))); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir+"/resource0", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if d.registers, err = unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map resource0: %w", err)
	}
	if id := d.id(); id == 1<<32-1 {
		return nil, errors.New("IVPosition reads all ones")
	}
	return d, nil
}
