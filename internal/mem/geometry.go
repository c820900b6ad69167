package mem

import (
	"fmt"

	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Geometry works out the layout of a device's shared memory, and the own
// peer ID, from the vendor capability in its configuration space and the
// registers.
func Geometry(config []byte, load func(regs.Register) (uint32, error)) (l shmem.Layout, own uint32, err error) {
	c, err := regs.ParseVendorCap(config)
	if err != nil {
		return l, 0, err
	}
	return Layout(uint64(c.StateTable), c.ReadWrite, c.Output, load)
}

// Layout is Geometry for whoever knows the sizes of the sections from elsewhere:
// of the State Table, the R/W section, and one output section, in bytes.
func Layout(stateTable, readWrite, output uint64, load func(regs.Register) (uint32, error)) (l shmem.Layout, own uint32, err error) {
	if own, err = load(regs.ID); err != nil {
		return l, 0, err
	}
	peers, err := load(regs.MaxPeers)
	if err != nil {
		return l, 0, err
	}
	if own == regs.AllOnes || peers == regs.AllOnes { // neither is a valid value
		return l, 0, fmt.Errorf("registers read all ones: %w", regs.ErrGone)
	}
	if l, err = shmem.NewLayout(stateTable, readWrite, output, peers); err != nil {
		return l, 0, err
	}
	if own >= peers {
		return l, 0, fmt.Errorf("register ID: expected a value below Maximum Peers, %d, found %d", peers, own)
	}
	return l, own, nil
}
