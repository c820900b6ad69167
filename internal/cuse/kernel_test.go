package cuse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = time.Minute

// bytesOf puts numbers of 16, 32 and 64 bits, and bytes, one behind the other.
func bytesOf(fields ...any) []byte {
	var b bytes.Buffer
	for _, f := range fields {
		if err := binary.Write(&b, binary.NativeEndian, f); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

// kernel is the other end of /dev/cuse: messages in the kernel's form.
type kernel struct {
	testing.TB
	f      *os.File
	unique uint64
	early  map[uint64][]byte // answers that nobody waited for yet
}

// fakeKernel returns both ends of what is like /dev/cuse: a read takes one
// message, a write is one.
func fakeKernel(t testing.TB) (*kernel, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	k := &kernel{TB: t, f: os.NewFile(uintptr(fds[0]), "kernel"), early: map[uint64][]byte{}}
	t.Cleanup(func() { k.f.Close() })
	return k, os.NewFile(uintptr(fds[1]), "cuse")
}

// raw sends bytes.
func (k *kernel) raw(b []byte) {
	k.Helper()
	if _, err := k.f.Write(b); err != nil {
		k.Fatal(err)
	}
}

// send sends a request and returns its number.
func (k *kernel) send(op uint32, body ...any) uint64 {
	k.Helper()
	k.unique += 2
	b := bytesOf(body...)
	// struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid,
	// total_extlen, padding
	k.raw(append(bytesOf(uint32(40+len(b)), op, k.unique, uint64(0), uint32(1000), uint32(1000), uint32(77), uint16(0), uint16(0)), b...))
	return k.unique
}

// next is the next message that comes: struct fuse_out_header with len, error
// and unique, and what follows it.
func (k *kernel) next() (unique uint64, errno unix.Errno, body []byte) {
	k.Helper()
	k.f.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 1<<20)
	n, err := k.f.Read(b)
	if err != nil {
		k.Fatalf("no message: %v", err)
	}
	if n < 16 || binary.NativeEndian.Uint32(b) != uint32(n) {
		k.Fatalf("answer of %d bytes: % x", n, b[:min(n, 16)])
	}
	return binary.NativeEndian.Uint64(b[8:]), unix.Errno(-int32(binary.NativeEndian.Uint32(b[4:]))), b[16:n:n]
}

// want waits for the answer to a request. Others are kept.
func (k *kernel) want(unique uint64, errno unix.Errno, body ...any) {
	k.Helper()
	want := append(bytesOf(int32(errno)), bytesOf(body...)...)
	for k.early[unique] == nil {
		u, e, b := k.next()
		k.early[u] = append(bytesOf(int32(e)), b...)
	}
	if got := k.early[unique]; !bytes.Equal(got, want) {
		k.Fatalf("answer %x: got %.80x (%d bytes), want %.80x (%d bytes): error number, body", unique, got, len(got), want, len(want))
	}
	delete(k.early, unique)
}

// notified waits for a FUSE_NOTIFY_POLL: code 1 in the place of the error, kh.
func (k *kernel) notified(handle uint64) {
	k.Helper()
	k.want(0, ^unix.Errno(0), handle) // -1 as a number is 1
}

// quiet shows that nothing has come, by a request that is always answered.
func (k *kernel) quiet() {
	k.Helper()
	k.want(k.send(999), unix.ENOSYS)
	if len(k.early) > 0 {
		k.Fatalf("answers that were not expected: %x", k.early)
	}
}

const (
	inOpen, inRead, inWrite, inRelease, inFsync, inFlush, inInterrupt, inIoctl, inPoll = 14, 15, 16, 18, 20, 25, 36, 39, 40
)

// struct fuse_read_in and fuse_write_in: fh, offset, size, read_flags,
// lock_owner, flags, padding.
func (k *kernel) read(fh uint64, size uint32, flags uint32) uint64 {
	k.Helper()
	return k.readAt(fh, 0, size, flags)
}

func (k *kernel) readAt(fh, offset uint64, size uint32, flags uint32) uint64 {
	k.Helper()
	return k.send(inRead, fh, offset, size, uint32(0), uint64(0), flags, uint32(0))
}

func (k *kernel) write(fh uint64, data []byte, flags uint32) uint64 {
	k.Helper()
	return k.send(inWrite, fh, uint64(0), uint32(len(data)), uint32(0), uint64(0), flags, uint32(0), data)
}

// struct fuse_poll_in: fh, kh, flags, events.
func (k *kernel) poll(fh, kh uint64, schedule bool, events uint32) uint64 {
	k.Helper()
	var flags uint32
	if schedule {
		flags = 1
	}
	return k.send(inPoll, fh, kh, flags, events)
}

// struct fuse_ioctl_in: fh, flags, cmd, arg, in_size, out_size.
func (k *kernel) ioctl(fh uint64, command uint32, argument uint64, outSize uint32) uint64 {
	k.Helper()
	return k.send(inIoctl, fh, uint32(2), command, argument, uint32(0), outSize)
}

// open opens the file, which is the nth one. struct fuse_open_in: flags,
// open_flags; fuse_open_out: fh, open_flags, padding.
func (k *kernel) open(n uint64) uint64 {
	k.Helper()
	k.want(k.send(inOpen, uint32(unix.O_RDWR), uint32(0)), 0, n, uint32(1|4), uint32(0))
	return n
}

// release closes it. struct fuse_release_in: fh, flags, release_flags,
// lock_owner.
func (k *kernel) release(fh uint64) uint64 {
	k.Helper()
	return k.send(inRelease, fh, uint32(0), uint32(0), uint64(0))
}

// rig is a character device for one side's port, and the other side's.
type rig struct {
	*kernel
	ctx    context.Context
	device *console.Device
	driver *console.Driver
	own    *console.Port
	peer   *console.Port
	char   *device
	node   string
	cancel context.CancelFunc
	ended  chan error
}

// newRig serves the driver's port: a console, or a plain one.
func newRig(t testing.TB, wire console.Wire, isConsole bool) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	t.Cleanup(cancel)
	devices := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8003, ReadWrite: 1 << 20})
	r := &rig{ctx: ctx, ended: make(chan error, 1)}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	config := console.Config{Wire: wire}
	r.device, err = console.NewDevice(devices[0], config)
	must(err)
	for _, c := range []console.PortConfig{{Name: "console", Console: true}, {Name: "plain"}} {
		_, err := r.device.AddPort(c)
		must(err)
	}
	served := make(chan error, 1)
	serving, stop := context.WithCancel(ctx)
	go func() { served <- r.device.Serve(serving) }()
	t.Cleanup(func() { stop(); must(<-served) })
	r.driver, err = console.Open(ctx, devices[1], config)
	must(err)
	t.Cleanup(func() { r.driver.Close() })
	name := "plain"
	if isConsole {
		name = "console"
	}
	r.peer = r.device.Lookup(name)
	r.own, err = r.driver.WaitPort(ctx, name)
	must(err)

	r.node = filepath.Join(t.TempDir(), "node")
	must(os.WriteFile(r.node, nil, 0o600))
	k, f := fakeKernel(t)
	r.kernel = k
	r.char = newDevice(f, r.own, r.node)
	run, cancelRun := context.WithCancel(ctx)
	r.cancel = cancelRun
	go func() { r.ended <- r.char.run(run) }()
	t.Cleanup(func() {
		cancelRun()
		if len(r.ended) == 0 {
			<-r.ended
		}
	})
	return r
}

// both opens both ends, and waits until each knows it.
func (r *rig) both() (fh uint64) {
	r.Helper()
	fh = r.open(1)
	r.ok(r.peer.Open())
	r.ok(r.peer.WaitOpen(r.ctx))
	r.ok(r.own.WaitOpen(r.ctx))
	return fh
}

func (r *rig) ok(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// until waits for a condition of the device, which changes with its port.
func (r *rig) until(what string, f func(d *device) bool) {
	r.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		r.char.mu.Lock()
		holds := f(r.char)
		r.char.mu.Unlock()
		if holds {
			return
		}
		if time.Now().After(end) {
			r.Fatalf("not in %v: %s", patience, what)
		}
	}
}

// waiting waits until so many requests wait.
func (r *rig) waiting(n int) {
	r.Helper()
	r.until("requests wait", func(d *device) bool { return len(d.reads)+len(d.writes) == n })
}

// give sends something to the port that is served.
func (r *rig) give(text string) {
	r.Helper()
	had := r.own.Unread()
	_, err := r.peer.Write([]byte(text))
	r.ok(err)
	r.until("it arrived", func(d *device) bool { return r.own.Unread() == had+len(text) })
}

// take reads what the port that is served has sent.
func (r *rig) take(want []byte) {
	r.Helper()
	var got []byte
	b := make([]byte, 64<<10)
	for len(got) < len(want) {
		n, err := r.peer.Read(b)
		r.ok(err)
		got = append(got, b[:n]...)
	}
	if !bytes.Equal(got, want) {
		r.Fatalf("got %.80x (%d bytes), want %.80x (%d bytes)", got, len(got), want, len(want))
	}
}

// quiet shows that nothing has come, nor is about to.
func (r *rig) quiet() {
	r.Helper()
	r.ok(r.char.look())
	r.kernel.quiet()
}

// end waits for the end of run.
func (r *rig) end() error {
	r.Helper()
	select {
	case err := <-r.ended:
		r.ended <- err
		return err
	case <-time.After(patience):
		r.Fatalf("it did not end in %v", patience)
	}
	return errors.New("unreachable")
}
