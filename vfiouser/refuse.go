package vfiouser

import (
	"fmt"
	"io"
	"net"
	"time"

	"github.com/ivshmem-go/ivshmem/vfiouser/internal/wire"
	"golang.org/x/sys/unix"
)

// Refuse turns away a client: it waits for the client's VERSION message, at
// most DefaultTimeout, answers it with errno, and closes conn, which it takes
// over in any case. EBUSY is the usual answer to one client too many. Unlike
// Serve it costs no thread while it waits.
func Refuse(conn *net.UnixConn, errno unix.Errno) error {
	return refuse(conn, errno, DefaultTimeout)
}

func refuse(conn *net.UnixConn, errno unix.Errno, timeout time.Duration) error {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	// Descriptors that a plain read does not ask for are dropped by the kernel.
	var b [wire.MaxVersionMessage]byte
	if _, err := io.ReadFull(conn, b[:wire.HeaderSize]); err != nil {
		return fmt.Errorf("vfio-user client to be refused: %w", err)
	}
	h, _ := wire.DecodeHeader(b[:])
	if h.Flags&wire.NoReply != 0 {
		return nil
	}
	// The payload is of no interest, but a client may still be sending it.
	if h.Flags&wire.TypeMask == wire.TypeCommand && h.Size > wire.HeaderSize && h.Size <= wire.MaxVersionMessage {
		if _, err := io.ReadFull(conn, b[wire.HeaderSize:h.Size]); err != nil {
			return fmt.Errorf("vfio-user client to be refused: %w", err)
		}
	}
	wire.Header{
		ID: h.ID, Command: h.Command, Size: wire.HeaderSize,
		Flags: wire.TypeReply | wire.Error, Errno: uint32(errnoOf(errno)),
	}.Put(b[:])
	_, err := conn.Write(b[:wire.HeaderSize])
	return err
}
