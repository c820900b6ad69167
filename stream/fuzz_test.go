package stream_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/boardtest"
	"github.com/ivshmem-go/ivshmem/stream"
)

// FuzzPeerMemory writes arbitrary words to a peer's area, a piece at a time,
// while an endpoint listens, dials, and uses a connection. A piece is a byte of
// flags (1: ring; 2: State to and fro; 4: let the endpoint have a look), a byte
// of length in words, two of position in words, and the words.
func FuzzPeerMemory(f *testing.F) {
	const area = 4096
	s := shape{4, 9, 4}
	piece := func(flags byte, at uint64, words ...uint64) []byte {
		b := binary.LittleEndian.AppendUint16([]byte{flags, byte(len(words))}, uint16(at/8))
		for _, w := range words {
			b = binary.LittleEndian.AppendUint64(b, w)
		}
		return b
	}
	const blocks = 128 + 8*16
	const rings = blocks + 4*128
	f.Add([]byte{})
	f.Add(piece(7, 8, 0))
	f.Add(piece(5, 16, shape{1, 10, 5}.word()))
	f.Add(piece(5, rings, 8|1<<32|end, 1))
	f.Add(piece(5, rings, 24|1<<32|packed, 8, 1, 8))
	f.Add(append(piece(0, rings, 16|1<<32, 1, 2, 480|1<<32|padding), piece(5, rings, 16|1<<32, 1, 2)...))
	f.Add(piece(5, rings, last|1<<32))
	f.Add(piece(5, blocks+64, 1<<40))
	f.Add(piece(5, blocks+32, 1, 1))
	f.Add(append(piece(0, 128, 0, 1, 2, 3), piece(5, 64, 1<<40)...))
	f.Add(append(piece(0, blocks+128, 77, 1, 7<<32, 1), piece(5, 64, 5)...))
	f.Add(piece(5, blocks, 0))
	f.Fuzz(func(t *testing.T, data []byte) {
		b := boardtest.New(t, boardtest.Config{Peers: 2, Vectors: 2, Output: area})
		d := b.Device(t, 0, boardtest.Apart)
		ep, err := stream.New(d, stream.Config{Mode: stream.Sleep, Ring: 512})
		if err != nil {
			t.Fatal(err)
		}
		defer ep.Close()
		m := newModel(t, b.Device(t, 1, boardtest.Apart), s).start()
		conn, _ := accept(t, ep, m, 0)
		var all sync.WaitGroup
		check := func(err error) {
			var v *stream.ViolationError
			for _, e := range []error{io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, os.ErrDeadlineExceeded, context.Canceled, syscall.ECONNRESET, syscall.EPIPE,
				syscall.ECONNREFUSED, syscall.EHOSTUNREACH, stream.ErrProtocol, stream.ErrTooMany} {
				if errors.Is(err, e) {
					return
				}
			}
			if !errors.As(err, &v) {
				t.Error(err)
			}
		}
		use := func(c *stream.Conn, how int) {
			var both sync.WaitGroup
			both.Go(func() {
				p := make([]byte, 100)
				for {
					var err error
					switch how % 3 {
					case 0:
						_, err = c.Read(p)
					case 1:
						if _, err = c.Receive(p); errors.Is(err, io.ErrShortBuffer) {
							err = nil
						}
					case 2:
						if _, _, err = c.UnsafePeek(); err == nil {
							err = c.UnsafeRelease()
						}
					}
					if err != nil {
						check(err)
						return
					}
				}
			})
			both.Go(func() {
				for {
					if _, err := c.Write(make([]byte, 100)); err != nil {
						check(err)
						return
					}
				}
			})
			both.Wait()
			c.Close()
		}
		how := 0
		if len(data) > 0 {
			how = int(data[0] >> 4)
		}
		l, err := ep.Listen(7)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		all.Go(func() { use(conn, how) })
		all.Go(func() {
			for {
				c, err := l.AcceptStream()
				if err != nil {
					check(err)
					return
				}
				all.Go(func() { use(c, how) })
			}
		})
		all.Go(func() {
			c, err := ep.Dial(ctx, 1, 9)
			if err != nil {
				check(err)
				return
			}
			use(c, how)
		})
		for len(data) >= 4 {
			flags, n, at := data[0], int(data[1]), uint64(binary.LittleEndian.Uint16(data[2:]))
			data = data[4:]
			for ; n > 0 && len(data) >= 8; n-- {
				store(m.own, at%(area/8)*8, binary.LittleEndian.Uint64(data))
				data = data[8:]
				at++
			}
			if flags&1 != 0 {
				m.dev.Ring(0, int(flags>>3&1))
			}
			if flags&2 != 0 {
				m.setState(0)
				m.setState(m.epoch)
			}
			if flags&4 != 0 {
				for range 10 {
					runtime.Gosched()
				}
			}
		}
		m.setState(0)
		hung := time.AfterFunc(20*time.Second, func() {
			p := make([]byte, 1<<20)
			panic("somebody hangs\n" + string(p[:runtime.Stack(p, true)]))
		})
		l.Close()
		cancel()
		all.Wait()
		free(t, m.look(0))
		hung.Stop()
	})
}
