package ports

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/ivshmem-go/ivshmem/internal/cuse"
)

// maxTwins is how many devices may have the same name but for a number behind it.
const maxTwins = 100

// Char makes a character device, and Path a link to it, until the context ends,
// or the port is gone and the device closed.
func (d *Door) Char(ctx context.Context) error { return d.node(ctx, cuse.Serve) }

// node is Char with a device that serve makes.
func (d *Door) node(ctx context.Context, serve func(context.Context, cuse.Config) error) error {
	unlink := func() {}
	defer func() { unlink() }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	name := nodeName(filepath.Base(d.Path), d.Port.ID())
	try := name
	ready := func() {
		if err := d.link("/dev/" + try); err != nil {
			cancel(err)
			return
		}
		unlink = sync.OnceFunc(func() { os.Remove(d.Path) })
	}
	gone := func() {
		unlink()
		if d.Gone != nil {
			d.Gone()
		}
	}
	err := fs.ErrExist
	// Another directory may have such a port, or a program one that was removed.
	for twin := 2; errors.Is(err, fs.ErrExist) && twin <= maxTwins; twin++ {
		err = serve(ctx, cuse.Config{Name: try, Port: d.Port, Ready: ready, Gone: gone, Left: d.Left})
		if errors.Is(err, fs.ErrExist) {
			try = fmt.Sprintf("%s-%d", name, twin)
		}
	}
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
