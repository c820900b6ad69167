package virtio_test

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// A fuzzed peer does things one after the other: an operation, an offset in the
// section, and a value.
func op(op byte, at uint16, value uint64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16([]byte{op}, at), value)
}

func join(ops ...[]byte) (all []byte) {
	for _, o := range ops {
		all = append(all, o...)
	}
	return all
}

const opSize = 11

// steps calls f for each operation of data.
func steps(data []byte, f func(op byte, at, value uint64)) {
	for range 300 {
		if len(data) < opSize {
			return
		}
		f(data[0], uint64(binary.LittleEndian.Uint16(data[1:])), binary.LittleEndian.Uint64(data[3:]))
		data = data[opSize:]
	}
}

const (
	opWrite8 = iota // register writes
	opWrite16
	opWrite32
	opWrite64
	opAnnounce // without waiting for the last answer
	opState
	opRing
	opStore // to memory, whatever is there
	opsRegisters
)

// FuzzRegisters fuzzes what a back-end reads in the register block. Whatever a
// driver does, it gets its answers, and one that behaves is served afterwards.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{})
	f.Add(join(op(opWrite32, 0x44, 0), op(opWrite32, 0x44, 1), op(opWrite32, 0x44, 3), op(opWrite32, 0x18, 1), op(opWrite32, 0x14, 3), op(opWrite32, 0x44, 0xb),
		op(opWrite32, 0x1c, 0), op(opWrite16, 0x20, 8), op(opWrite64, 0x28, 0x1000), op(opWrite64, 0x30, 0x1080), op(opWrite64, 0x38, 0x10c0), op(opWrite16, 0x26, 1), op(opWrite32, 0x44, 0xf),
		op(opWrite32, 0x26, 0), op(opWrite32, 0x44, 0)))
	f.Add(join(op(opWrite32, 0x44, 0xf), op(opWrite32, 0x44, 0x8f), op(opWrite32, 0x44, 0x4f)))
	f.Add(join(op(opWrite32, 0x1c, 0xffffffff), op(opWrite16, 0x26, 1), op(opState, 0, 0), op(opState, 0, 1), op(opState, 0, 9)))
	f.Add(join(op(opAnnounce, 0xffff, 0), op(opAnnounce, 1, 0), op(opStore, 8, 0x44), op(opRing, 0, 0), op(opWrite64, 0x4c, 1), op(opWrite8, 0x57, 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBoard(t, protocol, hostileSection, 2)
		d := echo(8, 2)
		d.Config = make([]byte, 12)
		d.ConfigWritten = func(offset int, value []byte) {
			if offset < 0 || len(value) < 1 || len(value) > 8 || offset+len(value) > 12 {
				t.Errorf("configuration: %d bytes at %d", len(value), offset)
			}
		}
		s := serve(t, b.Device(t, 0, apart), d)
		l := frontEnd(t, b)
		steps(data, func(op byte, at, value uint64) {
			switch op %= opsRegisters; op {
			case opWrite8, opWrite16, opWrite32, opWrite64:
				width := uint64(1) << op
				if at%0x100 < 0x60 {
					at %= 0x100
				}
				at = at % (hostileSection - 8) &^ (width - 1)
				if at == 8 {
					return
				}
				if err := l.write(at, width, value); err == nil {
					l.idle()
				}
			case opAnnounce:
				put32(l.m, 8, uint32(at))
				l.ring(0)
			case opState:
				l.register(regs.State, uint32(value))
			case opRing:
				l.ring(uint16(at % 2))
			case opStore:
				put32(l.m, at%0x60, uint32(value))
				l.ring(0) // it may be a register write
			}
		})
		recovers(t, l, s, modern)
	})
}

// recovers checks that a driver that behaves is served.
func recovers(t *testing.T, l *linux, s served, features uint64) {
	t.Helper()
	// A mark shows that the block is a new one, once the back-end has seen this
	// driver.
	until(t, "an answer", func() bool {
		l.register(regs.State, 0)
		until(t, "the back-end is ready", l.ready)
		l.register(regs.State, 1)
		return l.write(0x1c, 4, 0) == nil && l.idle() == nil
	})
	put32(l.m, 0x18, 0x600d)
	l.register(regs.State, 0)
	until(t, "the back-end is ready for the next driver", func() bool { return get32(l.m, 0x18) == 0 && l.ready() })
	l.register(regs.State, 1)
	l.works(features)
	if err := s.stop(); err != nil {
		t.Error(err)
	}
}

const (
	opWord = iota // store to descriptors, rings or buffers
	opDescribe
	opPublish // make a head available, and ring
	opIndex   // move the index
	opKick
	opReset
	opsDriver
)

// FuzzDriver fuzzes the rings and descriptors of a driver: a device reads and
// writes what the driver says, where that may be, and asks for a reset otherwise.
func FuzzDriver(f *testing.F) {
	// A descriptor's value: address 16 bits, length 16, flags 16, next 16.
	describe := func(id uint16, at, n, flags, next uint64) []byte {
		return op(opDescribe, id, at|n<<16|flags<<32|next<<48)
	}
	f.Add([]byte{})
	f.Add(join(describe(0, 0x1800, 8, 1, 1), describe(1, 0x1900, 8, 2, 0), op(opPublish, 0, 0), op(opPublish, 0, 0)))
	f.Add(join(describe(0, 0x1000, 256, 1, 1), describe(1, 0x1000, 256, 2, 0), op(opPublish, 0, 0))) // over the rings themselves
	f.Add(join(describe(0, 0x1800, 8, 1, 0), op(opPublish, 0, 0), op(opReset, 0, 0), op(opIndex, 0, 9), op(opKick, 0, 0)))
	f.Add(join(describe(0, 0x1000, 32, 4, 0), describe(1, 0x1800, 4, 0, 0), op(opPublish, 0, 0)))
	f.Add(join(op(opWord, 0x10c2, 0xffff), describe(0, 0x1f00, 0x100, 3, 7), describe(7, 0x50, 4, 2, 0), op(opPublish, 0, 0)))
	f.Fuzz(func(t *testing.T, data []byte) {
		features := uint64(modern | 3<<28)
		if len(data)%2 == 1 {
			features = modern
		}
		b := newBoard(t, protocol, hostileSection, 2)
		s := serve(t, b.Device(t, 0, apart), echo(8))
		l := hostile(t, b, features)
		index := uint16(0)
		steps(data, func(op byte, at, value uint64) {
			switch op % opsDriver {
			case opWord:
				put32(l.m, 0x1000+at%0x1000, uint32(value))
			case opDescribe:
				l.describe(hostileDesc, at%8, value&0xffff, uint32(value>>16&0xffff), uint16(value>>32), uint16(value>>48))
			case opPublish:
				put16(l.m, hostileAvail+4+2*uint64(index%8), uint16(at))
				index++
				put16(l.m, hostileAvail+2, index)
				l.ring(1)
			case opIndex:
				index += uint16(value)
				put16(l.m, hostileAvail+2, index)
			case opKick:
				l.ring(1)
			case opReset:
				l.play(features)
				index = 0
			}
		})
		l.put(0x1c, 4, 0) // it answers
		if status := get32(l.m, 0x44); status != 0xf && status != 0x4f {
			t.Errorf("status %#x", status)
		}
		if !l.quiet() {
			t.Error("the register block was written by the device")
		}
		recovers(t, l, s, features)
	})
}

// quiet reports whether the constant registers are what they were.
func (l *linux) quiet() bool { return get32(l.m, 0) == 1 && get32(l.m, 4) == 0x50 }

const (
	opUsed  = iota // a used entry, and the index
	opWords        // store to the rings
	opAdd
	opTake
	opConfig
	opsDevice
)

// FuzzDevice fuzzes the used ring and the block that a driver reads: it gets
// buffers that it added, no longer than they are, or a violation.
func FuzzDevice(f *testing.F) {
	f.Add([]byte{})
	f.Add(join(op(opAdd, 0, 0), op(opUsed, 0, 10), op(opTake, 0, 0), op(opAdd, 0, 0)))
	f.Add(join(op(opAdd, 0, 0), op(opAdd, 0, 0), op(opUsed, 5, 10), op(opTake, 0, 0)))
	f.Add(join(op(opAdd, 0, 0), op(opUsed, 0, 1<<31), op(opTake, 0, 0)))
	f.Add(join(op(opWords, 0x102, 0xffff), op(opTake, 0, 0), op(opConfig, 0x40, 1), op(opTake, 0, 0)))
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBoard(t, protocol, 0x4000, 2)
		e := newExample(t, b, 1, make([]byte, 12), func(int, []exampleSegment) uint32 { return 0 })
		e.low = uint32(len(data)%4) << 28
		d, queues := started(t, b, apart, 8)
		e.hung.Store(true)
		q := queues[0]
		used, index := uint64(get32(b.ReadWrite(), 0x38)), uint16(0)
		out := map[*virtio.Buffer]int{}
		steps(data, func(op byte, at, value uint64) {
			switch op % opsDevice {
			case opUsed:
				put32(b.ReadWrite(), used+4+8*uint64(index%8), uint32(at))
				put32(b.ReadWrite(), used+8+8*uint64(index%8), uint32(value))
				index++
				put16(b.ReadWrite(), used+2, index)
			case opWords:
				put32(b.ReadWrite(), 0x80+at%0x400, uint32(value))
			case opConfig:
				put32(b.ReadWrite(), at%0x58, uint32(value))
			case opAdd:
				buf, err := d.Alloc(100)
				if err != nil {
					return
				}
				n := 1 + int(at%90)
				if err = q.Add(buf, virtio.Out(0, 4), virtio.In(4, n), virtio.In(4, 1)); err == nil {
					out[buf] = n + 1
				} else if !errors.Is(err, virtio.ErrQueueFull) {
					ended(t, err)
				}
				if err := q.Kick(); err != nil {
					ended(t, err)
				}
			case opTake:
				buf, n, err := q.TryNext()
				if err != nil {
					ended(t, err)
				}
				if buf == nil {
					return
				}
				most, ok := out[buf]
				if !ok || n < 0 || n > most {
					t.Errorf("%d bytes of a buffer of %d", n, most)
				}
				delete(out, buf)
			}
		})
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// ended checks why a driver ended.
func ended(t *testing.T, err error) {
	t.Helper()
	var v *virtio.ViolationError
	if !errors.As(err, &v) && !errors.Is(err, virtio.ErrNeedsReset) {
		t.Error(err)
	}
}
