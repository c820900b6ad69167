package vfiouser_test

import (
	"runtime"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

// BenchmarkRegisterRead is a 4-byte REGION_READ between the two halves, each
// on its own thread. In the same run a bare pair of threads passes as many
// bytes to and fro over a socket pair, with one system call per direction and
// side: the machine's own limit. x-bare is the ratio of the two.
func BenchmarkRegisterRead(b *testing.B) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p := newHalves(b)
	var reg [4]byte
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if err := p.ReadRegion(vfiouser.RegionBAR0, 4, reg[:]); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	ours := float64(b.Elapsed().Nanoseconds()) / float64(b.N)
	bare := float64(pingPong(b, b.N, 16+16, 16+16+4).Nanoseconds()) / float64(b.N)
	b.ReportMetric(bare, "bare-ns/op")
	b.ReportMetric(ours/bare, "x-bare")
}

// pingPong is the time of n rounds of request and reply over a blocking
// socket pair.
func pingPong(b *testing.B, n, request, reply int) time.Duration {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer closeAll(fds[:])
	ready, done := make(chan bool), make(chan bool)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		in, out := make([]byte, request), make([]byte, reply)
		close(ready)
		for range n {
			if k, err := unix.Read(fds[1], in); k != request || err != nil {
				b.Error(k, err)
			}
			if k, err := unix.Write(fds[1], out); k != reply || err != nil {
				b.Error(k, err)
			}
		}
		close(done)
	}()
	<-ready
	in, out := make([]byte, reply), make([]byte, request)
	start := time.Now()
	for range n {
		if k, err := unix.Write(fds[0], out); k != request || err != nil {
			b.Fatal(k, err)
		}
		if k, err := unix.Read(fds[0], in); k != reply || err != nil {
			b.Fatal(k, err)
		}
	}
	elapsed := time.Since(start)
	<-done
	return elapsed
}
