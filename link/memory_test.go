package link

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/regs"
)

func TestLargeMemory(t *testing.T) {
	const size = 6 << 30
	l := newLink(t, Config{Peers: 2, Vectors: 1, ReadWrite: size})
	v, err := l.Memory().ReadWrite("all", 0, l.Layout().Total())
	if err != nil {
		t.Fatal(err)
	}
	for _, offset := range []uint64{4096, 1 << 32, 5 << 30, 4096 + size - 8} {
		if err := v.Store64(offset, offset); err != nil {
			t.Fatal(err)
		}
		var b [8]byte
		if _, err := unix.Pread(l.FD(), b[:], int64(offset)); err != nil || uint64(b[0])|uint64(b[4])<<32 == 0 && offset > 1<<32 {
			t.Errorf("offset %#x: %x, %v", offset, b, err)
		}
		if got, err := v.ReadOnly().Load64(offset); got != offset || err != nil {
			t.Errorf("offset %#x: %#x, %v", offset, got, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(l.FD(), &st); err != nil || st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes are in use, %v: want what was touched", st.Blocks*512, err)
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "memory")
	c := Config{Peers: 2, Vectors: 1, ReadWrite: 4096, File: path}
	l, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 || st.Size() != 8192 {
		t.Errorf("the file: %v, %v", st, err)
	}
	if l.Sealed() {
		t.Error("a file is called sealed")
	}
	if _, err := New(c); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("two links with one file: got %v", err)
	}
	// A peer that is left behind keeps the file from being used again: its
	// descriptor, or its mapping.
	left, err := unix.Dup(l.FD())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Link(path, path+".kept"); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that the link made is left behind: %v", err)
	}
	c.File = path + ".kept"
	if _, err := New(c); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("with a peer's descriptor: got %v", err)
	}
	m, err := unix.Mmap(left, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(left)
	if _, err := New(c); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("with a peer's mapping: got %v", err)
	}
	if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}

	// Used again: zeroed, of the right size, and left there.
	if err := os.WriteFile(c.File, []byte(strings.Repeat("secret", 10000)), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err = New(c)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(c.File)
	if err != nil || len(b) != 8192 || slices.Max(b) != 0 {
		t.Errorf("%d bytes, not all of them 0, %v", len(b), err)
	}
	// Cut short by a peer: the link goes on.
	p, _ := attach(t, l)
	if err := unix.Ftruncate(l.FD(), 0); err != nil {
		t.Fatal(err)
	}
	p.Store(regs.State, 3)
	if got := p.StateOf(0); got != 3 {
		t.Errorf("state: %d", got)
	}
	p.Detach()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(c.File); err != nil {
		t.Errorf("a file that was there before is gone: %v", err)
	}

	for name, bad := range map[string]struct{ path, want string }{
		"symbolic link": {filepath.Join(dir, "symbolic"), "symbolic link"},
		"two names":     {filepath.Join(dir, "first"), "one name"},
		"folder":        {dir, "directory"},
		"pipe":          {filepath.Join(dir, "pipe"), "regular file"},
		"no folder":     {filepath.Join(dir, "no", "such"), "no such file"},
	} {
		switch name {
		case "symbolic link":
			os.Symlink(c.File, bad.path)
		case "two names":
			os.WriteFile(bad.path, nil, 0o600)
			os.Link(bad.path, bad.path+".second")
		case "pipe":
			unix.Mkfifo(bad.path, 0o600)
		}
		if _, err := New(Config{Peers: 2, Vectors: 1, File: bad.path}); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s: got %v, want %q in it", name, err, bad.want)
		}
	}
	t.Run("another user's", func(t *testing.T) {
		if os.Getuid() != 0 { // only root can give a file away
			if _, err := New(Config{Peers: 2, Vectors: 1, File: "/etc/passwd"}); err == nil {
				t.Error("root's file was taken")
			}
			return
		}
		other := filepath.Join(dir, "other")
		if err := errors.Join(os.WriteFile(other, nil, 0o666), os.Chown(other, 12345, -1)); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Config{Peers: 2, Vectors: 1, File: other}); err == nil || !strings.Contains(err.Error(), "one of user 12345") {
			t.Errorf("got %v", err)
		}
	})
}

func TestHugePages(t *testing.T) {
	const page = 2 << 20
	c := Config{Peers: 2, Vectors: 1, ReadWrite: page, HugePages: page}
	for name, bad := range map[string]Config{
		"R/W section":        {Peers: 2, Vectors: 1, ReadWrite: 4096, HugePages: page},
		"output section":     {Peers: 2, Vectors: 1, Output: 4096, HugePages: page},
		"State Table":        {Peers: 2, Vectors: 1, StateTable: 4096, HugePages: page},
		"power of two":       {Peers: 2, Vectors: 1, HugePages: page + 4096},
		"from 64 KiB on":     {Peers: 2, Vectors: 1, HugePages: 4096},
		"no named memory":    {Peers: 2, Vectors: 1, HugePages: page, File: "x"},
		"this kernel has no": {Peers: 2, Vectors: 1, HugePages: 1 << 31},
	} {
		if _, err := New(bad); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want %q in it", err, name)
		}
	}
	l, err := New(c)
	if errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOSPC) {
		if !strings.Contains(err.Error(), "echo 2 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages") {
			t.Errorf("without free huge pages: %v", err)
		}
		return // this machine has none that are free, and that was said
	}
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := l.Layout(); got.StateTable != page || got.Total() != 2*page {
		t.Errorf("layout: %+v", got)
	}
	if !l.Sealed() {
		t.Error("not sealed")
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(l.FD(), &fs); err != nil || fs.Bsize != page {
		t.Errorf("pages of %d bytes, %v", fs.Bsize, err)
	}
}
