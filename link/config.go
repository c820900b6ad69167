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
}

// Layout checks the configuration and returns the layout of its shared
// memory.
func (c Config) Layout() (shmem.Layout, error) {
	if c.Vectors < 1 || c.Vectors > regs.VectorsMax {
		return shmem.Layout{}, fmt.Errorf("vectors: expected 1 to %d, found %d", regs.VectorsMax, c.Vectors)
	}
	st := c.StateTable
	if st == 0 {
		st = (4*uint64(c.Peers) + shmem.PageSize - 1) / shmem.PageSize * shmem.PageSize
	}
	if st > 1<<32-1 {
		return shmem.Layout{}, &shmem.LayoutError{Field: "State Table size", Value: st, Expected: "a size that fits into 32 bits"}
	}
	return shmem.NewLayout(st, c.ReadWrite, c.Output, c.Peers)
}
