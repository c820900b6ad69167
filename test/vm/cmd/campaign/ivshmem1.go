package main

import (
	"encoding/binary"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// v1Server is a server for QEMU's ivshmem-doorbell devices (QEMU,
// ivshmem-spec, "Client-Server Protocol"): to each client it sends 8-byte
// little-endian numbers, some with a descriptor, and takes nothing. Clients
// come and stay; none is told of one that has gone.
type v1Server struct {
	memory   int // the shared memory's file
	vectors  int
	listener *net.UnixListener

	mu       sync.Mutex
	clients  []*net.UnixConn // by ID
	eventfds [][]int         // by ID and vector
}

func serveV1(path string, size int64, vectors int) (*v1Server, error) {
	fd, err := unix.MemfdCreate("ivshmem-v1", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	s := &v1Server{memory: fd, vectors: vectors}
	if err := unix.Ftruncate(fd, size); err != nil {
		s.close()
		return nil, err
	}
	if s.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
		s.close()
		return nil, err
	}
	go func() {
		for {
			conn, err := s.listener.AcceptUnix()
			if err != nil {
				return
			}
			if s.welcome(conn) != nil {
				conn.Close()
			}
		}
	}()
	return s, nil
}

func (s *v1Server) welcome(conn *net.UnixConn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := len(s.clients)
	var own []int
	for range s.vectors {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return err
		}
		own = append(own, fd)
	}
	s.clients, s.eventfds = append(s.clients, conn), append(s.eventfds, own)
	const version, memory = 0, -1
	for _, m := range []struct{ number, fd int }{{version, -1}, {id, -1}, {memory, s.memory}} {
		if err := sendV1(conn, m.number, m.fd); err != nil {
			return err
		}
	}
	for other, client := range s.clients {
		for v := range s.vectors {
			if other != id {
				if err := sendV1(client, id, own[v]); err != nil {
					return err
				}
			}
			// The own eventfds come last, as it is the last of the clients.
			if err := sendV1(conn, other, s.eventfds[other][v]); err != nil {
				return err
			}
		}
	}
	return nil
}

func sendV1(conn *net.UnixConn, number, fd int) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_, _, err := conn.WriteMsgUnix(binary.LittleEndian.AppendUint64(nil, uint64(number)), oob, nil)
	return err
}

func (s *v1Server) close() {
	if s.listener != nil {
		s.listener.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, c := range s.clients {
		c.Close()
		for _, fd := range s.eventfds[id] {
			unix.Close(fd)
		}
	}
	unix.Close(s.memory)
}
