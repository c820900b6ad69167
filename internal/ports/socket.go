package ports

import (
	"context"
	"errors"
	"io"
	"net"

	"github.com/ivshmem-go/ivshmem/internal/sockpath"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// Door makes a port into something that any program can open.
type Door struct {
	Port *console.Port
	// Path is where: of a socket, or of a symbolic link to a terminal or a
	// device. A terminal or device may do without.
	Path string
	// Resize tells the other side the size of a terminal, if this side can.
	Resize func(*console.Port, console.Size) error
	// Ready is told when the port can be opened, and where.
	Ready func(path string)
	// Gone is told when a device cannot be opened any more, as the port is gone,
	// although a program may have it open. nil: nobody.
	Gone func()
	// Left is told when a program has left.
	Left func()
	// Failed is told what one program met. nil: nobody.
	Failed func(error)
	// Cache says that what a program left unread is for the next one.
	Cache bool

	kept []byte
}

func (d *Door) failed(err error) {
	if d.Failed != nil {
		d.Failed(err)
	}
}

// visit is a program's time on the port.
func (d *Door) visit(ctx context.Context, c client, stay func() bool) error {
	err := visit{port: d.Port, client: c, kept: &d.kept, stay: stay}.join(ctx)
	if !d.Cache {
		d.kept = nil
	}
	if d.Left != nil {
		d.Left()
	}
	return err
}

// Socket listens on a Unix stream socket until the context ends, or the port is
// gone. One program at a time is connected; a second one's connection is closed
// at once.
//
// A program that connects opens the port. When the other side closes it, the
// program reads what came before, and then the end of file. A program may shut
// its own direction down and go on reading.
func (d *Door) Socket(ctx context.Context) error {
	l, err := sockpath.Listen(d.Path)
	if err != nil {
		return err
	}
	d.Ready(d.Path)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var current *net.UnixConn
	var ended chan struct{}
	err = sockpath.Accept(ctx, l, d.failed, func(conn *net.UnixConn) {
		if current != nil && !over(ctx, current, ended) {
			conn.Close()
			if ctx.Err() == nil {
				d.failed(errors.New("a second program was refused: one at a time has the port open"))
			}
			return
		}
		current, ended = conn, make(chan struct{})
		go func(conn *net.UnixConn, ended chan struct{}) {
			err := d.visit(ctx, conn, nil)
			close(ended)
			farewell(conn)
			if err != errLeft && err != errHangUp {
				cancel(err)
			}
		}(current, ended)
	})
	cancel(nil)
	if ended != nil {
		<-ended
	}
	if err == nil {
		err = context.Cause(ctx)
	}
	return err
}

// over reports whether a program's time is over, and waits for it where the
// program has left already.
func over(ctx context.Context, conn *net.UnixConn, ended <-chan struct{}) bool {
	left := false
	if raw, err := conn.SyscallConn(); err == nil {
		left, _ = poll(raw)
	}
	if left {
		select {
		case <-ended:
			return true
		case <-ctx.Done():
			return false
		}
	}
	select {
	case <-ended: // before conn was closed
		return true
	default:
		return false
	}
}

// farewell closes a connection so that the program reads what it was sent, and
// then the end of file: if it had said something that nobody read it would get
// an error in its place.
func farewell(conn *net.UnixConn) {
	conn.CloseWrite()
	conn.CloseRead()
	io.Copy(io.Discard, conn)
	conn.Close()
}
