package ports

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/ivshmem-go/ivshmem/internal/cuse"
)

// Char makes a character device, and Path a link to it, until the context ends,
// or the port is gone.
func (d *Door) Char(ctx context.Context) error {
	linked := false
	defer func() {
		if linked {
			os.Remove(d.Path)
		}
	}()
	name := nodeName(filepath.Base(d.Path), d.Port.ID())
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := cuse.Serve(ctx, cuse.Config{Name: name, Port: d.Port, Ready: func() {
		err := d.link("/dev/" + name)
		linked = err == nil
		if err != nil {
			cancel(err)
		}
	}})
	if err == nil {
		err = context.Cause(ctx)
	}
	return err
}

// nodeName is the name of the device for a file of that name.
func nodeName(file string, id uint32) string {
	name := strings.Map(func(r rune) rune {
		if strings.ContainsRune("%=,~#", r) {
			return '_'
		}
		return r
	}, file)
	if name != file {
		name = fmt.Sprintf("%s-%d", name, id) // others may get alike by that
	}
	return "ivport-" + name
}
