package vnet_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/ivshmem-go/ivshmem/vnet"
)

// A fuzzed peer does things to its section, one after the other: an operation,
// a position in words of 32 bits, and a word.
const (
	opWord   = iota // store the word
	opIndex         // move the index of available frames
	opUsed          // move the index of used frames
	opState         // set the State
	opRing          // ring a vector
	opLook          // let the other receive and send
	opSend          // send a frame that is one
	opReturn        // return a frame as it should be
	ops
)

func op(op byte, at, word uint32) []byte {
	b := binary.LittleEndian.AppendUint16([]byte{op}, uint16(at/4))
	return binary.LittleEndian.AppendUint32(b, word)
}

func join(ops ...[]byte) (all []byte) {
	for _, o := range ops {
		all = append(all, o...)
	}
	return all
}

// known checks an error of a link whose peer is hostile.
func known(t *testing.T, err error) {
	t.Helper()
	var v *vnet.ViolationError
	for _, e := range []error{vnet.ErrNoCarrier, vnet.ErrReset, context.Canceled, io.ErrShortBuffer} {
		if errors.Is(err, e) {
			return
		}
	}
	if err != nil && (!errors.As(err, &v) || v.Field == "" || v.Bound == "") {
		t.Fatal(err)
	}
}

// fuzz plays what a peer does, lets the link look now and then, and checks
// that it works with a peer that behaves afterwards.
func fuzz(t *testing.T, data []byte, look func(l *vnet.Link)) {
	const output = 0x1000
	l, r := against(t, output, vnet.Config{})
	for len(data) >= 7 && len(data) < 7*300 {
		at, word := uint64(binary.LittleEndian.Uint16(data[1:]))*4%output, binary.LittleEndian.Uint32(data[3:])
		switch data[0] % ops {
		case opWord:
			put32(r.own, at, word)
		case opIndex:
			put16(r.own, r.avail+2, get16(r.own, r.avail+2)+uint16(word))
		case opUsed:
			put16(r.own, r.used+2, get16(r.own, r.used+2)+uint16(word))
		case opState:
			r.setState(word)
		case opRing:
			r.dev.Ring(0, int(word&1))
		case opSend:
			r.sent = uint64(get16(r.own, r.avail+2))
			r.send(frame(14+int(word%2000), 1))
		case opReturn:
			r.completed = uint64(get16(r.own, r.used+2))
			r.complete(uint32(get16(r.other, r.avail+4+2*(r.completed%r.n))), 1)
		case opLook:
			look(l)
		}
		data = data[7:]
	}
	look(l)
	r.start()
	carrier(t, true, l)
	if n := l.Stats(); n.State != vnet.StateRun {
		t.Errorf("%+v", n)
	}
	works(t, l, r)
}

// FuzzReceive fuzzes what a receiver reads.
func FuzzReceive(f *testing.F) {
	frame := func(addr, n, flags uint32) []byte {
		return join(op(opWord, 0, addr), op(opWord, 8, n), op(opWord, 12, flags), op(opIndex, 0, 1), op(opLook, 0, 0))
	}
	f.Add([]byte{})
	f.Add(join(op(opSend, 0, 60), op(opLook, 0, 0)))
	f.Add(frame(0x700, 60, 0))
	f.Add(frame(0x6ff, 60, 0))
	f.Add(frame(0xfff, 1<<31, 0))
	f.Add(frame(0x700, 60, 1))
	f.Add(join(op(opWord, 0x204, 32), op(opIndex, 0, 32), op(opLook, 0, 0)))
	f.Add(join(op(opIndex, 0, 33), op(opLook, 0, 0)))
	f.Add(join(op(opIndex, 0, 40000), op(opRing, 0, 1), op(opLook, 0, 0), op(opState, 0, 0), op(opState, 0, 1), op(opState, 0, 2)))
	f.Add(join(op(opSend, 0, 60), op(opState, 0, 0), op(opSend, 0, 60), op(opLook, 0, 0), op(opState, 0, 77)))
	f.Fuzz(func(t *testing.T, data []byte) {
		p := make([]byte, 1000)
		fuzz(t, data, func(l *vnet.Link) {
			for range 3 {
				n, err := l.Receive(canceled(), p)
				if known(t, err); err == nil && n < 14 {
					t.Fatalf("a frame of %d bytes", n)
				}
				got, err := l.UnsafePeek(canceled())
				if known(t, err); err == nil && (len(got) < 14 || len(got) > 0x1000-0x700) {
					t.Fatalf("a frame of %d bytes", len(got))
				}
				if len(got) > 0 {
					copy(p, got)
					known(t, l.UnsafeRelease())
				}
			}
		})
	})
}

// FuzzCompletions fuzzes what a sender reads.
func FuzzCompletions(f *testing.F) {
	f.Add([]byte{})
	f.Add(join(op(opLook, 0, 0), op(opReturn, 0, 0), op(opReturn, 0, 0), op(opLook, 0, 0)))
	f.Add(join(op(opLook, 0, 0), op(opUsed, 0, 1), op(opLook, 0, 0)))
	f.Add(join(op(opLook, 0, 0), op(opWord, 0x284, 1), op(opWord, 0x288, 1), op(opUsed, 0, 1), op(opLook, 0, 0)))
	f.Add(join(op(opLook, 0, 0), op(opUsed, 0, 65535), op(opLook, 0, 0), op(opState, 0, 0)))
	f.Add(join(op(opLook, 0, 0), op(opState, 0, 0), op(opReturn, 0, 0), op(opState, 0, 3), op(opLook, 0, 0)))
	f.Fuzz(func(t *testing.T, data []byte) {
		fuzz(t, data, func(l *vnet.Link) {
			for i := range 40 {
				known(t, l.Send(canceled(), frame(60+i, i)))
			}
			p, err := l.UnsafeReserve(canceled())
			known(t, err)
			if err == nil {
				known(t, l.UnsafeCommit(len(p)))
				l.Flush()
			}
		})
	})
}
