package console

// fifo holds bytes in a ring that grows. Those of a [bytes.Buffer] move again
// and again where it is never empty.
type fifo struct {
	ring  []byte // its size is a power of two
	first int
	n     int
}

// fifoLeast is the least size of a ring.
const fifoLeast = 512

// Len is the number of bytes.
func (f *fifo) Len() int { return f.n }

// Write adds bytes.
func (f *fifo) Write(b []byte) {
	if f.n+len(b) > len(f.ring) {
		size := max(2*len(f.ring), fifoLeast)
		for size < f.n+len(b) {
			size *= 2
		}
		ring := make([]byte, size)
		n := f.n
		f.Read(ring[:n])
		f.ring, f.first, f.n = ring, 0, n
	}
	end := (f.first + f.n) & (len(f.ring) - 1)
	n := copy(f.ring[end:], b)
	copy(f.ring, b[n:])
	f.n += len(b)
}

// Read takes bytes out, and returns how many.
func (f *fifo) Read(b []byte) int {
	b = b[:min(len(b), f.n)]
	n := copy(b, f.ring[f.first:])
	copy(b[n:], f.ring)
	if f.n -= len(b); f.n == 0 {
		f.first = 0 // where it is in the cache
	} else {
		f.first = (f.first + len(b)) & (len(f.ring) - 1)
	}
	return len(b)
}

// Reset drops all bytes, and the memory if it is more than a few.
func (f *fifo) Reset() {
	f.first, f.n = 0, 0
	if len(f.ring) > fifoKept {
		f.ring = nil
	}
}

// fifoKept is how much memory is kept for what comes next.
const fifoKept = 256 << 10
