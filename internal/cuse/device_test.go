package cuse

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

const nonBlock = unix.O_NONBLOCK

func TestInit(t *testing.T) {
	// struct cuse_init_in: major, minor, unused, flags
	in := func(major, minor uint32) []any { return []any{major, minor, uint32(0), uint32(1)} }
	// struct cuse_init_out: major, minor, unused, flags, max_read, max_write,
	// dev_major, dev_minor, spare[10]; then strings
	out := func(minor uint32) []any {
		return []any{uint32(7), minor, uint32(0), uint32(1), uint32(131072), uint32(131072), uint32(0), uint32(0),
			make([]uint32, 10), []byte("DEVNAME=ports/log\x00")}
	}
	for _, c := range []struct {
		name string
		op   uint32
		in   []any
		out  []any // nil: an error
	}{
		{"of Linux 6.12", 4096, in(7, 41), out(38)},
		{"of Linux 3.9", 4096, in(7, 21), out(21)},
		{"too old", 4096, in(7, 20), nil},
		{"too new", 4096, in(8, 0), nil},
		{"short", 4096, in(7, 41)[:3], nil},
		{"FUSE_INIT", 26, in(7, 41), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, f := fakeKernel(t)
			defer f.Close()
			unique := k.send(c.op, c.in...)
			err := newDevice(f, nil, "").init("ports/log")
			if (err == nil) != (c.out != nil) {
				t.Fatal(err)
			}
			if err == nil {
				k.want(unique, 0, c.out...)
			}
		})
	}
}

func TestOpen(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	first := r.open(1)
	r.ok(r.peer.WaitOpen(r.ctx))
	r.want(r.send(inOpen, uint32(0), uint32(0)), unix.EBUSY)
	hangUp := r.peer.Changes()
	r.want(r.release(first), 0)
	<-hangUp
	for r.peer.PeerOpen() {
		<-r.peer.Changes()
	}
	second := r.open(2)
	r.want(r.read(first, 1, nonBlock), unix.EBADF)
	r.want(r.release(first), unix.EBADF)
	r.want(r.release(second), 0)
	// Somebody else has the port.
	r.ok(r.own.Open())
	r.want(r.send(inOpen, uint32(0), uint32(0)), unix.EBUSY)
}

// That a program has left is told when the port can be had again.
func TestLeft(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	left := make(chan bool, 10)
	r.char.mu.Lock()
	r.char.left = func() { left <- !r.own.InUse() }
	r.char.mu.Unlock()
	for n := range uint64(2) {
		fh := r.open(n + 1)
		r.want(r.send(inOpen, uint32(0), uint32(0)), unix.EBUSY)
		r.want(r.release(fh), 0)
		if len(left) != 1 || !<-left {
			t.Errorf("file %d: not told, or too early or often", n+1)
		}
		r.want(r.release(fh), unix.EBADF)
	}
	if len(left) > 0 {
		t.Error("told of a file that was not open")
	}
}

func TestRead(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	r.want(r.read(fh, 10, nonBlock), unix.EAGAIN)
	r.give("hello world")
	r.want(r.read(fh, 5, 0), 0, []byte("hello"))
	r.want(r.read(fh, 100, nonBlock), 0, []byte(" world"))
	// Where a long read goes on it does not wait.
	r.want(r.readAt(fh, 131072, 100, 0), unix.EAGAIN)
	r.want(r.read(fh, 131073, 0), unix.EINVAL)

	// Two that wait get it in their order.
	one, two := r.read(fh, 3, 0), r.read(fh, 3, 0)
	r.quiet()
	r.want(r.read(fh, 1, nonBlock), unix.EAGAIN)
	_, err := r.peer.Write([]byte("abcd"))
	r.ok(err)
	r.want(one, 0, []byte("abc"))
	r.want(two, 0, []byte("d"))

	// End of file, when all is read.
	r.give("last")
	r.ok(r.peer.Close())
	r.want(r.read(fh, 3, 0), 0, []byte("las"))
	r.want(r.read(fh, 3, 0), 0, []byte("t"))
	r.want(r.read(fh, 3, 0), 0)
	r.want(r.read(fh, 3, nonBlock), 0)
	// A read that waits for the other side, which comes and goes.
	r.ok(r.peer.Open())
	r.ok(r.own.WaitOpen(r.ctx))
	waits := r.read(fh, 3, 0)
	r.waiting(1)
	r.ok(r.peer.Close())
	r.want(waits, 0)
	r.quiet()
}

func TestReadMuch(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	data := pattern(200_000)
	r.give(string(data))
	r.want(r.read(fh, 131072, 0), 0, data[:131072])
	r.want(r.readAt(fh, 131072, 131072, 0), 0, data[131072:])
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 ^ i>>8)
	}
	return b
}

func TestInterrupt(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	first, second := r.read(fh, 10, 0), r.read(fh, 10, 0)
	r.waiting(2)
	r.send(inInterrupt, second)
	r.want(second, unix.EINTR)
	r.send(inInterrupt, second)       // twice
	r.send(inInterrupt, uint64(4444)) // of one that is not known
	r.quiet()
	_, err := r.peer.Write([]byte("first"))
	r.ok(err)
	r.want(first, 0, []byte("first"))
}

const chunk = 100_003

// stall writes chunks until nothing goes any more. It returns all that was
// written, and the number of the last write, which waits.
func (r *rig) stall(fh uint64) (data []byte, last uint64) {
	r.Helper()
	r.ok(r.peer.SetLimit(1000))
	for stalled := false; !stalled; {
		if last != 0 {
			r.want(last, 0, uint32(chunk), uint32(0))
		}
		data = append(data, pattern(chunk)...)
		last = r.write(fh, data[len(data)-chunk:], 0)
		r.want(r.send(999), unix.ENOSYS) // it has seen the write, too
		r.until("taken, or stalled", func(d *device) bool {
			stalled = len(d.writes) == 1 && errors.Is(d.writes[0].err, console.ErrStalled)
			return stalled || len(d.writes) == 0
		})
	}
	return data, last
}

func TestWrite(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.open(1)
	// Nobody is there.
	r.want(r.write(fh, []byte("x"), nonBlock), unix.EAGAIN)
	early := r.write(fh, []byte("early"), 0)
	r.waiting(1)
	r.want(r.write(fh, []byte("x"), nonBlock), unix.EAGAIN)
	r.ok(r.peer.Open())
	r.want(early, 0, uint32(5), uint32(0))
	r.take([]byte("early"))
	r.want(r.write(fh, []byte("hello"), nonBlock), 0, uint32(5), uint32(0))
	r.take([]byte("hello"))
	r.want(r.write(fh, nil, 0), 0, uint32(0), uint32(0))

	// The other side takes nothing. Writes that wait keep their order.
	big, first := r.stall(fh)
	r.want(r.write(fh, []byte("x"), nonBlock), unix.EAGAIN) // behind another one
	second := r.write(fh, []byte("second"), 0)
	third := r.write(fh, []byte("third"), 0)
	fourth := r.write(fh, []byte("fourth"), 0)
	r.waiting(4)
	r.send(inInterrupt, third)
	r.want(third, unix.EINTR)
	r.take(append(big, "secondfourth"...))
	r.want(first, 0, uint32(chunk), uint32(0))
	r.want(second, 0, uint32(6), uint32(0))
	r.want(fourth, 0, uint32(6), uint32(0))
}

// A write that was taken in part when it ended says how much.
func TestWritePart(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	big, first := r.stall(fh)
	var taken int
	r.until("taken in part", func(d *device) bool { taken = d.writes[0].done; return taken > 0 })
	r.send(inInterrupt, first)
	r.want(first, 0, uint32(taken), uint32(0))
	r.want(r.write(fh, []byte("x"), nonBlock), unix.ENOSPC)
	r.take(big[:len(big)-chunk+taken])
	r.ok(r.peer.SetLimit(1 << 20))
	r.until("room", func(d *device) bool { return d.port.Ready()&console.Out != 0 })
	// As much as there is room for is taken without waiting.
	r.write(fh, big[:128<<10], nonBlock)
	unique, errno, body := r.next()
	if unique != r.unique || errno != 0 || native.Uint32(body) == 0 {
		t.Errorf("got %d %v % x", unique, errno, body)
	}
}

// On the original wire the other side says that it takes no more: a write that
// waits ends with what it had.
func TestWriteThrottled(t *testing.T) {
	r := newRig(t, console.Original, false)
	fh := r.both()
	r.ok(r.peer.SetLimit(1))
	r.want(r.write(fh, []byte("x"), 0), 0, uint32(1), uint32(0))
	r.until("throttled", func(d *device) bool { return d.port.Throttled() })
	r.want(r.write(fh, []byte("x"), 0), unix.ENOSPC)
	r.want(r.write(fh, []byte("x"), nonBlock), unix.ENOSPC)
	r.want(r.poll(fh, 5, false, 4), 0, uint32(0), uint32(0))
	r.take([]byte("x"))
	r.until("released", func(d *device) bool { return !d.port.Throttled() })
	r.want(r.write(fh, []byte("y"), 0), 0, uint32(1), uint32(0))
}

const (
	in  = 0x41  // POLLIN, POLLRDNORM
	out = 0x104 // POLLOUT, POLLWRNORM
	hup = 0x10
)

func TestPoll(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.open(1)
	r.want(r.poll(fh, 5, false, in|out), 0, uint32(in|hup), uint32(0))
	r.want(r.poll(fh, 5, true, out), 0, uint32(in|hup), uint32(0))
	r.ok(r.peer.Open())
	r.notified(5) // Out
	r.want(r.poll(fh, 5, true, in), 0, uint32(out), uint32(0))
	r.give("ab")
	r.notified(5)
	r.give("cd") // it knows that already, and did not ask again
	r.quiet()
	r.want(r.poll(fh, 5, true, in), 0, uint32(in|out), uint32(0))
	r.give("ef")
	r.quiet()
	// A read that leaves something: who waits for edges is told again.
	r.want(r.read(fh, 1, 0), 0, []byte("a"))
	r.notified(5)
	r.want(r.read(fh, 10, 0), 0, []byte("bcdef"))
	// Likewise for writes.
	r.want(r.poll(fh, 5, true, out), 0, uint32(out), uint32(0))
	r.want(r.write(fh, []byte("y"), 0), 0, uint32(1), uint32(0))
	r.notified(5)
	r.quiet()
	r.want(r.poll(fh, 5, true, out), 0, uint32(out), uint32(0))
	r.give("x") // not asked for
	r.quiet()
	r.ok(r.peer.Close()) // told in any case
	r.notified(5)
	r.want(r.poll(fh, 5, false, in), 0, uint32(in|hup), uint32(0))
	r.want(r.read(fh, 10, 0), 0, []byte("x"))
	r.quiet()
	// What has ended is new when it begins again.
	r.want(r.poll(fh, 5, true, 0), 0, uint32(in|hup), uint32(0))
	r.ok(r.peer.Open())
	r.ok(r.own.WaitOpen(r.ctx))
	r.quiet()
	r.ok(r.peer.Close())
	r.notified(5)
	// A new file begins anew.
	r.want(r.poll(fh, 6, true, out), 0, uint32(in|hup), uint32(0))
	r.want(r.release(fh), 0)
	r.open(2)
	r.ok(r.peer.Open())
	r.ok(r.own.WaitOpen(r.ctx))
	r.quiet()
}

func TestIoctl(t *testing.T) {
	const fionread, tiocgwinsz, tcgets = 0x541b, 0x5413, 0x5401
	r := newRig(t, console.Multiport, true)
	fh := r.both()
	r.give("12345")
	r.ok(r.device.Resize(r.peer, console.Size{Cols: 132, Rows: 43}))
	r.until("the size", func(d *device) bool { return d.port.Size().Cols == 132 })
	// struct fuse_ioctl_out: result, flags, in_iovs, out_iovs; struct
	// fuse_ioctl_iovec: base, len
	const retry = 4
	r.want(r.ioctl(fh, fionread, 0x7fff12345678, 0), 0, uint32(0), uint32(retry), uint32(0), uint32(1), uint64(0x7fff12345678), uint64(4))
	r.want(r.ioctl(fh, fionread, 0x7fff12345678, 4), 0, uint32(0), uint32(0), uint32(0), uint32(0), int32(5))
	r.want(r.ioctl(fh, tiocgwinsz, 0x1000, 0), 0, uint32(0), uint32(retry), uint32(0), uint32(1), uint64(0x1000), uint64(8))
	// struct winsize: rows, columns, pixels
	r.want(r.ioctl(fh, tiocgwinsz, 0x1000, 8), 0, uint32(0), uint32(0), uint32(0), uint32(0), []uint16{43, 132, 0, 0})
	r.want(r.ioctl(fh, tcgets, 0x1000, 0), unix.ENOTTY)

	plain := newRig(t, console.Multiport, false)
	plain.want(plain.ioctl(plain.open(1), tiocgwinsz, 0x1000, 8), unix.ENOTTY)
}

func TestOddMessages(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	for _, c := range []struct {
		name string
		op   uint32
		body []any
		want unix.Errno
	}{
		{"FLUSH", inFlush, []any{fh, make([]byte, 16)}, unix.ENOSYS},
		{"FSYNC", inFsync, []any{fh, make([]byte, 8)}, unix.ENOSYS},
		{"LOOKUP", 1, []any{[]byte("name\x00")}, unix.ENOSYS},
		{"INIT again", 4096, []any{make([]byte, 16)}, unix.ENOSYS},
		{"op 0", 0, nil, unix.ENOSYS},
		{"op ffffffff", 1<<32 - 1, nil, unix.ENOSYS},
		{"short OPEN", inOpen, []any{uint32(0)}, unix.EINVAL},
		{"empty READ", inRead, nil, unix.EINVAL},
		{"short READ", inRead, []any{fh, make([]byte, 31)}, unix.EINVAL},
		{"short WRITE", inWrite, []any{fh, make([]byte, 31)}, unix.EINVAL},
		{"short RELEASE", inRelease, []any{fh, make([]byte, 15)}, unix.EINVAL},
		{"short POLL", inPoll, []any{fh, make([]byte, 15)}, unix.EINVAL},
		{"short IOCTL", inIoctl, []any{fh, make([]byte, 23)}, unix.EINVAL},
		{"short INTERRUPT", inInterrupt, []any{uint32(0)}, unix.EINVAL},
		{"READ of another file", inRead, []any{fh + 1, make([]byte, 32)}, unix.EBADF},
		{"WRITE of another file", inWrite, []any{fh + 1, make([]byte, 32)}, unix.EBADF},
		{"POLL of another file", inPoll, []any{fh + 1, make([]byte, 16)}, unix.EBADF},
		{"IOCTL of another file", inIoctl, []any{fh + 1, make([]byte, 24)}, unix.EBADF},
		{"RELEASE of another file", inRelease, []any{uint64(0), make([]byte, 16)}, unix.EBADF},
		{"WRITE with less than its size", inWrite, []any{fh, uint64(0), uint32(5), make([]byte, 20), []byte("1234")}, unix.EINVAL},
		{"WRITE with more than its size", inWrite, []any{fh, uint64(0), uint32(3), make([]byte, 20), []byte("1234")}, unix.EINVAL},
		{"READ of 4 GiB", inRead, []any{fh, uint64(0), uint32(1<<32 - 1), make([]byte, 20)}, unix.EINVAL},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.kernel.TB = t
			r.want(r.send(c.op, c.body...), c.want)
		})
	}
	r.kernel.TB = t
	r.quiet()
}

// Messages that are none end the device with an error, and the port is closed.
func TestBrokenMessages(t *testing.T) {
	for _, b := range [][]byte{
		{1}, make([]byte, 39), make([]byte, 40), bytesOf(uint32(41), make([]byte, 36)), bytesOf(uint32(40), make([]byte, 37)),
	} {
		r := newRig(t, console.Multiport, false)
		r.open(1)
		r.ok(r.peer.WaitOpen(r.ctx))
		r.raw(b)
		if err := r.end(); err == nil || !strings.Contains(err.Error(), "expected its own size") {
			t.Errorf("% x: %v", b, err)
		}
		if err := r.own.Open(); err != nil {
			t.Errorf("the port: %v", err)
		}
	}
}

func TestTooManyWaiting(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	last := uint64(0)
	for range maxWaiting {
		last = r.read(fh, 10, 0)
	}
	r.waiting(maxWaiting)
	r.want(r.read(fh, 10, 0), unix.ENOMEM)
	r.send(inInterrupt, last)
	r.want(last, unix.EINTR)
	r.read(fh, 10, 0)
	r.waiting(maxWaiting)
	r.quiet()
}

func TestRemoved(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	r.want(r.poll(fh, 7, true, in), 0, uint32(out), uint32(0))
	waits := r.read(fh, 10, 0)
	r.waiting(1)
	r.ok(r.device.RemovePort(r.peer))
	r.want(waits, unix.ENODEV)
	r.notified(7)
	if _, err := os.Lstat(r.node); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the node is there: %v", err)
	}
	r.want(r.poll(fh, 7, true, in|out), 0, uint32(hup), uint32(0))
	r.want(r.read(fh, 10, 0), unix.ENODEV)
	r.want(r.write(fh, []byte("x"), 0), unix.ENODEV)
	r.want(r.send(inOpen, uint32(0), uint32(0)), unix.ENODEV)
	r.quiet()
	r.want(r.release(fh), 0)
	r.ok(r.end())

	t.Run("not open", func(t *testing.T) {
		r := newRig(t, console.Multiport, false)
		r.ok(r.device.RemovePort(r.peer))
		r.ok(r.end())
		if _, err := os.Lstat(r.node); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the node is there: %v", err)
		}
	})
	t.Run("the driver ended", func(t *testing.T) {
		r := newRig(t, console.Multiport, false)
		fh := r.both()
		waits := r.read(fh, 10, 0)
		r.waiting(1)
		r.driver.Close()
		r.want(waits, unix.ENODEV)
		r.cancel() // whoever wants the name does not wait for the file
		r.ok(r.end())
	})
}

// The end answers what waits, and tells the other side that the port is closed.
func TestEnd(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	reading := r.read(fh, 10, 0)
	_, writing := r.stall(fh)
	r.cancel()
	r.ok(r.end())
	r.want(reading, unix.ENODEV)
	if unique, errno, body := r.next(); unique != writing || errno != 0 || native.Uint32(body) == 0 {
		t.Errorf("the write: %v % x, want the part that was taken", errno, body)
	}
	if n, err := r.f.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the connection is not closed: %d, %v", n, err)
	}
	r.ok(r.own.Open()) // it was closed
}

func TestKernelEnds(t *testing.T) {
	r := newRig(t, console.Multiport, false)
	fh := r.both()
	r.read(fh, 10, 0)
	r.waiting(1)
	r.f.Close()
	if err := r.end(); err == nil || !strings.Contains(err.Error(), "the kernel has ended the character device") {
		t.Error(err)
	}
	r.ok(r.own.Open())
}

func TestNames(t *testing.T) {
	for name, good := range map[string]bool{
		"a": true, "org.example.log": true, "virtio-ports/A_9@b:c+d": true, strings.Repeat("x", 200): true,
		"": false, ".": false, "..": false, ".a": false, "a/../b": false, "/a": false, "a/": false, "a//b": false,
		"a b": false, "a\nb": false, "a!b": false, "a=b": false, "a\x00b": false, "ä": false, strings.Repeat("x", 201): false,
	} {
		if err := checkName(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
		if !good {
			if err := Serve(t.Context(), Config{Name: name}); err == nil || !strings.Contains(err.Error(), "name of a character device") {
				t.Errorf("%q: %v", name, err)
			}
		}
	}
	if err := Serve(t.Context(), Config{Name: "null"}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("/dev/null: %v", err)
	}
}

// FuzzMessages sends what it finds to an open file: each message has one answer
// or none, and the device goes on.
func FuzzMessages(f *testing.F) {
	r := newRig(f, console.Multiport, true)
	r.both()
	r.cancel()
	r.ok(r.end())
	for op, size := range map[uint32]int{inOpen: 8, inRead: 40, inWrite: 44, inRelease: 24, inInterrupt: 8, inIoctl: 32, inPoll: 24, 4096: 16} {
		f.Add(op, bytesOf(uint64(1), make([]byte, size-8)))
		f.Add(op, bytesOf(uint64(1), bytes.Repeat([]byte{0xff}, size-8)))
	}
	f.Fuzz(func(t *testing.T, op uint32, body []byte) {
		k, file := fakeKernel(t)
		defer file.Close()
		d := newDevice(file, r.own, "")
		for _, m := range []message{{op: opOpen, unique: 2, body: make([]byte, 8)}, {op: op, unique: 4, body: body}} {
			if err := d.handle(m); err != nil && err != errOver {
				t.Fatal(err)
			}
		}
		waits := len(d.reads) + len(d.writes)
		if d.open {
			if err := d.handle(message{op: opRelease, unique: 6, body: bytesOf(d.files, make([]byte, 16))}); err != nil {
				t.Fatal(err)
			}
		}
		if waits > 1 || len(d.reads)+len(d.writes) > 0 {
			t.Errorf("%d wait", waits)
		}
		file.Close()
		var answers int
		for b := make([]byte, 1<<20); ; {
			n, err := k.f.Read(b)
			if err != nil {
				break
			}
			if unique := native.Uint64(b[8:n]); unique == 4 {
				answers++
			}
		}
		if answers > 1 {
			t.Errorf("%d answers", answers)
		}
	})
}
