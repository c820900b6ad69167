package vfiouser_test

import (
	"encoding/binary"
	"sync"
	"testing"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

const fakeVectors = 2048

// fake is a small device: BAR0 with 4 KiB of plain memory, BAR1 likewise but
// refusing every access with EPERM, BAR2 with two mappable areas, BAR4 one
// mappable as a whole, config space. Its interrupts are those of libvfio-user's
// own tests.
type fake struct {
	t       testing.TB
	mem     int // the file behind BAR2 and BAR4
	regions [vfiouser.NumRegions]vfiouser.Region
	iofds   []vfiouser.IOFD
	refuse  error // what SetIRQs says

	// The request loop is the only writer; tests look after a reply or the
	// end of the loop. The lock is for the race detector, which does not see
	// the order that a socket makes.
	mu       sync.Mutex
	bar0     [4096]byte
	config   [256]byte
	events   [vfiouser.NumIRQs]map[uint32]int
	sets     []vfiouser.IRQSet
	resets   int
	accesses int
}

const fakePage = 65536 // a multiple of every page size

func newFake(t testing.TB) *fake {
	f := &fake{t: t, mem: memfd(t, 6*fakePage)}
	f.regions[vfiouser.RegionBAR0] = vfiouser.Region{Flags: vfiouser.RegionRead | vfiouser.RegionWrite, Size: 4096, FD: -1}
	f.regions[vfiouser.RegionBAR1] = f.regions[vfiouser.RegionBAR0]
	f.regions[vfiouser.RegionBAR2] = vfiouser.Region{
		Flags: vfiouser.RegionRead | vfiouser.RegionWrite | vfiouser.RegionMmap, Size: 4 * fakePage,
		Areas: []vfiouser.Area{{Offset: fakePage, Size: fakePage}, {Offset: 3 * fakePage, Size: fakePage}},
		FD:    f.mem, FileOffset: fakePage,
	}
	f.regions[vfiouser.RegionBAR4] = vfiouser.Region{
		Flags: vfiouser.RegionRead | vfiouser.RegionMmap, Size: 2 * fakePage, FD: f.mem,
	}
	f.regions[vfiouser.RegionConfig] = vfiouser.Region{Flags: vfiouser.RegionRead | vfiouser.RegionWrite, Size: 256, FD: -1}
	for i := range f.events {
		f.events[i] = make(map[uint32]int)
	}
	for i := range f.config {
		f.config[i] = byte(i)
	}
	t.Cleanup(func() {
		for i := range f.events {
			f.drop(uint32(i), 0, fakeVectors)
		}
	})
	return f
}

func (f *fake) Region(index uint32) vfiouser.Region { return f.regions[index] }

func (f *fake) memory(index uint32) []byte {
	switch index {
	case vfiouser.RegionBAR0:
		return f.bar0[:]
	case vfiouser.RegionConfig:
		return f.config[:]
	}
	return nil
}

func (f *fake) ReadRegion(index uint32, offset uint64, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.accesses++
	if index == vfiouser.RegionBAR1 {
		return unix.EPERM
	}
	if index == vfiouser.RegionBAR2 {
		return nil // leaves the buffer as it is
	}
	copy(p, f.memory(index)[offset:])
	return nil
}

func (f *fake) WriteRegion(index uint32, offset uint64, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.accesses++
	if index == vfiouser.RegionBAR1 {
		return unix.EPERM
	}
	if index == vfiouser.RegionBAR2 {
		return nil
	}
	copy(f.memory(index)[offset:], p)
	return nil
}

func (f *fake) IOFDs(index uint32, max int) []vfiouser.IOFD {
	if index == vfiouser.RegionBAR0 {
		return f.iofds
	}
	return nil
}

func (f *fake) IRQ(index uint32) vfiouser.IRQ {
	switch index {
	case vfiouser.IRQMSIX:
		return vfiouser.IRQ{Flags: vfiouser.IRQEventFD, Count: fakeVectors}
	case vfiouser.IRQError, vfiouser.IRQRequest:
		return vfiouser.IRQ{Flags: vfiouser.IRQEventFD, Count: 1}
	}
	return vfiouser.IRQ{}
}

func (f *fake) drop(index, start, count uint32) {
	for i := start; i < start+count; i++ {
		if fd, ok := f.events[index][i]; ok {
			unix.Close(fd)
			delete(f.events[index], i)
		}
	}
}

func (f *fake) SetIRQs(s vfiouser.IRQSet) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		return f.refuse
	}
	f.sets = append(f.sets, s)
	if s.Action != vfiouser.IRQTrigger {
		return nil
	}
	switch {
	case s.Count == 0:
		f.drop(s.Index, 0, fakeVectors)
	case s.EventFD:
		f.drop(s.Index, s.Start, s.Count)
		for i, fd := range s.FDs {
			f.events[s.Index][s.Start+uint32(i)] = fd
		}
	default:
		for i := range s.Count {
			if s.Bools == nil || s.Bools[i] != 0 {
				f.raise(s.Index, s.Start+i)
			}
		}
	}
	return nil
}

func (f *fake) raise(index, n uint32) {
	if fd, ok := f.events[index][n]; ok {
		unix.Write(fd, binary.LittleEndian.AppendUint64(nil, 1))
	}
}

func (f *fake) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resets++
}

// state runs look while nobody else looks at the device.
func (f *fake) state(look func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	look()
}
