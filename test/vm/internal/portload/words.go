// Package portload moves numbered data through named ports, and checks it: as
// plain streams of words, and as records that two programs acknowledge while
// what carries them is killed.
package portload

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
)

// Stream is the number of a stream: that of a port's name, from one of its two
// ends.
func Stream(name string, end int) uint32 {
	return crc32.ChecksumIEEE(fmt.Appendf(nil, "%s %d", name, end))
}

// word is a number of a stream: no other stream, and no other place of it, has
// the same.
func word(stream uint32, number uint64) uint64 {
	return (uint64(stream)<<32 | number&0xffffffff) * 0x9e3779b97f4a7c15
}

// Fill fills b, a multiple of 8 bytes, with the words of a stream from a number on.
func Fill(b []byte, stream uint32, number uint64) {
	for at := 0; at < len(b); at += 8 {
		binary.LittleEndian.PutUint64(b[at:], word(stream, number))
		number++
	}
}

// Check checks what Fill filled.
func Check(b []byte, stream uint32, number uint64) error {
	for at := 0; at < len(b); at += 8 {
		if got, want := binary.LittleEndian.Uint64(b[at:]), word(stream, number); got != want {
			return fmt.Errorf("word %d of the stream: expected %#x, found %#x", number, want, got)
		}
		number++
	}
	return nil
}

// piece is how many bytes are written and read at a time.
const piece = 32 << 10

// Exchange sends size bytes, a multiple of 8, through one end of a port, and
// checks as many that come. Corrupt turns a bit over on the way.
func Exchange(rw io.ReadWriter, name string, end int, size int64, corrupt bool) error {
	wrote := make(chan error, 1)
	go func() { wrote <- send(rw, Stream(name, end), size, corrupt) }()
	if err := receive(rw, Stream(name, 1-end), size); err != nil {
		return err // who writes may wait for ever now
	}
	return <-wrote
}

func send(w io.Writer, stream uint32, size int64, corrupt bool) error {
	b := make([]byte, min(piece, size))
	for at := int64(0); at < size; at += int64(len(b)) {
		b = b[:min(int64(len(b)), size-at)]
		Fill(b, stream, uint64(at)/8)
		if corrupt && at == 0 {
			b[len(b)/2] ^= 1
		}
		if _, err := w.Write(b); err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", at, size, err)
		}
	}
	return nil
}

func receive(r io.Reader, stream uint32, size int64) error {
	b := make([]byte, min(piece, size))
	for at := int64(0); at < size; at += int64(len(b)) {
		b = b[:min(int64(len(b)), size-at)]
		if n, err := io.ReadFull(r, b); err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", at+int64(n), size, err)
		}
		if err := Check(b, stream, uint64(at)/8); err != nil {
			return err
		}
	}
	return nil
}
