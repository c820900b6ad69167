package link

import (
	"fmt"

	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Config describes a link. Sizes are in bytes.
type Config struct {
	Peers    uint32        `json:"peers"`   // 2 to 65536
	Vectors  uint16        `json:"vectors"` // of each peer, 1 to 2048
	Protocol regs.Protocol `json:"protocol"`
	// StateTable is the size of the State Table; 0 is the smallest that
	// holds all peers.
	StateTable uint64 `json:"state_table"`
	ReadWrite  uint64 `json:"rw_section"`     // size of the R/W section, may be 0
	Output     uint64 `json:"output_section"` // size of one output section, may be 0

	// HugePages is the size of the pages that the shared memory is made of,
	// a power of two from 64 KiB on that the kernel has; sections are
	// multiples of it. 0 is the kernel's ordinary pages.
	HugePages uint64 `json:"huge_pages,omitempty"`
	// File is the path of a file to take as the shared memory, see [New].
	// "" is memory without a name.
	File string `json:"file,omitempty"`
}

// Layout checks the configuration and returns the layout of its shared
// memory.
func (c Config) Layout() (shmem.Layout, error) {
	if c.Vectors < 1 || c.Vectors > regs.VectorsMax {
		return shmem.Layout{}, fmt.Errorf("vectors: expected 1 to %d, found %d", regs.VectorsMax, c.Vectors)
	}
	page := uint64(shmem.PageSize)
	if c.HugePages != 0 {
		page = c.HugePages
		if page&(page-1) != 0 || page < 64<<10 {
			return shmem.Layout{}, fmt.Errorf("huge pages: expected a power of two from 64 KiB on, such as 2 MiB, found %d bytes", page)
		}
		if c.File != "" {
			return shmem.Layout{}, fmt.Errorf("huge pages: expected no named memory beside them: name a file in a hugetlbfs, which has them")
		}
	}
	st := c.StateTable
	if st == 0 {
		st = (4*uint64(c.Peers) + page - 1) / page * page
	}
	if st > 1<<32-1 {
		return shmem.Layout{}, &shmem.LayoutError{Field: "State Table size", Value: st, Expected: "a size that fits into 32 bits"}
	}
	l, err := shmem.NewLayout(st, c.ReadWrite, c.Output, c.Peers)
	if err != nil {
		return l, err
	}
	// Peers map the sections one by one.
	for _, s := range []struct {
		name string
		size uint64
	}{{"State Table size", l.StateTable}, {"R/W section size", l.ReadWrite}, {"output section size", l.Output}} {
		if s.size%page != 0 {
			return shmem.Layout{}, &shmem.LayoutError{Field: s.name, Value: s.size, Expected: fmt.Sprintf("a multiple of the huge pages' %d", page)}
		}
	}
	return l, nil
}
