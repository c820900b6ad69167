package console

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// A fifo is what a bytes.Buffer is, whatever its sizes.
func TestFIFO(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var f fifo
	var want bytes.Buffer
	p, q := make([]byte, 3000), make([]byte, 3000)
	for i := range 20_000 {
		b := p[:r.IntN(len(p))]
		switch r.IntN(3) {
		case 0:
			for j := range b {
				b[j] = byte(i + j)
			}
			f.Write(b)
			want.Write(b)
		case 1:
			n := f.Read(b)
			m, _ := want.Read(q[:len(b)])
			if n != m || !bytes.Equal(b[:n], q[:m]) {
				t.Fatalf("step %d: read %d bytes, want %d, or others", i, n, m)
			}
		case 2:
			if r.IntN(500) == 0 {
				f.Reset()
				want.Reset()
			}
		}
		if f.Len() != want.Len() {
			t.Fatalf("step %d: %d bytes, want %d", i, f.Len(), want.Len())
		}
	}
}
