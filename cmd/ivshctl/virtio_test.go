package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio/entropy"
)

// nbdClient is a client of NBD, from its protocol document:
//
//	nbd PATH size
//	nbd PATH read OFFSET LENGTH
//	nbd PATH write OFFSET FILE       (and flush)
func nbdClient() {
	if err := talkNBD(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func talkNBD(path string, args []string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	be := binary.BigEndian
	answer := make([]byte, 18+10)
	if _, err := io.ReadFull(c, answer[:18]); err != nil {
		return err
	}
	// FIXED_NEWSTYLE and NO_ZEROES; NBD_OPT_EXPORT_NAME of the default export.
	c.Write([]byte("\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00"))
	if _, err := io.ReadFull(c, answer[18:]); err != nil {
		return err
	}
	request := func(kind uint16, offset, length uint64, data []byte) ([]byte, error) {
		q := be.AppendUint32(nil, 0x25609513)
		q = be.AppendUint16(be.AppendUint16(q, 0), kind)
		q = be.AppendUint64(be.AppendUint64(q, 77), offset)
		c.Write(append(be.AppendUint32(q, uint32(length)), data...))
		reply := make([]byte, 16)
		if _, err := io.ReadFull(c, reply); err != nil {
			return nil, err
		}
		if be.Uint32(reply) != 0x67446698 || be.Uint64(reply[8:]) != 77 {
			return nil, fmt.Errorf("reply %x", reply)
		}
		if e := be.Uint32(reply[4:]); e != 0 {
			return nil, fmt.Errorf("error %d", e)
		}
		if kind != 0 {
			return nil, nil
		}
		data = make([]byte, length)
		_, err := io.ReadFull(c, data)
		return data, err
	}
	var offset uint64
	if len(args) > 1 {
		if offset, err = strconv.ParseUint(args[1], 0, 64); err != nil {
			return err
		}
	}
	switch args[0] {
	case "size":
		fmt.Printf("%d bytes, flags %#x\n", be.Uint64(answer[18:]), be.Uint16(answer[26:]))
	case "read":
		n, err := strconv.ParseUint(args[2], 0, 32)
		if err != nil {
			return err
		}
		data, err := request(0, offset, n, nil)
		if err != nil {
			return err
		}
		os.Stdout.Write(data)
	case "write":
		data, err := os.ReadFile(args[2])
		if err != nil {
			return err
		}
		if _, err := request(1, offset, uint64(len(data)), data); err != nil {
			return err
		}
		if _, err := request(3, 0, 0, nil); err != nil {
			return err
		}
	}
	return nil
}

// readEntropy writes random bytes of the peer: `read-entropy DEVICE N`.
func readEntropy() {
	n, err := strconv.ParseInt(os.Args[2], 0, 64)
	if err == nil {
		err = copyEntropy(os.Args[1], n)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func copyEntropy(device string, n int64) error {
	d, err := ivshmem.Open(device)
	if err != nil {
		return err
	}
	defer d.Close()
	s, err := entropy.Open(context.Background(), d)
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = io.CopyN(os.Stdout, s, n)
	return err
}
