// Package mem maps shared memory: sysfs resource files, device files, memfds.
package mem

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/shmem"
)

// Mapping is a mapped piece of a file. Views of its Memory stay safe to use
// after Close: each access then fails with os.ErrClosed.
type Mapping struct {
	Memory *shmem.Memory

	mu   sync.Mutex
	addr unsafe.Pointer // nil once closed
	size uintptr
}

// Map maps size bytes of a file at offset, shared, read-only or read-write.
// The descriptor can be closed afterwards. A file that ends before is an
// error; what becomes shorter later has to be kept out by seals.
func Map(fd int, offset int64, size uint64, write bool) (*Mapping, error) {
	prot := unix.PROT_READ
	if write {
		prot |= unix.PROT_WRITE
	}
	if page := int64(os.Getpagesize()); offset%page != 0 {
		return nil, fmt.Errorf("map %d bytes at offset %#x: expected a multiple of the page size %d of this machine", size, offset, page)
	}
	// Behind the end of a regular file (memfds and sysfs files are such) an
	// access would end the process.
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("map %d bytes at offset %#x: %w", size, offset, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG && (offset < 0 || offset > st.Size || size > uint64(st.Size-offset)) {
		return nil, fmt.Errorf("map %d bytes at offset %#x: expected a file that is as long, found one of %d bytes", size, offset, st.Size)
	}
	p, err := unix.MmapPtr(fd, offset, nil, uintptr(size), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes at offset %#x: %w", size, offset, err)
	}
	m, err := shmem.NewMemory(unsafe.Slice((*byte)(p), size))
	if err != nil {
		unix.MunmapPtr(p, uintptr(size))
		return nil, err
	}
	return &Mapping{Memory: m, addr: p, size: uintptr(size)}, nil
}

// Close gives the file and its memory back. An access that is under way in
// another goroutine must not hit a hole in the address space, or worse,
// something else that was mapped there: so anonymous pages take the place of
// the mapping in one step, and the addresses are given back only when no view
// refers to them any more.
func (m *Mapping) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.addr == nil {
		return nil
	}
	m.Memory.Close()
	addr, size := m.addr, m.size
	_, err := unix.MmapPtr(-1, 0, addr, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("unmap %d bytes: %w", size, err)
	}
	m.addr = nil
	runtime.AddCleanup(m.Memory, func(a uintptr) { unmap(a, size) }, uintptr(addr))
	return nil
}

func unmap(addr, size uintptr) {
	// MunmapPtr takes a pointer; the address is no Go memory, so keeping it
	// as an integer in the meantime is sound.
	unix.Syscall(unix.SYS_MUNMAP, addr, size, 0)
}

// Set is the sections of a link, mapped one by one, so that what a peer may
// only read is mapped read-only.
type Set struct {
	Sections shmem.Sections
	maps     []*Mapping
}

// Places says where in a file the sections of a peer are: offsets for mmap, in
// bytes. Sections that the layout does not have are not looked at.
type Places struct {
	StateTable int64 // or NotMapped: the caller sets Sections.States
	ReadWrite  int64
	Inputs     int64 // the output sections of all peers
	Output     int64 // the own one
}

// NotMapped is the place of a State Table that is not to be mapped.
const NotMapped = -1

// Region is the places of the sections of peer own in a file in which the
// shared memory region starts at base.
func Region(base int64, l shmem.Layout, own uint32) Places {
	return Places{
		StateTable: base,
		ReadWrite:  base + int64(l.ReadWriteOffset()),
		Inputs:     base + int64(l.OutputOffset(0)),
		Output:     base + int64(l.OutputOffset(own)),
	}
}

// MapSections maps the sections of a peer from a file.
func MapSections(fd int, l shmem.Layout, p Places) (*Set, error) {
	s := &Set{Sections: shmem.Sections{Layout: l}}
	if err := s.open(fd, p); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Set) open(fd int, p Places) error {
	l := s.Sections.Layout
	if p.StateTable != NotMapped {
		v, err := s.readOnly(fd, shmem.NameStateTable, p.StateTable, l.StateTable)
		if err != nil {
			return err
		}
		if s.Sections.States, err = shmem.NewStateTable(v, l.Peers); err != nil {
			return err
		}
	}
	var err error
	if l.ReadWrite > 0 {
		if s.Sections.ReadWrite, err = s.readWrite(fd, shmem.NameReadWrite, p.ReadWrite, l.ReadWrite); err != nil {
			return err
		}
	}
	if l.Output > 0 {
		if s.Sections.Inputs, err = s.readOnly(fd, shmem.NameInputs, p.Inputs, uint64(l.Peers)*l.Output); err != nil {
			return err
		}
		if s.Sections.Output, err = s.readWrite(fd, shmem.NameOutput, p.Output, l.Output); err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) mapped(fd int, name string, offset int64, size uint64, write bool) (*shmem.Memory, error) {
	m, err := Map(fd, offset, size, write)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	s.maps = append(s.maps, m)
	return m.Memory, nil
}

func (s *Set) readOnly(fd int, name string, offset int64, size uint64) (*shmem.ReadOnly, error) {
	m, err := s.mapped(fd, name, offset, size, false)
	if err != nil {
		return nil, err
	}
	return m.ReadOnly(name, 0, size)
}

func (s *Set) readWrite(fd int, name string, offset int64, size uint64) (*shmem.ReadWrite, error) {
	m, err := s.mapped(fd, name, offset, size, true)
	if err != nil {
		return nil, err
	}
	return m.ReadWrite(name, 0, size)
}

// Close unmaps all sections.
func (s *Set) Close() error {
	var first error
	for _, m := range s.maps {
		if err := m.Close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}
