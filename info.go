package ivshmem

import (
	"errors"
	"fmt"

	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// Info is what can be seen of a device without owning it. What could not be
// seen is nil or empty, and Missing says why and how to get it.
type Info struct {
	Address      string        `json:"address"`
	Identity     string        `json:"identity"` // vendor:device, hexadecimal
	Protocol     regs.Protocol `json:"protocol"`
	ProtocolName string        `json:"protocol_name"`
	ID           *uint32       `json:"id"`
	MaxPeers     *uint32       `json:"max_peers"`
	Vectors      *int          `json:"vectors"`
	OneShot      *bool         `json:"one_shot"`
	// InterruptControl is bit 0 of that register.
	InterruptControl *bool `json:"interrupt_control"`
	// Driver is the bound kernel driver, "" if none; "vfio-user" for a
	// link's socket. BackEnd is what the device was looked at through.
	Driver   string        `json:"driver"`
	BackEnd  string        `json:"back_end"`
	Owner    *Owner        `json:"owner"`
	Sections []SectionInfo `json:"sections"`
	// InputsTrap is [Device.InputsTrap].
	InputsTrap bool     `json:"inputs_trap"`
	States     []uint32 `json:"states"` // by peer ID
	Missing    []string `json:"missing"`
}

// Owner is the process that owns a device.
type Owner = sysfs.Owner

// SectionInfo says where a section lies in the shared memory region.
type SectionInfo struct {
	Name     string `json:"name"`
	Title    string `json:"-"`
	Offset   uint64 `json:"offset"` // bytes
	Size     uint64 `json:"size"`   // bytes
	Writable bool   `json:"writable"`
}

// Inspect looks at a device beside its owner, with whatever rights the
// process has; addresses are those of [Open]. On a link's socket it takes a
// peer ID for a moment.
func Inspect(address string) (*Info, error) {
	if isSocket(address) {
		d, err := Open(address, AsObserver())
		if err != nil {
			return nil, err
		}
		defer d.Close()
		i := &Info{Address: address, Driver: d.Driver()}
		config, err := d.back.Config()
		if err != nil {
			return nil, err
		}
		i.config(config)
		i.device(d)
		return i, nil
	}
	dev, err := find(address)
	if err != nil {
		return nil, err
	}
	i := &Info{Address: dev.Addr, Driver: dev.Driver}
	i.Identity = fmt.Sprintf("%04x:%04x", dev.Vendor, dev.Device)
	if i.Protocol, err = regs.ProtocolOf(dev.Class); err != nil {
		i.miss("protocol", err)
	}
	i.ProtocolName = i.Protocol.String()
	if o, ok := dev.Owner(); ok {
		i.Owner = &o
	}
	config, err := dev.ReadConfig()
	if err != nil {
		i.miss("capabilities", err)
		return i, nil
	}
	d, err := openPCI(dev, []Option{AsObserver()})
	if err == nil {
		defer d.Close()
		// vfio-pci shows ordinary users all of it, sysfs the first 64 bytes.
		if all, err := d.back.Config(); err == nil && len(all) > len(config) {
			config = all
		}
	}
	i.config(config)
	if err != nil {
		var e *DeviceError
		if errors.As(err, &e) && e.Device == dev.Addr { // the reader knows which device
			err = &fault.Reason{Err: e.Err, Remedy: e.Remedy}
		}
		i.miss("registers, states, exact offsets", err)
		return i, nil
	}
	i.device(d)
	return i, nil
}

func (i *Info) miss(what string, err error) {
	i.Missing = append(i.Missing, fmt.Sprintf("%s: %v", what, err))
}

// config takes what the configuration space tells.
func (i *Info) config(config []byte) {
	if p, err := regs.ConfigProtocol(config); err == nil {
		i.Protocol, i.ProtocolName = p, p.String()
		i.Identity = fmt.Sprintf("%04x:%04x", regs.VendorID, regs.DeviceID)
	}
	i.InputsTrap = regs.ConfigStrict(config)
	c, err := regs.ParseVendorCap(config)
	if err != nil {
		i.miss("section sizes, one-shot mode", err)
		return
	}
	oneShot := c.Privileged&regs.OneShot != 0
	i.OneShot = &oneShot
	vectors := 1
	if m, err := regs.ParseMSIX(config); err == nil {
		vectors = m.Vectors
	} else if !errors.Is(err, regs.ErrNoCapability) {
		i.miss("vectors", err)
		return
	}
	i.Vectors = &vectors
}

// device takes what the registers and the State Table tell.
func (i *Info) device(d *Device) {
	i.BackEnd = d.Driver()
	i.ID, i.MaxPeers = &d.id, &d.peers
	if v, err := d.load(regs.InterruptControl); err != nil {
		i.miss("Interrupt Control", err)
	} else {
		on := v&regs.InterruptEnable != 0
		i.InterruptControl = &on
	}
	i.layout(d.Sections().Layout, d.id)
	for peer := range d.peers {
		v, err := d.State(peer)
		if err != nil {
			i.miss("states", err)
			return
		}
		i.States = append(i.States, v)
	}
}

func (i *Info) layout(l shmem.Layout, own uint32) {
	add := func(name, title string, offset, size uint64, writable bool) {
		if size > 0 {
			i.Sections = append(i.Sections, SectionInfo{name, title, offset, size, writable})
		}
	}
	add("state_table", shmem.NameStateTable, 0, l.StateTable, false)
	add("rw_section", shmem.NameReadWrite, l.ReadWriteOffset(), l.ReadWrite, true)
	for peer := range l.Peers {
		add(fmt.Sprintf("output_section_%d", peer), fmt.Sprintf("%s %d", shmem.NameOutput, peer), l.OutputOffset(peer), l.Output, peer == own)
	}
}
