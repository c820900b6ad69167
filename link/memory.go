package link

import (
	"errors"
	"fmt"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// allocate gets the shared memory, all zero.
func (l *Link) allocate() error {
	var err error
	size := l.layout.Total()
	if l.config.File == "" {
		err = l.createMemory(size)
	} else {
		err = l.openFile(size)
	}
	if err != nil {
		return err
	}
	// The page that the link itself writes must be there for good; where the
	// file system cannot promise that, accesses are guarded.
	fd := int(l.file.Fd())
	if err := unix.Fallocate(fd, 0, 0, int64(l.layout.StateTable)); err != nil && err != unix.EOPNOTSUPP {
		return l.explain("allocate the State Table", err)
	}
	if l.memory, err = mem.Map(fd, 0, size, true); err != nil {
		return l.explain("map", err)
	}
	l.table, err = l.memory.Memory.ReadWrite(shmem.NameStateTable, 0, l.layout.StateTable)
	return err
}

// createMemory makes a memfd of exactly the size, sealed, so that no peer can
// change its size under another.
func (l *Link) createMemory(size uint64) error {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if page := l.config.HugePages; page != 0 {
		flags |= unix.MFD_HUGETLB | bits.TrailingZeros64(page)<<unix.MFD_HUGE_SHIFT
	}
	fd, err := unix.MemfdCreate("ivshmem", flags)
	if err != nil {
		return l.explain("memfd_create", err)
	}
	l.file = os.NewFile(uintptr(fd), "ivshmem")
	if err := l.file.Truncate(int64(size)); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	l.sealed = true
	return nil
}

// explain names the remedy of failures that have one.
func (l *Link) explain(what string, err error) error {
	page := l.config.HugePages
	err = fmt.Errorf("%s: %w", what, err)
	switch {
	case page == 0:
		return err
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: this kernel has no pages of %d bytes: /sys/kernel/mm/hugepages lists those that it has", err, page)
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOSPC):
		pages := l.layout.Total() / page
		return fmt.Errorf("%w: %d free pages of %d bytes are needed: as root, echo %d >/sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages", err, pages, page, pages, page>>10)
	}
	return err
}

// openFile takes a named file as the memory: one that it makes, or one that is
// ours alone. The lock is the open file's, which descriptors passed to peers
// and mappings of them share: so it lasts until the last peer has let go, and
// a file that can be locked has no reader or writer left from another link.
func (l *Link) openFile(size uint64) error {
	path := l.config.File
	const flags = unix.O_RDWR | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK
	fd, err := unix.Open(path, flags|unix.O_CREAT|unix.O_EXCL, 0o600)
	created := err == nil
	if err == unix.EEXIST {
		fd, err = unix.Open(path, flags, 0)
	}
	if err == unix.ELOOP {
		err = fmt.Errorf("%w: expected a file, found a symbolic link", err)
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	l.file = os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%s: expected a regular file: choose another name", path)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s: expected a file of user %d, found one of user %d, who could change it at any time: choose another name, or remove it", path, os.Geteuid(), st.Uid)
	case !created && st.Nlink != 1:
		return fmt.Errorf("%s: expected a file with one name, found one with %d: choose another name, or remove it", path, st.Nlink)
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%s: %w: another link has it, or peers of one that has ended: end them, or choose another name", path, err)
	}
	l.created = created
	// What is there is somebody's data: the new link starts with zeros.
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	return l.file.Truncate(int64(size))
}

// guard runs f, which accesses the State Table. Peers can cut a file that is
// not sealed short; that must not end the service.
func (l *Link) guard(f func()) {
	if l.sealed {
		f()
	} else {
		_ = mem.Guard(f) // nobody is left to see the table
	}
}

// storeEntry writes an entry of the State Table. The atomic store is a full
// barrier.
func (l *Link) storeEntry(id, v uint32) {
	// The table is the link's own mapping, so the store fails only after
	// Close.
	l.guard(func() { l.table.Store32(4*uint64(id), v) })
}

// loadEntry reads an entry of the State Table, once.
func (l *Link) loadEntry(id uint32) (v uint32) {
	l.guard(func() { v, _ = l.table.ReadOnly().Load32(4 * uint64(id)) })
	return v
}
