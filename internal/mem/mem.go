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

// MapSections maps the sections of peer own from a file in which the shared
// memory region starts at base. The State Table is left out where
// stateTable is false; the caller sets Sections.States then.
func MapSections(fd int, base int64, l shmem.Layout, own uint32, stateTable bool) (*Set, error) {
	s := &Set{Sections: shmem.Sections{Layout: l}}
	fail := func(name string, err error) (*Set, error) {
		s.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	mapped := func(offset, size uint64, write bool) (*shmem.Memory, error) {
		m, err := Map(fd, base+int64(offset), size, write)
		if err != nil {
			return nil, err
		}
		s.maps = append(s.maps, m)
		return m.Memory, nil
	}
	if stateTable {
		m, err := mapped(0, l.StateTable, false)
		if err != nil {
			return fail(shmem.NameStateTable, err)
		}
		v, err := m.ReadOnly(shmem.NameStateTable, 0, l.StateTable)
		if err != nil {
			return fail(shmem.NameStateTable, err)
		}
		if s.Sections.States, err = shmem.NewStateTable(v, l.Peers); err != nil {
			return fail(shmem.NameStateTable, err)
		}
	}
	if l.ReadWrite > 0 {
		m, err := mapped(l.ReadWriteOffset(), l.ReadWrite, true)
		if err != nil {
			return fail(shmem.NameReadWrite, err)
		}
		if s.Sections.ReadWrite, err = m.ReadWrite(shmem.NameReadWrite, 0, l.ReadWrite); err != nil {
			return fail(shmem.NameReadWrite, err)
		}
	}
	if l.Output > 0 {
		all := uint64(l.Peers) * l.Output
		m, err := mapped(l.OutputOffset(0), all, false)
		if err != nil {
			return fail(shmem.NameInputs, err)
		}
		if s.Sections.Inputs, err = m.ReadOnly(shmem.NameInputs, 0, all); err != nil {
			return fail(shmem.NameInputs, err)
		}
		if m, err = mapped(l.OutputOffset(own), l.Output, true); err != nil {
			return fail(shmem.NameOutput, err)
		}
		if s.Sections.Output, err = m.ReadWrite(shmem.NameOutput, 0, l.Output); err != nil {
			return fail(shmem.NameOutput, err)
		}
	}
	return s, nil
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
