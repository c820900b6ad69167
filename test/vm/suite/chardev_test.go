package suite

import (
	"bytes"
	"context"
	"crypto/md5"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// TestCharacterDevice has ports of a console as character devices in a guest.
// The device side is this process; programs of the guest make every system call
// that there is for them, through the kernel's CUSE.
func TestCharacterDevice(t *testing.T) {
	s := serve(t, "--protocol", "0x8003", "--vectors", "2", "--rw", "1M", "--output", "0")
	c := &charDevices{T: t, ctx: deadline(t)}
	c.device = c.serveDevice(s.Socket)
	c.guest = guests(t, s, vm.Config{
		Driver: "vfio-pci", Modules: []string{"cuse"},
		Files: map[string]string{"/bin/guestprog": buildFor(t, vm.AMD64, "build", module+"/test/vm/guestprog", "guestprog")},
	})[0]
	for _, p := range []console.PortConfig{{Name: "tty", Console: true}, {Name: "a"}, {Name: "b"}, {Name: "c"}} {
		c.add(p)
	}
	c.start()
	for range 4 {
		c.lineBegins("ready ports/")
	}
	for _, test := range []struct {
		name string
		f    func(c *charDevices)
	}{
		{"node", charNode}, {"read", charRead}, {"write", charWrite}, {"poll", charPoll}, {"ioctl", charIoctl},
		{"signals", charSignals}, {"programs", charPrograms}, {"16 MiB each way", charMuch},
		{"port removed", charRemoved}, {"service killed", charKilled}, {"service ended", charEnded},
		{"ivshctl ports serve", charCommand},
	} {
		t.Run(test.name, func(t *testing.T) {
			begin := time.Now()
			defer func(old *testing.T) { c.T = old }(c.T)
			c.T, c.ctx, c.service.t = t, deadline(t), t
			test.f(c)
			t.Logf("%v", time.Since(begin))
		})
		if t.Failed() {
			break // the next ones would wait in vain
		}
	}
	checkKernelLog(t, c.guest)
}

type charDevices struct {
	*testing.T
	ctx     context.Context
	device  *console.Device
	guest   *vm.Guest
	service *process
}

// serveDevice is peer 0 of the link, and its console.
func (c *charDevices) serveDevice(socket string) *console.Device {
	dev, err := ivshmem.Open(socket)
	c.ok(err)
	c.Cleanup(func() { dev.Close() })
	d, err := console.NewDevice(dev, console.Config{MaxPorts: 8})
	c.ok(err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx) }()
	c.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			c.Error(err)
		}
	})
	return d
}

func (c *charDevices) ok(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

func (c *charDevices) add(p console.PortConfig) {
	c.Helper()
	_, err := c.device.AddPort(p)
	c.ok(err)
}

// start starts the service in the guest.
func (c *charDevices) start() {
	c.Helper()
	c.service = start(c.T, c.guest, "guestprog", "char-serve", "", "ports")
}

// lineBegins waits for a line of the service.
func (c *charDevices) lineBegins(want string) {
	c.Helper()
	if l := c.service.line(); !strings.HasPrefix(l, want) {
		c.Fatalf("got %q, want %q", l, want)
	}
}

// open is the port on this side, open.
func (c *charDevices) open(name string) *console.Port {
	c.Helper()
	p := c.device.Lookup(name)
	c.ok(p.Open())
	return p
}

// gone waits until the guest's end of a port is closed.
func (c *charDevices) gone(p *console.Port) {
	c.Helper()
	for {
		changed := p.Changes()
		if !p.PeerOpen() {
			return
		}
		select {
		case <-changed:
		case <-c.ctx.Done():
			c.Fatal("the port is still open in the guest")
		}
	}
}

func (c *charDevices) write(p *console.Port, text string) {
	c.Helper()
	_, err := p.WriteAll(c.ctx, []byte(text))
	c.ok(err)
}

func (c *charDevices) read(p *console.Port, want string) {
	c.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(p, b); err != nil || string(b) != want {
		c.Fatalf("got %q, %v, want %q", b, err, want)
	}
}

// caller is a program in the guest that makes system calls.
type caller struct {
	*charDevices
	*vm.Process
	in  io.WriteCloser
	out *lines
	err bytes.Buffer
}

func (c *charDevices) caller() *caller {
	c.Helper()
	r, w := io.Pipe()
	k := &caller{charDevices: c, in: w, out: newLines()}
	var err error
	k.Process, err = c.guest.Exec(vm.Command{Argv: []string{"guestprog", "char-drive"}, Stdin: r, Stdout: k.out, Stderr: &k.err})
	c.ok(err)
	c.Cleanup(func() { w.Close() })
	return k
}

// begin begins a call.
func (k *caller) begin(call string) {
	k.Helper()
	_, err := io.WriteString(k.in, call+"\n")
	k.ok(err)
}

// ends waits for the end of a call.
func (k *caller) ends(want string) {
	k.Helper()
	select {
	case got := <-k.out.c:
		if got != want {
			k.Fatalf("got %s, want %s", got, want)
		}
	case <-k.Done():
		k.Fatalf("the program ended: %s", k.err.String())
	case <-k.ctx.Done():
		k.Fatalf("the call does not end, want %s", want)
	}
}

// calls makes calls: what, and what they return.
func (k *caller) calls(list ...string) {
	k.Helper()
	for i := 0; i < len(list); i += 2 {
		k.begin(list[i])
		k.ends(list[i+1])
	}
}

// until repeats a call until it returns something.
func (k *caller) until(call, want string) {
	k.Helper()
	for {
		k.begin(call)
		select {
		case got := <-k.out.c:
			if got == want {
				return
			}
		case <-k.ctx.Done():
			k.Fatalf("%s does not return %s", call, want)
		}
	}
}

// Where a program sleeps: the kernel's function, or the number of the call.
var (
	reading         = "request_wait_answer" // writing, too
	polling         = fmt.Sprintf("^%d ", syscall.SYS_PPOLL)
	waitingForEdges = fmt.Sprintf("^%d ", syscall.SYS_EPOLL_PWAIT)
)

// sleeps waits until a program other than the service sleeps there.
func (c *charDevices) sleeps(where string) {
	c.Helper()
	for !c.asleep(where) {
	}
}

func (c *charDevices) asleep(where string) bool {
	c.Helper()
	r, err := c.guest.Run(c.ctx, "sh", "-c", `
		for p in $(pidof guestprog cat dd); do
			grep -q char-serve /proc/$p/cmdline && continue
			cat /proc/$p/task/*/wchan; echo; cat /proc/$p/task/*/syscall
		done 2>/dev/null | grep -qE '`+where+`'`)
	c.ok(err)
	return r.Code == 0
}

// sleeps waits until the call sleeps there.
func (k *caller) sleeps(where string) {
	k.Helper()
	for !k.asleep(where) {
		select {
		case got := <-k.out.c:
			k.Fatalf("the call returned %s at once", got)
		default:
		}
	}
}

func (k *caller) quit() {
	k.Helper()
	k.in.Close()
	if st, err := k.Wait(k.ctx); err != nil || st.ExitCode() != 0 {
		k.Fatalf("%v, %v: %s", st, err, k.err.String())
	}
}

func charNode(c *charDevices) {
	out := run(c.T, c.guest, 0, "ls", "-l", "/dev/ports")
	if n := strings.Count(out, "crw-------"); n != 4 {
		c.Errorf("character devices of root only: %d, want 4:\n%s", n, out)
	}
	k := c.caller()
	k.calls("open /dev/ports/a", "open")
	other := c.caller()
	other.calls("open /dev/ports/a", "EBUSY", "open /dev/ports/b", "open", "close", "close")
	k.calls("close", "close")
	other.calls("open /dev/ports/a", "open")
	other.quit()
	k.quit()
}

func charRead(c *charDevices) {
	k := c.caller()
	k.calls("open /dev/ports/a", "open", "read 10", `0 ""`) // nobody is there
	p := c.open("a")
	k.until("poll", "OUT")
	k.calls("nonblock on", "nonblock", "read 10", "EAGAIN", "nonblock off", "nonblock")
	k.begin("read 10")
	k.sleeps(reading)
	c.write(p, "hello")
	k.ends(`5 "hello"`)
	// The kernel takes a long read apart: what is there does not wait for more.
	c.write(p, strings.Repeat("x", 128<<10))
	k.until("inq", "131072")
	k.calls("count 1000000", "131072")
	c.write(p, "last")
	c.ok(p.Close())
	k.until("poll", "IN|HUP")
	k.calls("read 2", `2 "la"`, "read 10", `2 "st"`, "read 10", `0 ""`, "read 10", `0 ""`)
	c.ok(p.Open())
	k.until("poll", "OUT")
	k.begin("read 10")
	k.sleeps(reading)
	c.ok(p.Close())
	k.ends(`0 ""`)
	k.quit()
	c.gone(p)
}

func charWrite(c *charDevices) {
	k := c.caller()
	k.calls("open /dev/ports/a", "open", "nonblock on", "nonblock", "write x", "EAGAIN", "nonblock off", "nonblock")
	k.begin("write hello") // nobody is there
	k.sleeps(reading)
	p := c.open("a")
	k.ends("5")
	c.read(p, "hello")
	// It takes no more than its limit.
	c.ok(p.SetLimit(1000))
	k.calls("nonblock on", "nonblock")
	k.until("fill", "ENOSPC") // from EAGAIN on
	k.calls("poll", "", "write x", "ENOSPC", "nonblock off", "nonblock")
	k.begin("write x")
	k.sleeps(reading)
	for b := []byte{0}; b[0] != 'x'; {
		_, err := p.Read(b)
		c.ok(err)
	}
	k.ends("1")
	k.until("poll", "OUT")
	c.ok(p.SetLimit(256 << 10))
	c.ok(p.Close())
	k.quit()
}

func charPoll(c *charDevices) {
	k := c.caller()
	k.calls("open /dev/ports/a", "open", "poll", "IN|HUP", "poll hup", "HUP")
	p := c.open("a")
	k.until("poll", "OUT")
	k.begin("poll in")
	k.sleeps(polling)
	c.write(p, "abc")
	k.ends("IN")
	k.calls("poll", "IN|OUT", "read 10", `3 "abc"`, "poll", "OUT")
	k.begin("poll hup")
	k.sleeps(polling)
	c.ok(p.Close())
	k.ends("HUP")
	c.ok(p.Open())
	k.until("poll", "OUT")
	// By edges: what is left over is told again, what was all read is not.
	c.write(p, "abc")
	k.calls("edge", "IN", "read 1", `1 "a"`, "edge", "IN", "read 10", `2 "bc"`)
	k.begin("edge")
	k.sleeps(waitingForEdges)
	c.write(p, "d")
	k.ends("IN")
	c.ok(p.Close())
	k.quit()
}

func charIoctl(c *charDevices) {
	k := c.caller()
	k.calls("open /dev/ports/tty", "open", "inq", "0", "isatty", "ENOTTY")
	p := c.open("tty")
	c.ok(c.device.Resize(p, console.Size{Cols: 132, Rows: 43}))
	k.until("winsize", "43 rows 132 columns")
	c.ok(p.WaitOpen(c.ctx))
	c.write(p, "12345")
	k.until("inq", "5")
	k.calls("read 2", `2 "12"`, "inq", "3", "close", "close", "open /dev/ports/a", "open", "winsize", "ENOTTY")
	c.ok(p.Close())
	k.quit()
}

func charSignals(c *charDevices) {
	p := c.open("a")
	k := c.caller()
	k.calls("open /dev/ports/a", "open")
	k.until("poll", "OUT")
	k.calls("interrupted", "EINTR")
	c.write(p, "still there")
	k.calls("read 20", `11 "still there"`)
	k.quit()
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		cat := start(c.T, c.guest, "cat", "/dev/ports/a")
		c.sleeps(reading)
		c.ok(cat.Signal(signal))
		cat.end(128 + int(signal))
		c.gone(p)
	}
	c.ok(p.Close())
}

func charPrograms(c *charDevices) {
	p := c.open("a")
	cat := start(c.T, c.guest, "cat", "/dev/ports/a")
	c.sleeps(reading)
	c.write(p, "one line\n")
	if l := cat.line(); l != "one line" {
		c.Errorf("cat: %q", l)
	}
	c.ok(p.Close())
	cat.end(0)
	c.gone(p)
	c.ok(p.Open())
	echo := start(c.T, c.guest, "sh", "-c", "echo hello >/dev/ports/a; dd if=/dev/ports/a bs=1k count=1 status=none")
	c.ok(p.WaitOpen(c.ctx))
	c.read(p, "hello\n")
	c.sleeps(reading)
	c.write(p, "there\n")
	if l := echo.line(); l != "there" {
		c.Errorf("dd: %q", l)
	}
	echo.end(0)
	c.ok(p.Close())
}

// charMuch sends 16 MiB each way at the same time, through one file.
func charMuch(c *charDevices) {
	const size = 16 << 20
	p := c.open("b")
	out := start(c.T, c.guest, "sh", "-ec", `
		exec 3<>/dev/ports/b
		dd if=/dev/urandom of=/tmp/out bs=64k count=256 status=none
		dd if=/tmp/out bs=64k status=none >&3 &
		dd bs=64k count=16777216 iflag=fullblock,count_bytes status=none <&3 | md5sum
		wait $!
		md5sum </tmp/out`)
	c.ok(p.WaitOpen(c.ctx))
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i * 7 >> (i >> 8 & 7))
	}
	wrote := make(chan error, 1)
	begin := time.Now()
	go func() {
		_, err := p.WriteAll(c.ctx, data)
		wrote <- err
	}()
	sum := md5.New()
	_, err := io.CopyN(sum, readerOf{p}, size)
	c.ok(err)
	c.ok(<-wrote)
	took := time.Since(begin)
	for _, want := range [][]byte{func() []byte { s := md5.Sum(data); return s[:] }(), sum.Sum(nil)} {
		if l := out.line(); !strings.HasPrefix(l, fmt.Sprintf("%x ", want)) {
			c.Errorf("sum of the guest %q, want %x", l, want)
		}
	}
	out.end(0)
	c.ok(p.Close())
	c.Logf("%d MiB each way in %v", size>>20, took)
}

// readerOf is a port as nothing but a reader.
type readerOf struct{ io.Reader }

func charRemoved(c *charDevices) {
	p := c.open("c")
	k := c.caller()
	k.calls("open /dev/ports/c", "open")
	k.until("poll", "OUT")
	k.begin("read 10")
	k.sleeps(reading)
	c.ok(c.device.RemovePort(p))
	k.ends("ENODEV")
	k.calls("poll", "HUP", "read 10", "ENODEV", "write x", "ENODEV", "poll hup", "HUP")
	other := c.caller()
	other.calls("open /dev/ports/c", "ENOENT")
	// The name is taken as long as the file is open.
	c.add(console.PortConfig{Name: "c"})
	c.lineBegins("ended ports/c character device ports/c: /sys/class/cuse/ports!c is there already")
	k.calls("close", "close")
	c.lineBegins("ended ports/c <nil>")
	c.ok(c.device.RemovePort(c.device.Lookup("c")))
	c.add(console.PortConfig{Name: "c"})
	c.lineBegins("ready ports/c")
	other.calls("open /dev/ports/c", "open")
	// While it waits by poll; nobody has the other file open.
	p = c.open("c")
	other.until("poll", "OUT")
	other.begin("poll in")
	other.sleeps(polling)
	c.ok(c.device.RemovePort(p))
	other.ends("HUP")
	other.quit()
	c.lineBegins("ended ports/c <nil>")
	k.quit()
}

// charKilled kills the service under an open file, and starts another.
func charKilled(c *charDevices) {
	p := c.open("a")
	k, poller := c.caller(), c.caller()
	k.calls("open /dev/ports/a", "open")
	poller.calls("open /dev/ports/b", "open")
	k.until("poll", "OUT")
	q := c.open("b")
	poller.until("poll", "OUT")
	k.begin("read 10")
	k.sleeps(reading)
	poller.begin("poll in")
	poller.sleeps(polling)
	c.ok(c.service.Signal(syscall.SIGKILL))
	c.service.end(128 + 9)
	k.ends("ECONNABORTED")
	poller.ends("ERR")
	k.calls("read 10", "ENOTCONN", "write x", "ENOTCONN", "poll", "ERR", "close", "close", "open /dev/ports/a", "ENOENT")
	run(c.T, c.guest, 1, "ls", "/dev/ports/a")
	poller.quit()
	c.start()
	for range 3 {
		c.lineBegins("ready ports/")
	}
	k.calls("open /dev/ports/a", "open")
	c.ok(p.WaitOpen(c.ctx))
	c.write(p, "again")
	k.until("poll", "IN|OUT")
	k.calls("read 10", `5 "again"`)
	k.quit()
	c.ok(p.Close())
	c.ok(q.Close())
}

func charEnded(c *charDevices) {
	p := c.open("a")
	k := c.caller()
	k.calls("open /dev/ports/a", "open")
	k.until("poll", "OUT")
	k.begin("read 10")
	k.sleeps(reading)
	c.ok(c.service.Signal(syscall.SIGTERM))
	k.ends("ENODEV")
	c.service.end(0)
	c.gone(p)
	k.calls("read 10", "ENOTCONN", "open /dev/ports/a", "ENOENT")
	k.quit()
	c.ok(p.Close())
}

// charCommand has the ports where the command puts them.
func charCommand(c *charDevices) {
	c.service = start(c.T, c.guest, "ivshctl", "ports", "serve", "--dir", "/run/ports", "--port", "*,as=char")
	for range 3 { // port c was removed
		c.lineBegins("ready /run/ports/")
	}
	p := c.open("a")
	k := c.caller()
	k.calls("open /run/ports/a", "open")
	k.until("poll", "OUT")
	c.write(p, "hello")
	k.until("inq", "5")
	k.calls("read 10", `5 "hello"`, "write there", "5")
	c.read(p, "there")
	k.begin("read 10")
	k.sleeps(reading)
	c.ok(c.device.RemovePort(p))
	k.ends("ENODEV")
	c.lineBegins("gone /run/ports/a")
	k.calls("poll", "HUP", "write x", "ENODEV")
	other := c.caller()
	other.calls("open /run/ports/a", "ENOENT")
	// A new one of that name does not wait until the file of the old is closed.
	c.add(console.PortConfig{Name: "a"})
	c.lineBegins("ready /run/ports/a")
	p = c.open("a")
	other.calls("open /run/ports/a", "open")
	k.calls("poll", "HUP", "close", "close")
	other.until("poll", "OUT")
	other.begin("read 10")
	other.sleeps(reading)
	c.write(p, "new")
	other.ends(`3 "new"`)
	k.quit()
	other.quit()
	c.ok(c.service.Signal(syscall.SIGTERM))
	c.service.end(0)
	run(c.T, c.guest, 1, "sh", "-c", "ls -d /dev/ivport*")
}
