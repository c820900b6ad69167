package block_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio/block"
)

// Requests of several goroutines to a file that is in the page cache.
func BenchmarkDisk(b *testing.B) {
	const imageSize, flight = 16 << 20, 8
	d := newDisk(b, newImage(b, imageSize), 8<<20, block.Config{})
	for _, size := range []int{4 << 10, 64 << 10} {
		for _, write := range []bool{false, true} {
			b.Run(fmt.Sprintf("write=%v/%d", write, size), func(b *testing.B) {
				b.SetBytes(int64(size))
				b.ReportAllocs()
				var left atomic.Int64
				left.Store(int64(b.N))
				var group sync.WaitGroup
				for range flight {
					group.Go(func() {
						p := make([]byte, size)
						for left.Add(-1) >= 0 {
							at := rand.Int64N(imageSize/int64(size)) * int64(size)
							var err error
							if write {
								_, err = d.WriteAt(p, at)
							} else {
								_, err = d.ReadAt(p, at)
							}
							if err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				group.Wait()
			})
		}
	}
}
