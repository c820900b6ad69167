package virtio

import "slices"

// lineSize is what the driver's memory is divided by, in bytes: neighbours in a
// cache line are used by one side at a time.
const lineSize = 64

// space is the part of the R/W section that belongs to the driver.
type space struct {
	free  []segment // by address, no two of them adjacent
	total uint64    // bytes free
}

func newSpace(from, to uint64) space {
	from, to = (from+lineSize-1)&^(lineSize-1), to&^(lineSize-1)
	if from >= to {
		return space{}
	}
	return space{free: []segment{{from, to - from}}, total: to - from}
}

func lines(n uint64) uint64 { return (n + lineSize - 1) &^ (lineSize - 1) }

// take finds n bytes, aligned to a line.
func (s *space) take(n uint64) (uint64, error) {
	n = lines(n)
	for i := range s.free {
		f := &s.free[i]
		if f.n < n {
			continue
		}
		at := f.at
		f.at, f.n = f.at+n, f.n-n
		if f.n == 0 {
			s.free = slices.Delete(s.free, i, i+1)
		}
		s.total -= n
		return at, nil
	}
	return 0, &SpaceError{Need: n, Free: s.total}
}

// give returns what take found.
func (s *space) give(at, n uint64) {
	n = lines(n)
	s.total += n
	i, _ := slices.BinarySearchFunc(s.free, at, func(f segment, at uint64) int {
		if f.at < at {
			return -1
		}
		return 1
	})
	s.free = slices.Insert(s.free, i, segment{at, n})
	if i+1 < len(s.free) && at+n == s.free[i+1].at {
		s.free[i].n += s.free[i+1].n
		s.free = slices.Delete(s.free, i+1, i+2)
	}
	if i > 0 && s.free[i-1].at+s.free[i-1].n == at {
		s.free[i-1].n += s.free[i].n
		s.free = slices.Delete(s.free, i, i+1)
	}
}
