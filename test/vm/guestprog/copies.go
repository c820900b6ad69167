package main

import (
	"bytes"
	"context"
	"fmt"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// copies writes and reads the own output section at every alignment and length
// of interest, through whatever back end the device has. On arm64 a BAR that
// is mapped as device memory faults at any unaligned access.
func copies(_ context.Context, args []string) (any, error) {
	address := ""
	if len(args) > 0 {
		address = args[0]
	}
	dev, err := ivshmem.Open(address)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	n, err := copyAll(dev.Sections().Output)
	return map[string]any{"back_end": dev.Driver(), "copies": n}, err
}

func copyAll(s *shmem.ReadWrite) (n int, err error) {
	const window = 512
	pattern, guard, got := make([]byte, window), bytes.Repeat([]byte{0xa5}, window), make([]byte, window)
	for i := range pattern {
		pattern[i] = byte(i*7 + 1)
	}
	for offset := range 16 {
		for length := 0; length <= 256; length++ {
			if length > 80 && length%16 > 2 {
				continue
			}
			for source := range 8 {
				if _, err := s.WriteAt(guard, 0); err != nil {
					return n, err
				}
				p := pattern[source : source+length]
				at := 64 + offset
				if _, err := s.WriteAt(p, int64(at)); err != nil {
					return n, err
				}
				// The bytes around must be as they were.
				if _, err := s.ReadAt(got, 0); err != nil {
					return n, err
				}
				if !bytes.Equal(got[at:at+length], p) || !bytes.Equal(got[:at], guard[:at]) || !bytes.Equal(got[at+length:], guard[at+length:]) {
					return n, fmt.Errorf("%d bytes at offset %d, from alignment %d: what was read is not what was written", length, offset, source)
				}
				if _, err := s.ReadAt(got[source:source+length], int64(at)); err != nil {
					return n, err
				}
				if !bytes.Equal(got[source:source+length], p) {
					return n, fmt.Errorf("%d bytes at offset %d, to alignment %d: what was read is not what was written", length, offset, source)
				}
				n++
			}
		}
	}
	return n, nil
}
