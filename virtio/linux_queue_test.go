package virtio_test

import (
	"encoding/binary"
	"math/bits"
	"time"

	"golang.org/x/sys/unix"
)

// initMemory is the allocator of section 7.
func (l *linux) initMemory(block uint64) {
	size := uint64(len(l.m))
	l.chunk = min(max(size/4096, 64), 4096)
	if l.chunk&(l.chunk-1) != 0 {
		l.chunk = 1 << bits.Len64(l.chunk)
	}
	l.bitmap = make([]bool, size/l.chunk)
	for i := range l.chunks(block) {
		l.bitmap[i] = true
	}
}

func (l *linux) chunks(n uint64) uint64 {
	c := (n + l.chunk - 1) / l.chunk
	return 1 << bits.Len64(c-1)
}

func (l *linux) alloc(n uint64) (uint64, error) {
	c := l.chunks(n)
next:
	for at := uint64(0); at+c <= uint64(len(l.bitmap)); at += c {
		for _, taken := range l.bitmap[at : at+c] {
			if taken {
				continue next
			}
		}
		for i := range c {
			l.bitmap[at+i] = true
		}
		l.stepped()
		clear(l.m[at*l.chunk : (at+c)*l.chunk])
		return at * l.chunk, nil
	}
	return 0, errNoSpace
}

func (l *linux) release(at, n uint64) {
	for i := range l.chunks(n) {
		l.bitmap[at/l.chunk+i] = false
	}
}

// interrupts runs the handlers of section 6.
func (l *linux) interrupts(fds []int, stop, ended chan struct{}) {
	defer close(ended)
	poll := []unix.PollFd{{Fd: int32(l.wake), Events: unix.POLLIN}}
	for _, fd := range fds {
		poll = append(poll, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	for {
		unix.Poll(poll, -1)
		select {
		case <-stop:
			return
		default:
		}
		for i, p := range poll[1:] {
			if p.Revents&unix.POLLIN == 0 {
				continue
			}
			var n [8]byte
			unix.Read(int(p.Fd), n[:])
			l.mu.Lock()
			l.handle(i)
			l.cond.Broadcast()
			l.mu.Unlock()
		}
	}
}

// handle is an interrupt. The caller holds mu.
func (l *linux) handle(vector int) {
	if vector == 0 {
		if !l.ready() {
			l.broken = true
			put8(l.m, 0x40, 0)
			put8(l.m, 0x41, 0)
			return
		}
		if get8(l.m, 0x40)&1 != 0 {
			put8(l.m, 0x40, 0)
			l.configChanges++
		}
		if l.mode != oneShared {
			return
		}
	}
	if l.mode == perQueue {
		if vector-1 < len(l.queues) {
			l.queues[vector-1].callback()
		}
		return
	}
	if get8(l.m, 0x41)&1 == 0 {
		l.spurious++
		return
	}
	put8(l.m, 0x41, 0)
	for _, q := range l.queues {
		q.callback()
	}
}

func (l *linux) eventIdx() bool { return l.features>>29&1 != 0 }

// callback takes what is used: with callbacks disabled, and again once they are
// enabled. The caller holds mu.
func (q *linuxQueue) callback() {
	m := q.l.m
	for {
		if !q.l.eventIdx() {
			put16(m, q.avail, 1)
		}
		for q.last != get16(m, q.used+2) {
			q.take()
		}
		if !q.l.eventIdx() {
			put16(m, q.avail, 0)
		} else {
			put16(m, q.avail+4+2*q.n, q.last)
		}
		if q.last == get16(m, q.used+2) {
			return
		}
	}
}

// take takes a used buffer.
func (q *linuxQueue) take() {
	l := q.l
	at := q.used + 4 + 8*(uint64(q.last)%q.n)
	id, n := uint16(get32(l.m, at)), get32(l.m, at+4)
	q.last++
	r := q.requests[id]
	if r == nil {
		l.Errorf("queue %d: id %d is not a head", q.index, id)
		return
	}
	delete(q.requests, id)
	for _, s := range r.segments {
		if s.in {
			r.in = append(r.in, l.m[s.at:s.at+s.n]...)
		}
		l.release(s.at, s.n)
	}
	if r.table != 0 {
		l.release(r.table, r.tableLen)
	}
	q.free = append(q.free, r.ids...)
	r.length, r.done = n, true
}

// add maps and adds a request: bytes for the device, then lengths of what it
// writes. The caller holds mu.
func (q *linuxQueue) add(out [][]byte, in ...int) (*linuxRequest, error) {
	l := q.l
	r := &linuxRequest{}
	total := len(out) + len(in)
	indirect := l.features>>28&1 != 0 && total > 1
	need := total
	if indirect {
		need = 1
	}
	if need > len(q.free) {
		return nil, errNoSpace
	}
	for i := range total {
		var s linuxSegment
		if i < len(out) {
			s = linuxSegment{n: uint64(len(out[i])), out: out[i]}
		} else {
			s = linuxSegment{n: uint64(in[i-len(out)]), in: true}
		}
		var err error
		if s.at, err = l.alloc(s.n); err != nil {
			for _, s := range r.segments {
				l.release(s.at, s.n)
			}
			return nil, err
		}
		copy(l.m[s.at:], s.out)
		r.segments = append(r.segments, s)
	}
	table := make([]byte, 16*total)
	r.ids, q.free = append(r.ids, q.free[:need]...), q.free[need:]
	for i, s := range r.segments {
		next, flags := uint16(i+1), uint16(0)
		if !indirect && i+1 < total {
			next = r.ids[i+1]
		}
		if i+1 < total {
			flags |= 1
		}
		if s.in {
			flags |= 2
		}
		putDescriptor(table[16*i:], s.at, uint32(s.n), flags, next)
	}
	if indirect {
		var err error
		if r.table, err = l.alloc(uint64(len(table))); err != nil {
			q.free = append(q.free, r.ids...)
			for _, s := range r.segments {
				l.release(s.at, s.n)
			}
			return nil, err
		}
		r.tableLen = uint64(len(table))
		copy(l.m[r.table:], table)
		table = make([]byte, 16)
		putDescriptor(table, r.table, uint32(r.tableLen), 4, 0)
	}
	for i, id := range r.ids {
		copy(l.m[q.desc+16*uint64(id):], table[16*i:16*i+16])
	}
	q.requests[r.ids[0]] = r
	l.stepped()
	put16(l.m, q.avail+4+2*(uint64(q.next)%q.n), r.ids[0])
	q.next++
	l.stepped()
	put16(l.m, q.avail+2, q.next)
	return r, nil
}

func putDescriptor(p []byte, at uint64, n uint32, flags, next uint16) {
	binary.LittleEndian.PutUint64(p, at)
	binary.LittleEndian.PutUint32(p[8:], n)
	binary.LittleEndian.PutUint16(p[12:], flags)
	binary.LittleEndian.PutUint16(p[14:], next)
}

// kick rings if the device wants it.
func (q *linuxQueue) kick() {
	m := q.l.m
	old := q.told
	q.told = q.next
	q.l.stepped()
	if q.l.eventIdx() {
		event := get16(m, q.used+4+8*q.n)
		if q.next-event-1 >= q.next-old {
			return
		}
	} else if get16(m, q.used)&1 != 0 {
		return
	}
	q.l.ring(q.deviceVector)
}

// request adds a request, kicks and sleeps until its callback.
func (q *linuxQueue) request(out [][]byte, in ...int) (*linuxRequest, error) {
	l := q.l
	l.mu.Lock()
	defer l.mu.Unlock()
	r, err := q.add(out, in...)
	if err != nil {
		return nil, err
	}
	q.kick()
	return r, q.await(r)
}

// await sleeps until a request is done. The caller holds mu.
func (q *linuxQueue) await(r *linuxRequest) error {
	l := q.l
	late := time.AfterFunc(30*time.Second, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if !r.done && !l.broken {
			l.Errorf("queue %d: a request hangs", q.index)
		}
		l.broken = true
		l.cond.Broadcast()
	})
	defer late.Stop()
	for !r.done {
		switch {
		case l.broken:
			return errBroken
		case l.callbacks != nil && !l.callbacks(q.index): // it spins
			q.callback()
			l.broken = l.broken || !l.ready()
			l.mu.Unlock()
			time.Sleep(10 * time.Microsecond)
			l.mu.Lock()
		default:
			l.cond.Wait()
		}
	}
	return nil
}
