package regs

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resource0")
	if err := os.WriteFile(path, make([]byte, 64), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(file.Fd(), 8, 0x20)
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	if err := f.Store(DoorbellRegister, 0x11223344); err != nil {
		t.Fatal(err)
	}
	if err := f.Store(State, 0xa5a5a5a5); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 64)
	copy(want[8+0x0c:], []byte{0x44, 0x33, 0x22, 0x11, 0xa5, 0xa5, 0xa5, 0xa5})
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("in the file: % x, %v, want % x", got, err, want)
	}
	if v, err := f.Load(State); v != 0xa5a5a5a5 || err != nil {
		t.Errorf("State: %#x, %v", v, err)
	}
	for _, r := range []Register{2, 0x20, 0x1e} {
		if _, err := f.Load(r); err == nil || !strings.Contains(err.Error(), "aligned offset below 20h") {
			t.Errorf("load at %#x: %v", uint16(r), err)
		}
		if err := f.Store(r, 1); err == nil {
			t.Errorf("store at %#x: no error", uint16(r))
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Load(ID); !errors.Is(err, os.ErrClosed) {
		t.Errorf("load after Close: %v, want os.ErrClosed", err)
	}
	if err := f.Store(State, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("store after Close: %v, want os.ErrClosed", err)
	}
}

func TestFileRefused(t *testing.T) {
	if _, err := OpenFile(0, 0, 16); err == nil || !strings.Contains(err.Error(), "at least 20 bytes") {
		t.Errorf("a region of 16 bytes: %v", err)
	}
	if _, err := OpenFile(1<<20, 0, 32); !errors.Is(err, syscall.EBADF) {
		t.Errorf("no file: %v", err)
	}
}
