package vfiouser_test

// Both halves of the package against each other.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

// pair is a server with a client.
type pair struct {
	*vfiouser.Client
	dev  *fake
	srv  *vfiouser.Server
	done chan error
}

func newHalves(t testing.TB, change ...func(*fake)) *pair {
	t.Helper()
	checkLeaks(t)
	dev := newFake(t)
	for _, f := range change {
		f(dev)
	}
	ours, theirs := unixPair(t)
	srv, err := vfiouser.NewServer(theirs, func() (vfiouser.Device, error) { return dev, nil }, vfiouser.ServerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p := &pair{nil, dev, srv, make(chan error, 1)}
	go func() { p.done <- srv.Run(); close(p.done) }()
	p.Client, err = vfiouser.NewClient(ours)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.SetTimeout(patience); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Close()
		<-p.done
	})
	return p
}

func unixPair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	return c, s
}

func TestHalves(t *testing.T) {
	p := newHalves(t)
	info, err := p.Info()
	if want := (vfiouser.DeviceInfo{Reset: true, PCI: true, NumRegions: 9, NumIRQs: 5}); err != nil || info != want {
		t.Errorf("Info: %+v, %v", info, err)
	}
	for i := range uint32(vfiouser.NumRegions) {
		got, err := p.Region(i)
		if err != nil {
			t.Fatalf("Region(%d): %v", i, err)
		}
		want := p.dev.regions[i]
		if got.Flags != want.Flags || got.Size != want.Size || !slices.Equal(got.Areas, want.Areas) || got.FileOffset != want.FileOffset {
			t.Errorf("Region(%d): %+v, want %+v", i, got, want)
		}
		if mappable := want.Flags&vfiouser.RegionMmap != 0; mappable != (got.FD >= 0) {
			t.Errorf("Region(%d): descriptor %d", i, got.FD)
		} else if mappable {
			if !sameFile(t, got.FD, p.dev.mem) {
				t.Errorf("Region(%d): another file", i)
			}
			if flags, _ := unix.FcntlInt(uintptr(got.FD), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("Region(%d): the descriptor is not close-on-exec", i)
			}
			unix.Close(got.FD)
		}
		irq, err := p.IRQ(min(i, 4))
		if err != nil || irq != p.dev.IRQ(min(i, 4)) {
			t.Errorf("IRQ: %+v, %v", irq, err)
		}
	}
	if err := p.WriteRegion(vfiouser.RegionBAR0, 12, []byte{1, 2, 3, 4}); err != nil {
		t.Error(err)
	}
	var b [4]byte
	if err := p.ReadRegion(vfiouser.RegionBAR0, 12, b[:]); err != nil || b != [4]byte{1, 2, 3, 4} {
		t.Errorf("%x, %v", b, err)
	}
	if err := p.Reset(); err != nil {
		t.Error(err)
	}
	p.dev.state(func() {
		if p.dev.resets != 1 {
			t.Errorf("%d resets", p.dev.resets)
		}
	})
	if err := p.DMAMap(vfiouser.DMARegion{Address: 1 << 32, Size: 4096, FD: p.dev.mem, Writable: true}); err != nil {
		t.Error(err)
	}
	if err := p.DMAUnmap(1<<32, 4096); err != nil {
		t.Error(err)
	}
	p.Close()
	if err := <-p.done; err != nil {
		t.Errorf("Run: %v after an orderly Close", err)
	}
}

func TestHalvesErrors(t *testing.T) {
	p := newHalves(t)
	var b [4]byte
	for _, c := range []struct {
		err   error
		errno unix.Errno
	}{
		{p.ReadRegion(vfiouser.RegionBAR1, 0, b[:]), unix.EPERM},
		{p.WriteRegion(vfiouser.RegionBAR1, 0, b[:]), unix.EPERM},
		{p.ReadRegion(vfiouser.RegionBAR0, 4093, b[:]), unix.EINVAL},
		{p.ReadRegion(vfiouser.RegionBAR3, 0, b[:]), unix.EINVAL},
		{p.SetIRQs(vfiouser.IRQSet{Index: vfiouser.IRQMSIX, Action: vfiouser.IRQTrigger, Start: 2047, Count: 2}), unix.EINVAL},
	} {
		var remote *vfiouser.RemoteError
		if !errors.Is(c.err, c.errno) || !errors.As(c.err, &remote) || errors.Is(c.err, vfiouser.ErrRefused) {
			t.Errorf("%v, want %v from the server", c.err, c.errno)
		}
	}
	if _, err := p.Region(9); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Region(9): %v", err)
	}
	if _, err := p.IRQ(5); !errors.Is(err, unix.EINVAL) {
		t.Errorf("IRQ(5): %v", err)
	}
	// The server is as well as before.
	if _, err := p.Info(); err != nil {
		t.Error(err)
	}
}

// TestHalvesInterrupts hands over more eventfds than a message holds.
func TestHalvesInterrupts(t *testing.T) {
	p := newHalves(t)
	const n = 300
	fds := make([]int, n)
	for i := range fds {
		fds[i] = eventfd(t, 0)
	}
	set := vfiouser.IRQSet{Index: vfiouser.IRQMSIX, Action: vfiouser.IRQTrigger, Start: 7, Count: n, EventFD: true, FDs: fds}
	if err := p.SetIRQs(set); err != nil {
		t.Fatal(err)
	}
	p.dev.state(func() {
		if len(p.dev.sets) != 2 { // 253 and 47
			t.Errorf("%d messages", len(p.dev.sets))
		}
	})
	trigger := vfiouser.IRQSet{Index: vfiouser.IRQMSIX, Action: vfiouser.IRQTrigger, Start: 6, Count: n + 2}
	if err := p.SetIRQs(trigger); err != nil {
		t.Fatal(err)
	}
	for i, fd := range fds {
		if c := counter(fd); c != 1 {
			t.Fatalf("vector %d was raised %d times", 7+i, c)
		}
	}
	// Every other one by a list of booleans.
	trigger.Start, trigger.Count, trigger.Bools = 7, n, make([]byte, n)
	for i := range n {
		trigger.Bools[i] = byte(i % 2)
	}
	if err := p.SetIRQs(trigger); err != nil {
		t.Fatal(err)
	}
	for i, fd := range fds {
		if c := counter(fd); c != uint64(i%2) {
			t.Fatalf("vector %d was raised %d times", 7+i, c)
		}
	}
	// De-assign one, disable all.
	if err := p.SetIRQs(vfiouser.IRQSet{Index: vfiouser.IRQMSIX, Action: vfiouser.IRQTrigger, Start: 9, Count: 1, EventFD: true}); err != nil {
		t.Fatal(err)
	}
	p.dev.state(func() {
		if len(p.dev.events[vfiouser.IRQMSIX]) != n-1 {
			t.Errorf("%d eventfds left", len(p.dev.events[vfiouser.IRQMSIX]))
		}
	})
	if err := p.SetIRQs(vfiouser.IRQSet{Index: vfiouser.IRQMSIX, Action: vfiouser.IRQTrigger}); err != nil {
		t.Fatal(err)
	}
	p.dev.state(func() {
		if len(p.dev.events[vfiouser.IRQMSIX]) != 0 {
			t.Errorf("%d eventfds left", len(p.dev.events[vfiouser.IRQMSIX]))
		}
	})
	if err := p.SetIRQs(vfiouser.IRQSet{Index: vfiouser.IRQMSIX, Action: vfiouser.IRQMask, Count: 1}); err != nil {
		t.Error(err)
	}
	if err := p.SetIRQs(vfiouser.IRQSet{Index: vfiouser.IRQMSIX, Action: vfiouser.IRQUnmask, Count: 1}); err != nil {
		t.Error(err)
	}
	for _, bad := range []vfiouser.IRQSet{
		{},
		{Action: vfiouser.IRQTrigger, Count: 2, EventFD: true, FDs: fds[:1]},
		{Action: vfiouser.IRQTrigger, Count: 1, FDs: fds[:1]},
		{Action: vfiouser.IRQTrigger, Count: 1, Bools: make([]byte, 2)},
		{Action: vfiouser.IRQTrigger, Count: 1, Bools: make([]byte, 1), EventFD: true},
	} {
		bad.Index = vfiouser.IRQMSIX
		var remote *vfiouser.RemoteError
		if err := p.SetIRQs(bad); !errors.Is(err, unix.EINVAL) || errors.As(err, &remote) {
			t.Errorf("%+v: %v, want a refusal before anything is sent", bad, err)
		}
	}
}

func TestHalvesIOFDs(t *testing.T) {
	const n = 250
	p := newHalves(t, func(f *fake) {
		for i := range n {
			f.iofds = append(f.iofds, vfiouser.IOFD{Offset: 12, Size: 4, Match: true, Data: uint64(i), FD: eventfd(f.t, 0)})
		}
		f.iofds = append(f.iofds,
			vfiouser.IOFD{Offset: 16, FD: f.iofds[0].FD}, // shares a descriptor
			vfiouser.IOFD{Offset: 20, Size: 4, FD: -1},   // has none
		)
	})
	list, err := p.IOFDs(vfiouser.RegionBAR0)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != n+1 {
		t.Fatalf("%d entries, want %d", len(list), n+1)
	}
	for i, got := range list {
		want := p.dev.iofds[i]
		unix.Write(got.FD, binary.LittleEndian.AppendUint64(nil, 1))
		if counter(want.FD) != 1 {
			t.Errorf("entry %d is not the eventfd of the device's", i)
		}
		got.FD = want.FD
		if got != want {
			t.Errorf("entry %d: %+v, want %+v", i, got, want)
		}
	}
	for _, f := range list[:n] {
		unix.Close(f.FD)
	}
	list, err = p.IOFDs(vfiouser.RegionConfig)
	if err != nil || len(list) != 0 {
		t.Errorf("%v, %v, want nothing", list, err)
	}
	if _, err := p.IOFDs(vfiouser.RegionBAR3); !errors.Is(err, unix.EINVAL) {
		t.Errorf("region of size 0: %v", err)
	}
}

// TestHalvesLargeTransfer moves more than one message holds.
func TestHalvesLargeTransfer(t *testing.T) {
	const size = 5 << 19 // two and a half messages
	p := newHalves(t, func(f *fake) {
		f.regions[vfiouser.RegionBAR2] = vfiouser.Region{Flags: vfiouser.RegionRead | vfiouser.RegionWrite, Size: size, FD: -1}
	})
	b := bytes.Repeat([]byte{0xaa}, size)
	if err := p.WriteRegion(vfiouser.RegionBAR2, 0, b); err != nil {
		t.Fatal(err)
	}
	if err := p.ReadRegion(vfiouser.RegionBAR2, 0, b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, make([]byte, size)) { // the device leaves the buffer as it is
		t.Error("bytes of an earlier message came back")
	}
	p.dev.state(func() {
		if p.dev.accesses != 6 {
			t.Errorf("%d accesses, want 6", p.dev.accesses)
		}
	})
}

func TestHalvesConcurrent(t *testing.T) {
	p := newHalves(t)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			var b [8]byte
			for i := range uint64(200) {
				offset := uint64(g) * 8
				want := binary.LittleEndian.AppendUint64(nil, i<<8|uint64(g))
				if err := p.WriteRegion(vfiouser.RegionBAR0, offset, want); err != nil {
					t.Error(err)
					return
				}
				if err := p.ReadRegion(vfiouser.RegionBAR0, offset, b[:]); err != nil || !bytes.Equal(b[:], want) {
					t.Errorf("%x, %v, want %x", b, err, want)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestHalvesServerGone: the watcher of FD sees it, every call says so.
func TestHalvesServerGone(t *testing.T) {
	p := newHalves(t)
	p.srv.Close()
	w := []unix.PollFd{{Fd: int32(p.FD()), Events: unix.POLLRDHUP}}
	if n, err := poll(w); n != 1 || w[0].Revents&unix.POLLRDHUP == 0 {
		t.Fatalf("%d, %v, %+v", n, err, w)
	}
	_, first := p.Info()
	var dead *vfiouser.ConnectionError
	if !errors.As(first, &dead) {
		t.Fatalf("%v, want a ConnectionError", first)
	}
	if err := p.Reset(); err != first {
		t.Errorf("%v, want the same error again: %v", err, first)
	}
	if p.FD() < 0 {
		t.Error("the watched descriptor was closed behind the caller's back")
	}
	p.Close()
	if p.FD() >= 0 {
		t.Error("FD after Close")
	}
}

func poll(w []unix.PollFd) (int, error) {
	for {
		n, err := unix.Poll(w, int(patience/time.Millisecond))
		if err != unix.EINTR {
			return n, err
		}
	}
}

// TestNoAllocation: register accesses in the steady state, both halves.
func TestNoAllocation(t *testing.T) {
	p := newHalves(t)
	if n := testing.AllocsPerRun(1000, func() {
		var b [8]byte
		for _, width := range []int{1, 2, 4, 8} {
			if err := p.WriteRegion(vfiouser.RegionBAR0, 8, b[:width]); err != nil {
				t.Fatal(err)
			}
			if err := p.ReadRegion(vfiouser.RegionBAR0, 8, b[:width]); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations in eight register accesses", n)
	}
}

func TestDial(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(t.TempDir(), "dev.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dev := newFake(t)
	done := make(chan error, 2)
	go func() {
		first, err := l.AcceptUnix()
		if err != nil {
			done <- err
			return
		}
		go func() { done <- vfiouser.Serve(first, dev, vfiouser.ServerOptions{}) }()
		second, err := l.AcceptUnix()
		if err != nil {
			done <- err
			return
		}
		srv, err := vfiouser.NewServer(second, func() (vfiouser.Device, error) { return nil, unix.EBUSY }, vfiouser.ServerOptions{})
		if err == nil {
			err = srv.Run()
		}
		if !errors.Is(err, unix.EBUSY) {
			t.Errorf("Run: %v, want EBUSY", err)
		}
		done <- nil
	}()
	c, err := vfiouser.Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Info(); err != nil {
		t.Error(err)
	}
	if _, err := vfiouser.Dial(context.Background(), path); !errors.Is(err, vfiouser.ErrRefused) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("second client: %v, want ErrRefused, EBUSY", err)
	}
	c.Close()
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestHalvesClosedInACall(t *testing.T) {
	checkLeaks(t)
	peer, conn := newPair(t)
	ready := make(chan *vfiouser.Client)
	go func() {
		c, err := vfiouser.NewClient(conn)
		if err != nil {
			t.Error(err)
		}
		ready <- c
	}()
	peer.read()
	peer.write(answer(1, 1, uint16(0), uint16(0)))
	c := <-ready
	failed := make(chan error)
	go func() {
		_, err := c.Info()
		failed <- err
	}()
	peer.read() // the call waits for its reply now, or is about to
	c.Close()
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v, want net.ErrClosed", err)
	}
	if _, _, err := peer.readFull(1); err != nil && err != io.EOF {
		t.Errorf("the peer sees %v", err)
	}
}
