package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bar2Word is what happened to a 32-bit word of BAR2.
type bar2Word struct {
	Offset  uint64 `json:"offset"`
	Before  uint32 `json:"before"`
	Stored  uint32 `json:"stored"` // what was tried
	After   uint32 `json:"after"`
	Swapped bool   `json:"swapped"` // what a compare-and-swap claimed
	// ReadNS is the median of single reads in nanoseconds; where they are
	// faster than the clock, of a thousand divided by as many.
	ReadNS float64 `json:"read_ns"`
}

// bar2 reads, and tries to write, words of BAR2 of a PCI device at the given
// offsets, whoever they belong to: with bare accesses, as the library has none
// that could.
func bar2(_ context.Context, args []string) (any, error) {
	if len(args) < 2 {
		return nil, errors.New("expected a PCI address and offsets")
	}
	dir := "/sys/bus/pci/devices/" + args[0]
	if err := os.WriteFile(dir+"/enable", []byte("1"), 0); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir+"/resource2", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	var words []bar2Word
	for _, a := range args[1:] {
		offset, err := strconv.ParseUint(a, 0, 63)
		if err != nil || offset%4 != 0 || offset+4 > uint64(len(b)) {
			return words, fmt.Errorf("offset %s: expected an aligned word of %d bytes", a, len(b))
		}
		words = append(words, tryWord((*uint32)(unsafe.Pointer(&b[offset])), offset))
	}
	return words, nil
}

func tryWord(p *uint32, offset uint64) bar2Word {
	w := bar2Word{Offset: offset, Before: atomic.LoadUint32(p)}
	w.Stored = ^w.Before
	atomic.StoreUint32(p, w.Stored)
	w.After = atomic.LoadUint32(p)
	w.Swapped = atomic.CompareAndSwapUint32(p, w.After, w.After+1)
	var times []float64
	for range 101 {
		const slow = 5 * time.Microsecond
		start := time.Now()
		atomic.LoadUint32(p)
		d := time.Since(start)
		if d < slow {
			start = time.Now()
			for range 1000 {
				atomic.LoadUint32(p)
			}
			d = time.Since(start)
			times = append(times, float64(d.Nanoseconds())/1000)
			continue
		}
		times = append(times, float64(d.Nanoseconds()))
	}
	slices.Sort(times)
	w.ReadNS = times[len(times)/2]
	return w
}
