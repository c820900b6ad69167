package virtio_test

import (
	"encoding/binary"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/ivshmem-go/ivshmem/regs"
)

// A model of the page's example back-ends, from the page alone: they announce
// vectors that the link may not have, never look at what the driver accepted,
// serve while the status is exactly 0F, and know no suppression.

type example struct {
	testing.TB
	b        *board
	p        *boardPeer
	m        []byte
	low      uint32 // offered features
	size     uint16 // of each queue
	config   []byte
	handle   func(q int, segments []exampleSegment) uint32 // returns used.len
	queues   []exampleQueue
	selected uint32
	quiet    uint64      // bits of queues that it does not interrupt for
	idle     uint64      // bits of queues that it leaves alone
	hung     atomic.Bool // answers nothing
	stop     atomic.Bool
	ended    chan struct{}
}

type exampleSegment struct {
	at    uint64
	n     uint32
	write bool
}

type exampleQueue struct {
	shadow [32]byte // registers 20h to 3Fh
	on     bool
	last   uint16
}

// newExample starts a back-end with so many queues.
func newExample(t testing.TB, b *board, queues int, config []byte, handle func(q int, s []exampleSegment) uint32) *example {
	e := &example{TB: t, b: b, m: b.ReadWrite(), size: 8, config: config, handle: handle,
		p: b.Attach(t, 0, apart), queues: make([]exampleQueue, queues), ended: make(chan struct{})}
	go e.run()
	t.Cleanup(e.end)
	return e
}

func (e *example) end() {
	if !e.stop.Swap(true) {
		<-e.ended
		e.p.Close()
	}
}

func (e *example) peerReady() bool { return e.b.State(1) == 1 }

func (e *example) run() {
	defer close(e.ended)
	defer func() { e.p.Store(regs.State, 0) }()
	e.p.Store(regs.InterruptControl, 1)
	for {
		e.p.Store(regs.State, 0)
		for e.b.State(1) != 0 {
			if e.pause() {
				return
			}
		}
		clear(e.m[:0x4c+len(e.config)])
		for i := range e.queues {
			e.queues[i] = exampleQueue{}
			binary.LittleEndian.PutUint16(e.queues[i].shadow[:], e.size)
			binary.LittleEndian.PutUint16(e.queues[i].shadow[2:], uint16(i+1))
		}
		e.selected = 0
		e.load()
		put32(e.m, 0, 1)
		put32(e.m, 4, uint32(0x4c+len(e.config)))
		copy(e.m[0x4c:], e.config)
		e.p.Store(regs.State, 1)
		for !e.peerReady() {
			if e.pause() {
				return
			}
		}
		for e.peerReady() {
			if e.pause() {
				return
			}
			if !e.hung.Load() {
				e.transaction()
				e.serve()
			}
		}
	}
}

// pause is the time between two looks, and reports whether it was the last.
func (e *example) pause() bool {
	runtime.Gosched()
	time.Sleep(10 * time.Microsecond)
	return e.stop.Load()
}

func (e *example) load() {
	for i := uint64(0); i < 32; i += 4 {
		put32(e.m, 0x20+i, binary.LittleEndian.Uint32(e.queues[e.selected].shadow[i:]))
	}
}

func (e *example) save() {
	for i := uint64(0); i < 32; i += 4 {
		binary.LittleEndian.PutUint32(e.queues[e.selected].shadow[i:], get32(e.m, 0x20+i))
	}
}

func (e *example) transaction() {
	at := get32(e.m, 8)
	switch at {
	case 0:
		return
	case 0x10:
		word := e.low
		if get32(e.m, 0x10) == 1 {
			word = 0x13
		}
		put32(e.m, 0x0c, word)
	case 0x1c:
		e.save()
		if sel := get32(e.m, 0x1c); int(sel) < len(e.queues) {
			e.selected = sel
		}
		e.load()
	case 0x26:
		e.save()
		e.queues[e.selected].on = get16(e.m, 0x26) == 1
	}
	put32(e.m, 8, 0)
}

func (e *example) serve() {
	if get32(e.m, 0x44) != 0xf {
		return
	}
	for i := range e.queues {
		q := &e.queues[i]
		if !q.on || e.idle>>i&1 != 0 {
			continue
		}
		le := binary.LittleEndian
		n := uint64(le.Uint16(q.shadow[:]))
		vector := le.Uint16(q.shadow[4:])
		desc, avail, used := le.Uint64(q.shadow[8:]), le.Uint64(q.shadow[16:]), le.Uint64(q.shadow[24:])
		for q.last != get16(e.m, avail+2) {
			head := get16(e.m, avail+4+2*(uint64(q.last)%n))
			var segments []exampleSegment
			for id := head; ; {
				d := desc + 16*uint64(id)
				flags := get16(e.m, d+12)
				segments = append(segments, exampleSegment{atomic.LoadUint64((*uint64)(unsafe.Pointer(&e.m[d]))), get32(e.m, d+8), flags&2 != 0})
				if flags&1 == 0 {
					break
				}
				id = get16(e.m, d+14)
			}
			length := e.handle(i, segments)
			at := used + 4 + 8*(uint64(q.last)%n)
			put32(e.m, at, uint32(head))
			put32(e.m, at+4, length)
			q.last++
			put16(e.m, used+2, q.last)
			if e.quiet>>i&1 != 0 {
				continue
			}
			put8(e.m, 0x41, 1)
			e.p.Store(regs.DoorbellRegister, 1<<16|uint32(vector))
		}
	}
}
