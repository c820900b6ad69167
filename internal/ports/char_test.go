package ports

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/ivshmem-go/ivshmem/internal/cuse"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// A character device's life is told: where it is, that a program has left it,
// and that it is gone.
func TestCharTold(t *testing.T) {
	t.Parallel()
	b := newBoth(t, console.Config{}, Config{}, log)
	p, err := b.driver.WaitPort(b.ctx, "log")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(tempDir(t), "log")
	var ready, left, gone int
	d := &Door{Port: p, Path: path, Ready: func(string) { ready++ }, Left: func() { left++ }, Gone: func() { gone++ }}
	told := func(want ...int) {
		t.Helper()
		if ready != want[0] || left != want[1] || gone != want[2] {
			t.Errorf("told ready %d, left %d, gone %d times, want %d", ready, left, gone, want)
		}
	}
	end := errors.New("end")
	err = d.node(b.ctx, func(_ context.Context, c cuse.Config) error {
		if c.Name == "ivport-log" {
			return fs.ErrExist
		}
		c.Ready()
		told(1, 0, 0)
		if to, err := os.Readlink(path); err != nil || to != "/dev/ivport-log-2" {
			t.Error(to, err)
		}
		c.Left()
		told(1, 1, 0)
		c.Gone()
		told(1, 1, 1)
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		return end
	})
	if err != end {
		t.Error(err)
	}
}
