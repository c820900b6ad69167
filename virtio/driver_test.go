package virtio_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/block"
	"github.com/ivshmem-go/ivshmem/virtio/entropy"
)

// openDriver opens a driver without features of its own.
func openDriver(t testing.TB, b *board, w wiring) *virtio.Driver {
	t.Helper()
	d, err := virtio.Open(t.Context(), b.Device(t, 1, w), virtio.DriverConfig{ID: entropy.ID})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// started is a driver with queues that runs.
func started(t testing.TB, b *board, w wiring, entries ...int) (*virtio.Driver, []*virtio.DriverQueue) {
	t.Helper()
	d := openDriver(t, b, w)
	var queues []*virtio.DriverQueue
	for i, n := range entries {
		q, err := d.SetUpQueue(t.Context(), i, n)
		if err != nil {
			t.Fatal(err)
		}
		queues = append(queues, q)
	}
	if err := d.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d, queues
}

func alloc(t testing.TB, d *virtio.Driver, n int) *virtio.Buffer {
	t.Helper()
	b, err := d.Alloc(n)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ask sends a request and checks that it comes back turned around.
func ask(t testing.TB, q *virtio.DriverQueue, b *virtio.Buffer, number int) {
	t.Helper()
	out := fmt.Appendf(nil, "request %d", number)
	if _, err := b.WriteAt(out, 0); err != nil {
		t.Fatal(err)
	}
	if err := q.Add(b, virtio.Out(0, 4), virtio.Out(4, len(out)-4), virtio.In(32, 3), virtio.In(35, 29)); err != nil {
		t.Fatal(err)
	}
	if err := q.Kick(); err != nil {
		t.Fatal(err)
	}
	got, n, err := q.Next(t.Context())
	if err != nil || got != b || n != len(out) {
		t.Fatalf("%d bytes of %p, %v, want %d of %p", n, got, err, len(out), b)
	}
	in := make([]byte, n)
	if _, err := b.ReadAt(in, 32); err != nil {
		t.Fatal(err)
	}
	slices.Reverse(out)
	if !bytes.Equal(in, out) {
		t.Fatalf("%q, want %q", in, out)
	}
}

// Driver and device work with each other whatever the link is like.
func TestDriver(t *testing.T) {
	t.Parallel()
	for _, vectors := range []int{1, 2, 3, 16} {
		for _, w := range []wiring{apart, merged, oneShots, silent, vector0} {
			t.Run(fmt.Sprintf("%d vectors, wiring %d", vectors, w), func(t *testing.T) {
				t.Parallel()
				b := newBoard(t, protocol, 0x8000, vectors)
				s := serve(t, b.Device(t, 0, apart), echo(8, 64, 4))
				for range 2 {
					d, queues := started(t, b, w, 8, 100, 7)
					if queues[0].Size() != 8 || queues[1].Size() != 64 || queues[2].Size() != 4 {
						t.Errorf("sizes %d, %d, %d", queues[0].Size(), queues[1].Size(), queues[2].Size())
					}
					if want := virtio.Version1 | virtio.AccessPlatform | virtio.OrderPlatform | virtio.IndirectDesc | virtio.EventIdx; d.Features() != want {
						t.Errorf("features %#x, want %#x", d.Features(), want)
					}
					buf := alloc(t, d, 64)
					for i := range 30 {
						ask(t, queues[i%3], buf, i)
					}
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
				}
				if n := s.Stats(); n.Violations != 0 {
					t.Errorf("%+v", n)
				}
			})
		}
	}
}

// The driver works with the page's example back-ends, on links that have fewer
// vectors than they announce, too.
func TestDriverAgainstExample(t *testing.T) {
	t.Parallel()
	for _, vectors := range []int{1, 2, 3} {
		b := newBoard(t, protocol, 0x8000, vectors)
		e := newExample(t, b, 2, make([]byte, 12), nil)
		e.handle = func(_ int, s []exampleSegment) uint32 {
			if len(s) != 4 || s[0].write || s[1].write || !s[2].write || !s[3].write {
				t.Errorf("segments %+v", s)
				return 0
			}
			out := slices.Concat(e.m[s[0].at:s[0].at+uint64(s[0].n)], e.m[s[1].at:s[1].at+uint64(s[1].n)])
			slices.Reverse(out)
			copy(e.m[s[2].at:], out)
			return uint32(len(out))
		}
		for range 3 {
			d, queues := started(t, b, apart, 8, 8)
			if d.Features() != virtio.Version1|virtio.AccessPlatform|virtio.OrderPlatform {
				t.Errorf("features %#x", d.Features())
			}
			buf := alloc(t, d, 64)
			for i := range 30 {
				ask(t, queues[i%2], buf, i)
			}
			d.Close()
		}
		e.end()
	}
}

// The disk works with the page's block back-end, which ends itself at a header
// that is not one descriptor of 16 bytes, or a status that is not one byte.
func TestDiskAgainstExample(t *testing.T) {
	t.Parallel()
	b := newBoard(t, 0x8002, 0xdf000, 2)
	data := bytes.Repeat([]byte{1, 2, 3, 4}, 64<<10)
	config := make([]byte, 60)
	binary.LittleEndian.PutUint64(config, uint64(len(data)/512))
	binary.LittleEndian.PutUint32(config[8:], 0xdf000/8&^4095)
	binary.LittleEndian.PutUint32(config[12:], 1)
	e := newExample(t, b, 1, config, nil)
	e.low = sizeMax | segMax | flush
	e.handle = func(_ int, s []exampleSegment) uint32 {
		last := s[len(s)-1]
		if s[0].n != 16 || s[0].write || last.n != 1 || !last.write || len(s) > 3 {
			t.Errorf("segments %+v", s)
			return 0
		}
		at := 512 * binary.LittleEndian.Uint64(e.m[s[0].at+8:])
		put8(e.m, last.at, 0)
		switch kind := get32(e.m, s[0].at); kind {
		case 0:
			return 1 + uint32(copy(e.m[s[1].at:s[1].at+uint64(s[1].n)], data[at:]))
		case 1:
			copy(data[at:], e.m[s[1].at:s[1].at+uint64(s[1].n)])
		case 4:
		case 8:
			put8(e.m, s[1].at, 0)
		default:
			put8(e.m, last.at, 2)
		}
		return 1
	}
	d, err := block.Open(t.Context(), b.Device(t, 1, apart))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.WriteAt(bytes.Repeat([]byte{9}, 200<<10), 1024); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 210<<10)
	if _, err := d.ReadAt(got, 3); err != nil || !bytes.Equal(got, data[3:3+len(got)]) || got[1021] != 9 {
		t.Errorf("read %v", err)
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	if s, err := d.Serial(); s != "" || err != nil {
		t.Errorf("serial %q, %v", s, err)
	}
	if err := d.Discard(0, 512); !errors.Is(err, block.ErrUnsupported) {
		t.Error(err)
	}
	if n, err := d.ReadAt(got, d.Size()-5); n != 5 || err != io.EOF {
		t.Errorf("%d bytes, %v at the end", n, err)
	}
}

// The end of the back-end ends everything, wherever the driver waits.
func TestDriverEnds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		end  func(b *board, e *example, d *virtio.Driver)
		want error
	}{
		"back-end leaves": {func(_ *board, e *example, _ *virtio.Driver) { e.end() }, virtio.ErrBackEndGone},
		"back-end dies":   {func(b *board, _ *example, _ *virtio.Driver) { b.Kill(0) }, virtio.ErrBackEndGone},
		"closed":          {func(_ *board, _ *example, d *virtio.Driver) { d.Close() }, os.ErrClosed},
		"device closed":   {func(_ *board, _ *example, d *virtio.Driver) { d.Device().Close() }, os.ErrClosed},
		"needs reset": {func(b *board, e *example, _ *virtio.Driver) {
			put32(b.ReadWrite(), 0x44, 0x4f)
			put8(b.ReadWrite(), 0x40, 1)
			e.p.Store(0x0c, 1<<16)
		}, virtio.ErrNeedsReset},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBoard(t, protocol, 0x8000, 2)
			e := newExample(t, b, 2, make([]byte, 12), func(int, []exampleSegment) uint32 { select {} })
			e.handle = func(int, []exampleSegment) uint32 { return 0 }
			d, queues := started(t, b, apart, 8, 8)
			ended := make(chan error, 3)
			go func() { _, _, err := queues[0].Next(t.Context()); ended <- err }()
			go func() { _, _, err := queues[1].Next(t.Context()); ended <- err }()
			go func() {
				err := d.ConfigChanged(t.Context())
				for err == nil {
					err = d.ConfigChanged(t.Context())
				}
				ended <- err
			}()
			c.end(b, e, d)
			for range 3 {
				if err := <-ended; !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
			}
			if name == "device closed" {
				return
			}
			buf, err := d.Alloc(8)
			if err == nil {
				err = queues[0].Add(buf, virtio.Out(0, 8))
			}
			if !errors.Is(err, c.want) {
				t.Errorf("afterwards: %v, want %v", err, c.want)
			}
		})
	}
}

// A back-end that answers nothing holds a driver up until its context ends, and
// no longer.
func TestDriverContext(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, 0x8000, 2)
	ctx, cancel := context.WithCancel(t.Context())
	opened := make(chan error, 1)
	dev := b.Device(t, 1, apart)
	go func() { // there is no back-end
		_, err := virtio.Open(ctx, dev, virtio.DriverConfig{ID: entropy.ID})
		opened <- err
	}()
	cancel()
	if err := <-opened; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	e := newExample(t, b, 1, make([]byte, 12), nil)
	e.hung.Store(true)
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		_, err := virtio.Open(ctx, dev, virtio.DriverConfig{ID: entropy.ID})
		opened <- err
	}()
	until(t, "a register write", func() bool { return get32(b.ReadWrite(), 8) != 0 })
	cancel()
	if err := <-opened; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// Configuration space: reads wait while it changes, writes are transactions, and
// changes are told.
func TestDriverConfig(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, 0x8000, 2)
	written := make(chan string, 1)
	dev := echo(8)
	dev.Config = []byte("0123456789ab")
	dev.ConfigWritten = func(offset int, value []byte) { written <- fmt.Sprint(offset, " ", string(value)) }
	s := serve(t, b.Device(t, 0, apart), dev)
	d, _ := started(t, b, apart, 8)
	p := make([]byte, 12)
	if err := d.ReadConfig(t.Context(), p, 0); err != nil || string(p) != "0123456789ab" {
		t.Errorf("%q, %v", p, err)
	}
	if err := d.WriteConfig(t.Context(), []byte("WXYZ"), 8); err != nil {
		t.Error(err)
	}
	if w := <-written; w != "8 WXYZ" {
		t.Errorf("%q", w)
	}
	if err := s.SetConfig(0, []byte("AB")); err != nil {
		t.Error(err)
	}
	if err := d.ConfigChanged(t.Context()); err != nil {
		t.Error(err)
	}
	if err := d.ReadConfig(t.Context(), p[:4], 0); err != nil || string(p[:4]) != "AB23" {
		t.Errorf("%q, %v", p, err)
	}
	put32(b.ReadWrite(), 0x48, 7) // a change that does not end
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.ReadConfig(ctx, p, 0); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	for _, bad := range []struct{ offset, n int }{{-1, 1}, {12, 1}, {0, 13}} {
		if d.ReadConfig(ctx, make([]byte, bad.n), bad.offset) == nil || d.WriteConfig(ctx, make([]byte, bad.n), bad.offset) == nil {
			t.Errorf("%+v is inside", bad)
		}
	}
}

// What a buffer was used for does not show in the next use, nor does what a
// freed one held.
func TestBuffersAreZeroed(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, 0x8000, 2)
	e := newExample(t, b, 1, make([]byte, 12), nil)
	e.handle = func(_ int, s []exampleSegment) uint32 { return s[len(s)-1].n } // says that it wrote, and does not
	d, queues := started(t, b, apart, 8)
	first := alloc(t, d, 100)
	first.WriteAt(bytes.Repeat([]byte("secret"), 16), 0)
	if err := queues[0].Add(first, virtio.In(10, 60)); err != nil {
		t.Fatal(err)
	}
	queues[0].Kick()
	if _, n, err := queues[0].Next(t.Context()); n != 60 || err != nil {
		t.Fatal(n, err)
	}
	p := make([]byte, 100)
	first.ReadAt(p, 0)
	if !bytes.Equal(p[10:70], make([]byte, 60)) || p[9] == 0 || p[70] == 0 {
		t.Errorf("%q", p)
	}
	first.Free()
	alloc(t, d, 100).ReadAt(p, 0)
	if !bytes.Equal(p, make([]byte, 100)) {
		t.Errorf("%q", p)
	}
}

// Memory is given out once, returned and joined; what does not fit says so.
func TestSpace(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, 0x2000, 2)
	newExample(t, b, 1, make([]byte, 12), nil)
	d := openDriver(t, b, apart)
	var e *virtio.SpaceError
	if _, err := d.Alloc(0x2000); !errors.As(err, &e) || e.Need != 0x2000 || e.Free != 0x2000-128 {
		t.Errorf("%v", err)
	}
	whole := alloc(t, d, 0x2000-128)
	if _, err := d.Alloc(1); !errors.As(err, &e) || e.Free != 0 {
		t.Errorf("%v", err)
	}
	if _, err := d.SetUpQueue(t.Context(), 0, 8); !errors.As(err, &e) {
		t.Errorf("%v", err)
	}
	whole.Free()
	for round := range 3 {
		var all []*virtio.Buffer
		for i := 0; ; i++ {
			buf, err := d.Alloc(1 + (i*37+round)%200)
			if err != nil {
				break
			}
			buf.WriteAt(bytes.Repeat([]byte{byte(i)}, buf.Size()), 0)
			all = append(all, buf)
		}
		for i, buf := range all {
			p := make([]byte, buf.Size())
			if buf.ReadAt(p, 0); !bytes.Equal(p, bytes.Repeat([]byte{byte(i)}, len(p))) {
				t.Fatalf("buffer %d is another's, too", i)
			}
		}
		for first := range 3 {
			for i := (first + round) % 3; i < len(all); i += 3 {
				all[i].Free()
			}
		}
		alloc(t, d, 0x2000-128).Free()
	}
	if _, err := d.Alloc(0); err == nil {
		t.Error("a buffer of nothing")
	}
}

// Uses of a queue that make no sense are refused before the device sees them.
func TestAddRefuses(t *testing.T) {
	t.Parallel()
	b := newBoard(t, protocol, 0x8000, 2)
	e := newExample(t, b, 2, make([]byte, 12), nil)
	e.hung.Store(false)
	e.handle = func(int, []exampleSegment) uint32 { return 0 }
	d := openDriver(t, b, apart)
	q, err := d.SetUpQueue(t.Context(), 0, 4)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.SetUpQueue(t.Context(), 0, 4); err == nil {
		t.Error("set up twice")
	}
	buf := alloc(t, d, 64)
	for _, bad := range [][]virtio.Segment{
		{}, {virtio.Out(-1, 1)}, {virtio.Out(0, 0)}, {virtio.Out(64, 1)}, {virtio.In(1, 64)}, {virtio.In(1, -1)},
		{virtio.In(0, 1), virtio.Out(1, 1)}, {virtio.Out(0, 1), virtio.Out(0, 1), virtio.Out(0, 1), virtio.Out(0, 1), virtio.Out(0, 1)},
		{virtio.Out(1<<62, 1<<62)},
	} {
		if err := q.Add(buf, bad...); err == nil || errors.Is(err, virtio.ErrQueueFull) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if err := q.Add(buf, virtio.Out(0, 1), virtio.Out(1, 1), virtio.In(2, 1)); err != nil {
		t.Fatal(err)
	}
	if err := q.Add(buf, virtio.Out(0, 1)); err == nil {
		t.Error("added twice")
	}
	other := alloc(t, d, 64)
	if err := q.Add(other, virtio.Out(0, 1), virtio.In(2, 1)); !errors.Is(err, virtio.ErrQueueFull) {
		t.Errorf("%v", err)
	}
	if err := q.Add(other, virtio.Out(0, 1)); err != nil {
		t.Error(err)
	}
}
