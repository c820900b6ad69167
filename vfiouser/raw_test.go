package vfiouser_test

// The tools of the tests: a peer that knows only bytes. It is written from the
// protocol's description and uses nothing of the package, so that a mistake in
// the codec cannot hide in both ends.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A test that waits this long for the other end has failed.
const patience = 20 * time.Second

// max32 is 2^32-1 where cat takes an int for a 32-bit field.
const max32 = -1

// cat joins little-endian integers, strings and bytes.
func cat(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch v := p.(type) {
		case byte:
			b = append(b, v)
		case uint16:
			b = binary.LittleEndian.AppendUint16(b, v)
		case uint32:
			b = binary.LittleEndian.AppendUint32(b, v)
		case int:
			b = binary.LittleEndian.AppendUint32(b, uint32(v))
		case uint64:
			b = binary.LittleEndian.AppendUint64(b, v)
		case string:
			b = append(b, v...)
		case []byte:
			b = append(b, v...)
		default:
			panic(fmt.Sprintf("cat: %T", p))
		}
	}
	return b
}

// message is a command with the given payload.
func message(id, cmd uint16, payload ...any) []byte {
	p := cat(payload...)
	return cat(id, cmd, 16+len(p), 0, 0, p)
}

// answer is a reply with the given payload.
func answer(id, cmd uint16, payload ...any) []byte {
	p := cat(payload...)
	return cat(id, cmd, 16+len(p), 1, 0, p)
}

func errorAnswer(id, cmd uint16, errno unix.Errno) []byte {
	return cat(id, cmd, 16, 0x21, int(errno))
}

// rawPeer is one end of a connection.
type rawPeer struct {
	t  testing.TB
	fd int
}

// newPair returns a raw end and the other one for the package.
func newPair(t testing.TB) (*rawPeer, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[1]), "socketpair")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	tv := unix.NsecToTimeval(int64(patience))
	unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
	p := &rawPeer{t, fds[0]}
	t.Cleanup(p.close)
	return p, c.(*net.UnixConn)
}

func (p *rawPeer) close() {
	if p.fd >= 0 {
		unix.Close(p.fd)
		p.fd = -1
	}
}

// write sends b at once, with descriptors.
func (p *rawPeer) write(b []byte, fds ...int) {
	p.t.Helper()
	if err := p.tryWrite(b, fds...); err != nil {
		p.t.Fatalf("write of %d bytes: %v", len(b), err)
	}
}

func (p *rawPeer) tryWrite(b []byte, fds ...int) error {
	var control []byte
	if len(fds) > 0 {
		control = unix.UnixRights(fds...)
	}
	for len(b) > 0 {
		n, err := unix.SendmsgN(p.fd, b, control, nil, unix.MSG_NOSIGNAL)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b, control = b[n:], nil
	}
	return nil
}

// readFull reads n bytes, or fewer at the end of the stream, and descriptors.
func (p *rawPeer) readFull(n int) (b []byte, fds []int, err error) {
	b = make([]byte, n)
	oob := make([]byte, 2048)
	done := 0
	for done < n {
		k, oobn, _, _, err := unix.Recvmsg(p.fd, b[done:], oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return b[:done], fds, err
		}
		if k == 0 {
			break
		}
		done += k
		messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for _, m := range messages {
			got, _ := unix.ParseUnixRights(&m)
			fds = append(fds, got...)
		}
	}
	return b[:done], fds, nil
}

// read reads one message and closes its descriptors at the end of the test.
func (p *rawPeer) read() (header, payload []byte, fds []int) {
	p.t.Helper()
	header, fds, err := p.readFull(16)
	if err != nil || len(header) < 16 {
		p.t.Fatalf("a header was expected, found %x (%v)", header, err)
	}
	size := binary.LittleEndian.Uint32(header[4:])
	if size < 16 || size > 2<<20 {
		p.t.Fatalf("impossible size in header %x", header)
	}
	payload, more, err := p.readFull(int(size) - 16)
	if err != nil || len(payload) != int(size)-16 {
		p.t.Fatalf("payload of %d bytes expected, found %d (%v)", size-16, len(payload), err)
	}
	fds = append(fds, more...)
	p.t.Cleanup(func() { closeAll(fds) })
	return header, payload, fds
}

// expect reads one message, which must have exactly these bytes, and returns
// its descriptors.
func (p *rawPeer) expect(want []byte) []int {
	p.t.Helper()
	header, payload, fds := p.read()
	if got := append(header, payload...); !bytes.Equal(got, want) {
		p.t.Fatalf("message\n   found %x\nexpected %x", got, want)
	}
	return fds
}

// expectClosed requires that nothing more comes and the other end is closed.
func (p *rawPeer) expectClosed() {
	p.t.Helper()
	b, fds, err := p.readFull(1)
	closeAll(fds)
	if len(b) != 0 || err != nil && err != unix.ECONNRESET {
		p.t.Fatalf("the connection should be closed, found byte %x, error %v", b, err)
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// eventfd returns a non-blocking eventfd that is closed at the end of the test.
func eventfd(t testing.TB, value uint) int {
	t.Helper()
	fd, err := unix.Eventfd(value, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// counter reads and clears an eventfd; 0 if it is not signalled.
func counter(fd int) uint64 {
	var b [8]byte
	if _, err := unix.Read(fd, b[:]); err != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

// memfd returns a file of the given size that is closed at the end of the test.
func memfd(t testing.TB, size int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("vfiouser test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// sameFile says whether two descriptors are the same open file's inode.
func sameFile(t testing.TB, a, b int) bool {
	t.Helper()
	var sa, sb unix.Stat_t
	if err := unix.Fstat(a, &sa); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstat(b, &sb); err != nil {
		t.Fatal(err)
	}
	return sa.Dev == sb.Dev && sa.Ino == sb.Ino
}

// checkLeaks fails the test if, after all clean-up registered later, more
// descriptors are open than now. Call it first.
func checkLeaks(t testing.TB) {
	t.Helper()
	warmUp(t)
	before := openFDs(t)
	t.Cleanup(func() {
		after := openFDs(t)
		for fd, what := range after {
			if _, ok := before[fd]; !ok {
				t.Errorf("descriptor %s leaked: %s", fd, what)
			}
		}
	})
}

// warmUp makes Go's runtime open the descriptors of its poller.
func warmUp(t testing.TB) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
}

func openFDs(t testing.TB) map[string]string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]string)
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			m[e.Name()] = target
		}
	}
	return m
}
