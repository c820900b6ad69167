package compare

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// ends attaches both ends of a contestant in this process.
func ends(t *testing.T, c *Contestant, size int) (e [2]End) {
	t.Helper()
	files, err := c.Open(size)
	if err != nil {
		t.Fatal(err)
	}
	for i := range e {
		var fds []int
		for _, f := range files[i] {
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
			f.Close()
		}
		if e[i], err = c.Attach(Side{Index: i, Size: size, Files: fds, Yield: true}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := e[i].Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return e
}

// content is the bytes of message i: random, and never the same twice in a row.
func content(seed uint64, i, size int) []byte {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(i), byte(i >> 8)})
	p := make([]byte, size)
	r.Read(p)
	return p
}

func sizes(c *Contestant) (out []int) {
	for _, size := range []int{8, 57, 64, 4096, 100000, 300000} {
		if c.Takes(size) {
			out = append(out, size)
		}
	}
	return out
}

// TestRoundTrips sends back what arrives, and compares every byte.
func TestRoundTrips(t *testing.T) {
	for _, c := range Contestants {
		for _, size := range sizes(c) {
			t.Run(fmt.Sprintf("%s/%d", c.Name, size), func(t *testing.T) {
				e := ends(t, c, size)
				n := 3*slots(size) + 1 // around every ring
				answered := make(chan error, 1)
				go func() {
					p := make([]byte, size)
					for i := range n {
						if err := e[1].Receive(p); err != nil {
							answered <- err
							return
						}
						if !bytes.Equal(p, content(1, i, size)) {
							t.Errorf("message %d did not arrive as it was sent", i)
						}
						if err := e[1].Send(content(2, i, size)); err != nil {
							answered <- err
							return
						}
					}
					answered <- nil
				}()
				p := make([]byte, size)
				for i := range n {
					if err := e[0].Send(content(1, i, size)); err != nil {
						t.Fatal(err)
					}
					if err := e[0].Receive(p); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(p, content(2, i, size)) {
						t.Fatalf("answer %d did not arrive as it was sent", i)
					}
				}
				if err := <-answered; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestOneWay sends without waiting for anything, and compares every byte.
func TestOneWay(t *testing.T) {
	for _, c := range Contestants {
		if !c.OneWay {
			continue
		}
		for _, size := range sizes(c) {
			t.Run(fmt.Sprintf("%s/%d", c.Name, size), func(t *testing.T) {
				e := ends(t, c, size)
				n := 3*slots(size) + 1
				sent := make(chan error, 1)
				go func() {
					for i := range n {
						if err := e[1].Send(content(3, i, size)); err != nil {
							sent <- err
							return
						}
					}
					sent <- nil
				}()
				p := make([]byte, size)
				for i := range n {
					if err := e[0].Receive(p); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(p, content(3, i, size)) {
						t.Fatalf("message %d did not arrive as it was sent", i)
					}
				}
				if err := <-sent; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestDescriptors looks for descriptors that stay.
func TestDescriptors(t *testing.T) {
	count := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	before := count()
	for _, c := range Contestants {
		t.Run(c.Name, func(t *testing.T) {
			ends(t, c, sizes(c)[0])
		})
	}
	if after := count(); after > before+1 { // the poller's own
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// TestAttachFails gives an end descriptors that are none of its kind.
func TestAttachFails(t *testing.T) {
	for _, name := range []string{"memory", "tcp-go"} {
		c, err := Find(name)
		if err != nil {
			t.Fatal(err)
		}
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(p[1])
		fd := p[0]
		if _, err := c.Attach(Side{Size: 64, Files: p[:1]}); err == nil {
			t.Errorf("%s: attached to a pipe", name)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			t.Errorf("%s: left its descriptor open", name)
		}
	}
	if _, err := Find("carrier pigeon"); err == nil {
		t.Error("found a contestant that there is not")
	}
}
