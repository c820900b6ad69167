package shmem_test

import (
	"errors"
	"math/big"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ivshmem-go/ivshmem/shmem"
)

func TestNewLayout(t *testing.T) {
	const top = 1 << 63
	for _, c := range []struct {
		name                string
		st, rw, out         uint64
		peers               uint32
		field               string // of the error, "" if none
		total               uint64
		outFirst, outBeyond uint64 // offsets of the first section, and behind the last
	}{
		{"ivshmem-net", 0x1000, 0, 0x7f000, 2, "", 0xff000, 0x1000, 0xff000},
		{"virtio over shared memory", 0x1000, 0xdf000, 0, 2, "", 0xe0000, 0xe0000, 0xe0000},
		{"three peers", 0x1000, 0x9000, 0x2000, 3, "", 0x10000, 0xa000, 0x10000},
		{"State Table only", 0x1000, 0, 0, 1024, "", 0x1000, 0x1000, 0x1000},
		{"65536 peers", 0x40000, 0, 0x1000, 65536, "", 0x10040000, 0x40000, 0x10040000},
		{"product above 32 bits", 0x1000, 0, 0x1_0000_0000, 16, "", 0x10_0000_1000, 0x1000, 0x10_0000_1000},
		{"ends right below 2^63", 0x1000, top - 0x2000, 0, 2, "", top - 0x1000, top - 0x1000, top - 0x1000},
		{"output sections end right below 2^63", 0x1000, 0x1000, top/2 - 0x2000, 2, "", top - 0x2000, 0x2000, top - 0x2000},

		{"no peers", 0x1000, 0, 0, 0, "Maximum Peers", 0, 0, 0},
		{"one peer", 0x1000, 0, 0, 1, "Maximum Peers", 0, 0, 0},
		{"65537 peers", 0x100000, 0, 0, 65537, "Maximum Peers", 0, 0, 0},
		{"all ones", 0x1000, 0, 0, 0xffffffff, "Maximum Peers", 0, 0, 0},
		{"no State Table", 0, 0x1000, 0x1000, 2, "State Table size", 0, 0, 0},
		{"State Table too small", 0x1000, 0, 0, 1025, "State Table size", 0, 0, 0},
		{"State Table misaligned", 0x1800, 0, 0, 2, "State Table size", 0, 0, 0},
		{"R/W section misaligned", 0x1000, 0x1004, 0, 2, "R/W section size", 0, 0, 0},
		{"output section misaligned", 0x1000, 0, 0x800, 2, "output section size", 0, 0, 0},
		{"R/W section ends at 2^63", 0x1000, top - 0x1000, 0, 2, "R/W section size", 0, 0, 0},
		{"R/W section overflows 64 bits", 0x1000, 1<<64 - 0x1000, 0, 2, "R/W section size", 0, 0, 0},
		{"State Table above 2^63", top, 0, 0, 2, "R/W section size", 0, 0, 0},
		{"output sections end at 2^63", 0x1000, 0x1000, top/2 - 0x1000, 2, "output section size", 0, 0, 0},
		{"output sections overflow 64 bits", 0x40000, 0, 1 << 48, 65536, "output section size", 0, 0, 0},
		{"output sections overflow to 0", 0x1000, 0, 1 << 63, 2, "output section size", 0, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := shmem.NewLayout(c.st, c.rw, c.out, c.peers)
			if c.field != "" {
				e, ok := errors.AsType[*shmem.LayoutError](err)
				if !ok || e.Field != c.field || l != (shmem.Layout{}) {
					t.Errorf("%+v, %v, want an error of %s", l, err, c.field)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := shmem.Layout{StateTable: c.st, ReadWrite: c.rw, Output: c.out, Peers: c.peers}
			if d := cmp.Diff(want, l); d != "" {
				t.Error(d)
			}
			if l.Total() != c.total || l.ReadWriteOffset() != c.st || l.OutputOffset(0) != c.outFirst || l.OutputOffset(c.peers) != c.outBeyond {
				t.Errorf("total %#x, R/W section at %#x, output sections at %#x to %#x", l.Total(), l.ReadWriteOffset(), l.OutputOffset(0), l.OutputOffset(c.peers))
			}
			for _, size := range []uint64{c.total, c.total + 1, 1<<64 - 1} {
				if err := l.CheckRegion(size); err != nil {
					t.Errorf("region of %#x bytes: %v", size, err)
				}
			}
			for _, size := range []uint64{c.total - 1, c.total - 0x1000, 0} {
				e, ok := errors.AsType[*shmem.LayoutError](l.CheckRegion(size))
				if !ok || e.Field != "shared memory region size" || e.Value != size {
					t.Errorf("region of %#x bytes: %v", size, e)
				}
			}
		})
	}
}

// Whatever the sizes: NewLayout accepts exactly what keeps the rules, in exact
// arithmetic, and then the sections follow each other without gap or overlap.
func TestLayoutProperties(t *testing.T) {
	size := rapid.OneOf(
		rapid.Uint64(),
		rapid.Map(rapid.Uint64Range(0, 1<<52), func(n uint64) uint64 { return n << 12 }),
		rapid.Map(rapid.Uint64Range(0, 64), func(n uint64) uint64 { return n << 12 }),
		rapid.Map(rapid.Uint64Range(0, 63), func(n uint64) uint64 { return 1 << n }),
	)
	accepted := 0
	rapid.Check(t, func(t *rapid.T) {
		st, rw, out := size.Draw(t, "state table"), size.Draw(t, "rw"), size.Draw(t, "output")
		peers := rapid.OneOf(rapid.Uint32(), rapid.Uint32Range(0, 70000), rapid.Uint32Range(0, 4)).Draw(t, "peers")
		exact := new(big.Int).SetUint64(out)
		exact.Mul(exact, big.NewInt(int64(peers)))
		exact.Add(exact, new(big.Int).SetUint64(st))
		exact.Add(exact, new(big.Int).SetUint64(rw))
		good := peers >= 2 && peers <= 65536 && st >= 4*uint64(peers) &&
			st%4096 == 0 && rw%4096 == 0 && out%4096 == 0 && exact.BitLen() <= 63
		l, err := shmem.NewLayout(st, rw, out, peers)
		if good != (err == nil) {
			t.Fatalf("good is %v, error %v", good, err)
		}
		if err != nil {
			if _, ok := errors.AsType[*shmem.LayoutError](err); !ok {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		accepted++
		if !exact.IsUint64() || exact.Uint64() != l.Total() {
			t.Fatalf("total %#x, exact %#x", l.Total(), exact)
		}
		end := l.StateTable
		if l.ReadWriteOffset() != end {
			t.Fatalf("R/W section at %#x, State Table ends at %#x", l.ReadWriteOffset(), end)
		}
		end += l.ReadWrite
		for peer := range peers {
			if l.OutputOffset(peer) != end {
				t.Fatalf("output section %d at %#x, expected %#x", peer, l.OutputOffset(peer), end)
			}
			if end > end+l.Output {
				t.Fatalf("output section %d wraps", peer)
			}
			end += l.Output
		}
		if end != l.Total() || l.CheckRegion(end) != nil || l.CheckRegion(end-1) == nil {
			t.Fatalf("sections end at %#x, total %#x", end, l.Total())
		}
	})
	if accepted == 0 {
		t.Error("no layout was accepted: nothing was shown")
	}
}
