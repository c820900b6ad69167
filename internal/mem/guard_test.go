package mem_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/ivshmem-go/ivshmem/internal/mem"
)

func TestGuard(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 1 << 16
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	m, err := mem.Map(int(f.Fd()), 0, size, true)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	v, err := m.Memory.ReadWrite("memory", 0, size)
	if err != nil {
		t.Fatal(err)
	}
	accesses := map[string]func(){
		"load 32":  func() { v.ReadOnly().Load32(size - 4) },
		"store 32": func() { v.Store32(size-4, 1) },
		"load 16":  func() { v.ReadOnly().Load16(size - 4) },
		"store 8":  func() { v.Store8(size-4, 1) },
		"copy out": func() { v.ReadOnly().ReadAt(make([]byte, 1000), size-1000) },
		"copy in":  func() { v.WriteAt(make([]byte, 1000), size-1000) },
	}
	for name, access := range accesses {
		if err := mem.Guard(access); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	for name, access := range accesses {
		if err := mem.Guard(access); !errors.Is(err, mem.ErrCutShort) {
			t.Errorf("%s behind the end of the file: got %v, want ErrCutShort", name, err)
		}
	}
	// Mistakes of ours are not covered up.
	for name, mistake := range map[string]func(){
		"panic": func() { panic("oops") },
		"index": func() { var none []int; none[len(accesses)] = 1 },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: swallowed", name)
				}
			}()
			mem.Guard(mistake)
		}()
	}
}
