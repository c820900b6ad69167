// Package peer carries a host process as a peer of a link: a vfio-user client
// of the link service (`ivshctl serve`). The process sees the same device as
// a guest: registers, capability, interrupts, sections.
//
// Between two host processes doorbells go from eventfd to eventfd: the
// service hands out one eventfd per peer and vector
// (DEVICE_GET_REGION_IO_FDS), and a process that waits on its own is rung
// without the service in the way. What arrives while the process has
// interrupts disabled is dropped here then, as the device would.
package peer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/evfd"
	"github.com/ivshmem-go/ivshmem/internal/fault"
	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
	"github.com/ivshmem-go/ivshmem/vfiouser"
)

// Backend is an open connection to a link. It implements the back end
// interface of the root package.
type Backend struct {
	path       string
	client     *vfiouser.Client
	config     []byte // as it was at first
	privileged int    // offset of Privileged Control
	set        *mem.Set
	irq        uint32         // index of the interrupts: MSI-X, or INTx
	received   []int          // eventfds that the service sent
	doorbells  map[uint32]int // those that ring, by value of the Doorbell register
	own        []int          // own doorbell eventfds; nil if not all are there

	mu      sync.Mutex // guards the way that interrupts take
	private []int      // eventfds of our own; nil while not needed
	direct  bool       // own are in use, not private
	enabled bool       // Interrupt Control

	use    sync.RWMutex // held for reading while eventfds are in use, for writing by Close
	closed bool
}

// Dial connects to the socket of a link and takes a free peer ID.
func Dial(path string) (*Backend, error) {
	b := &Backend{path: path}
	if err := b.open(); err != nil {
		b.Close()
		e := &fault.DeviceError{Device: path, Op: "connect to link", Err: err}
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
			e.Err = fmt.Errorf("%w: %w", fault.ErrNotFound, err)
		case errors.Is(err, vfiouser.ErrRefused) && errors.Is(err, unix.EBUSY):
			e.Err = fmt.Errorf("%w: no peer ID is free for this socket", fault.ErrBusy)
			e.Remedy = "end a peer, or serve the link with more --peers"
		}
		return nil, e
	}
	return b, nil
}

func (b *Backend) open() error {
	var err error
	if b.client, err = vfiouser.Dial(context.Background(), b.path); err != nil {
		return err
	}
	b.config = make([]byte, regs.ConfigSize)
	if err := b.client.ReadRegion(vfiouser.RegionConfig, 0, b.config); err != nil {
		return err
	}
	vendor, err := regs.ParseVendorCap(b.config)
	if err != nil {
		return err
	}
	b.privileged = vendor.PrivilegedControl()
	layout, own, err := mem.Geometry(b.config, b.Load)
	if err != nil {
		return err
	}
	if err := b.mapSections(layout, own); err != nil {
		return err
	}
	return b.connectVectors(own)
}

// mapSections maps the shared memory from the file that the service sends.
func (b *Backend) mapSections(l shmem.Layout, own uint32) error {
	r, err := b.client.Region(vfiouser.RegionBAR2)
	if err != nil {
		return err
	}
	if r.Size == 0 {
		return &fault.Reason{
			Err:    fmt.Errorf("%w: the device has no BAR2, and its Base Address means something in guests only", fault.ErrNotSupported),
			Remedy: "serve the link without --base-address, or run the program in a guest",
		}
	}
	if r.Flags&vfiouser.RegionMmap != 0 {
		defer unix.Close(r.FD)
		// Whoever can shrink the file could end this process by SIGBUS.
		seals, err := unix.FcntlInt(uintptr(r.FD), unix.F_GET_SEALS, 0)
		if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
			return &fault.Reason{
				Err:    errors.New("shared memory: expected a file that is sealed against shrinking"),
				Remedy: "serve the link without --memory",
			}
		}
	}
	if err := l.CheckRegion(r.Size); err != nil {
		return err
	}
	mapped := func(offset, size uint64) bool {
		if r.Flags&vfiouser.RegionMmap == 0 {
			return false
		}
		for _, a := range r.Areas {
			if a.Offset <= offset && size <= a.Size && offset-a.Offset <= a.Size-size {
				return true
			}
		}
		return len(r.Areas) == 0
	}
	// Of a strict link a guest maps no more than what it may write. Host
	// processes hold the file, and read the others' output sections there.
	rest := l.Total() - l.StateTable
	ok := rest == 0 || mapped(l.StateTable, rest)
	if regs.ConfigStrict(b.config) {
		ok = (l.ReadWrite == 0 || mapped(l.ReadWriteOffset(), l.ReadWrite)) &&
			(l.Output == 0 || mapped(l.OutputOffset(own), l.Output))
	}
	if !ok {
		return fmt.Errorf("%w: expected all sections behind the State Table to be mappable", fault.ErrNotSupported)
	}
	table := mapped(0, l.StateTable)
	places := mem.Region(int64(r.FileOffset), l, own)
	if !table {
		places.StateTable = mem.NotMapped
	}
	if b.set, err = mem.MapSections(r.FD, l, places); err != nil {
		return err
	}
	if !table {
		b.set.Sections.States = (*states)(b)
	}
	return nil
}

// connectVectors switches the device on and connects its vectors: to the own
// doorbell eventfds if the service has them all, so that other processes ring
// them directly, else to eventfds of our own.
func (b *Backend) connectVectors(own uint32) error {
	const command, memory, busMaster = 4, 1 << 1, 1 << 2
	if err := b.writeConfig16(command, memory|busMaster); err != nil {
		return err
	}
	b.irq = vfiouser.IRQMSIX
	msix, err := regs.ParseMSIX(b.config)
	switch {
	case err == nil:
		err = b.writeConfig16(msix.Offset+regs.MSIXControl, regs.MSIXEnable)
	case errors.Is(err, regs.ErrNoCapability):
		b.irq, msix.Vectors, err = vfiouser.IRQINTx, 1, nil
	}
	if err != nil {
		return err
	}
	list, err := b.client.IOFDs(vfiouser.RegionBAR0)
	if err != nil {
		return err
	}
	b.doorbells = make(map[uint32]int, len(list))
	for _, d := range list {
		if !slices.Contains(b.received, d.FD) { // entries may share one
			b.received = append(b.received, d.FD)
		}
		if d.Offset == uint64(regs.DoorbellRegister) && d.Size == 4 && d.Match && evfd.NonBlocking(d.FD) {
			b.doorbells[uint32(d.Data)] = d.FD
		}
	}
	for v := range msix.Vectors {
		fd, ok := b.doorbells[regs.Doorbell(uint16(own), uint16(v))]
		if !ok {
			b.own = nil
			break
		}
		b.own = append(b.own, fd)
	}
	if b.own == nil {
		if err := b.makePrivate(msix.Vectors); err != nil {
			return err
		}
	}
	return b.connect(b.own != nil)
}

func (b *Backend) makePrivate(n int) error {
	for len(b.private) < n {
		fd, err := evfd.New()
		if err != nil {
			return err
		}
		b.private = append(b.private, fd)
	}
	return nil
}

// connect gives the service the eventfds to raise interrupts by.
func (b *Backend) connect(direct bool) error {
	fds := b.private
	if direct {
		fds = b.own
	}
	err := b.client.SetIRQs(vfiouser.IRQSet{
		Index: b.irq, Action: vfiouser.IRQTrigger, EventFD: true,
		Count: uint32(len(fds)), FDs: fds,
	})
	if err != nil {
		return err
	}
	b.direct = direct
	return nil
}

func (b *Backend) writeConfig16(offset int, v uint16) error {
	var p [2]byte
	binary.LittleEndian.PutUint16(p[:], v)
	return b.client.WriteRegion(vfiouser.RegionConfig, uint64(offset), p[:])
}

// gone makes the end of the connection the device's end.
func gone(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return os.ErrClosed
	}
	var dead *vfiouser.ConnectionError
	if errors.As(err, &dead) {
		return fmt.Errorf("%w: the link service ended the connection: %w", regs.ErrGone, err)
	}
	return err
}

// Address is the path of the link's socket.
func (b *Backend) Address() string { return b.path }

// Driver is "vfio-user".
func (b *Backend) Driver() string { return "vfio-user" }

// Config reads the configuration space.
func (b *Backend) Config() ([]byte, error) {
	c := make([]byte, regs.ConfigSize)
	if err := b.client.ReadRegion(vfiouser.RegionConfig, 0, c); err != nil {
		return nil, gone(err)
	}
	return c, nil
}

// WriteConfig writes one byte of the configuration space. In one-shot mode the
// service has to see each event, so doorbells are not direct then; what
// Interrupts returns changes with the mode.
func (b *Backend) WriteConfig(offset int, v uint8) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.use.RLock()
	defer b.use.RUnlock()
	if b.closed {
		return os.ErrClosed
	}
	if offset == b.privileged && b.own != nil {
		if direct := v&regs.OneShot == 0; direct != b.direct {
			if err := b.makePrivate(len(b.own)); err != nil {
				return err
			}
			if err := b.connect(direct); err != nil {
				return gone(err)
			}
		}
	}
	return gone(b.client.WriteRegion(vfiouser.RegionConfig, uint64(offset), []byte{v}))
}

// Load reads a register.
func (b *Backend) Load(r regs.Register) (uint32, error) {
	var p [4]byte
	if err := b.client.ReadRegion(vfiouser.RegionBAR0, uint64(r), p[:]); err != nil {
		return 0, gone(err)
	}
	return binary.LittleEndian.Uint32(p[:]), nil
}

// Store writes a register. A doorbell of a known eventfd is a write to that.
// Both are system calls, which order earlier stores to shared memory.
func (b *Backend) Store(r regs.Register, v uint32) error {
	if r == regs.InterruptControl {
		b.mu.Lock()
		defer b.mu.Unlock()
	}
	b.use.RLock()
	defer b.use.RUnlock()
	if b.closed {
		return os.ErrClosed
	}
	switch r {
	case regs.DoorbellRegister:
		if fd, ok := b.doorbells[v]; ok {
			return evfd.Signal(fd)
		}
	case regs.InterruptControl:
		on := v&regs.InterruptEnable != 0
		if on && !b.enabled && b.direct {
			// Events that came while interrupts were disabled are lost
			// (specification, "Interrupt Control Register").
			for _, fd := range b.own {
				evfd.Drain(fd)
			}
		}
		b.enabled = on
	}
	var p [4]byte
	binary.LittleEndian.PutUint32(p[:], v)
	return gone(b.client.WriteRegion(vfiouser.RegionBAR0, uint64(r), p[:]))
}

// EndsState says that when the connection ends the service sets State 0.
func (b *Backend) EndsState() bool { return true }

// Sections is the shared memory.
func (b *Backend) Sections() *shmem.Sections { return &b.set.Sections }

// unmask lets the next INTx through.
func (b *Backend) unmask() error {
	return gone(b.client.SetIRQs(vfiouser.IRQSet{Index: b.irq, Action: vfiouser.IRQUnmask, Count: 1}))
}

// Interrupts has one eventfd per vector.
func (b *Backend) Interrupts() evfd.Interrupts {
	b.mu.Lock()
	defer b.mu.Unlock()
	fds := b.private
	if b.direct {
		fds = b.own
	}
	i := evfd.Interrupts{FDs: fds, Gone: evfd.Source{FD: b.client.FD(), Events: unix.EPOLLRDHUP}}
	if b.irq == vfiouser.IRQINTx {
		i.Rearm = b.unmask
	}
	return i
}

// Close disconnects: the service sets State 0 and frees the peer ID.
func (b *Backend) Close() error {
	var err error
	if b.client != nil {
		err = b.client.Close() // also ends calls that wait for the service
	}
	b.use.Lock()
	defer b.use.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	if b.set != nil {
		err = errors.Join(err, b.set.Close())
	}
	for _, fd := range slices.Concat(b.received, b.private) {
		unix.Close(fd)
	}
	return err
}

// states reads the State Table by messages, where the service does not let it
// be mapped.
type states Backend

func (s *states) Load(peer uint32) (uint32, error) {
	b := (*Backend)(s)
	if n := b.set.Sections.Layout.Peers; peer >= n {
		return 0, fmt.Errorf("State Table: peer %d, expected a peer below %d", peer, n)
	}
	var p [4]byte
	if err := b.client.ReadRegion(vfiouser.RegionBAR2, 4*uint64(peer), p[:]); err != nil {
		return 0, gone(err)
	}
	return binary.LittleEndian.Uint32(p[:]), nil
}
