package vfiouser_test

import (
	"bytes"
	"errors"
	"math"
	"testing"

	"github.com/ivshmem-go/ivshmem/vfiouser"
	"golang.org/x/sys/unix"
)

// exchange is one request with its expected answer. Names of libvfio-user's
// own tests are kept where a case is the same. errno 0 means success with the
// given reply payload.
type exchange struct {
	name    string
	cmd     uint16
	request []byte
	errno   unix.Errno
	reply   []byte
}

func ok(name string, cmd uint16, request, reply []byte) exchange {
	return exchange{name, cmd, request, 0, reply}
}

func invalid(name string, cmd uint16, request ...any) exchange {
	return exchange{name, cmd, cat(request...), unix.EINVAL, nil}
}

// run does all exchanges on one connection: an error must not hurt the next.
func (s *served) run(t *testing.T, list []exchange) {
	t.Helper()
	for i, e := range list {
		id := uint16(i)
		s.write(message(id, e.cmd, e.request))
		want := answer(id, e.cmd, e.reply)
		if e.errno != 0 {
			want = errorAnswer(id, e.cmd, e.errno)
		}
		header, payload, fds := s.read()
		if got := append(header, payload...); !bytes.Equal(got, want) {
			t.Errorf("%s:\n   found %x\nexpected %x", e.name, got, want)
		}
		if len(fds) != 0 {
			t.Errorf("%s: %d descriptors", e.name, len(fds))
		}
		if len(header)+len(payload) > max(16+len(e.request), 32) && e.cmd != 9 && e.cmd != 5 && e.cmd != 6 {
			t.Errorf("%s: the reply is longer than the request: QEMU drops it", e.name)
		}
	}
	s.alive()
}

func TestDeviceInfo(t *testing.T) {
	greeted(t).run(t, []exchange{
		invalid("8-byte payload", 4, 16, 0),
		invalid("15-byte payload", 4, make([]byte, 15)),
		invalid("argsz 8", 4, 8, 0, 0, 0),
		invalid("argsz 15", 4, 15, 0, 0, 0),
		ok("argsz 16", 4, cat(16, 0, 0, 0), cat(16, 3, 9, 5)),
		ok("argsz 32, 16-byte payload", 4, cat(32, 0, 0, 0), cat(16, 3, 9, 5)),
		ok("longer payload", 4, cat(16, 0, 0, 0, 99), cat(16, 3, 9, 5)),
	})
}

func TestRegionInfo(t *testing.T) {
	request := func(argsz, index int) []byte {
		return cat(argsz, 0, index, 0, uint64(0), uint64(0))
	}
	none := func(index int) []byte { return cat(32, 0, index, 0, uint64(0), uint64(0)) }
	s := greeted(t)
	s.run(t, []exchange{
		invalid("short_write", 5, 32, 0),
		invalid("31-byte payload", 5, request(32, 0)[:31]),
		invalid("bad_argsz", 5, request(8, 1)),
		invalid("argsz 31", 5, request(31, 1)),
		invalid("bad_index", 5, request(32, 9)),
		invalid("index 2^32-1", 5, request(32, max32)),
		ok("larger_argsz", 5, request(40, 0), cat(32, 3, 0, 0, uint64(4096), uint64(0))),
		ok("config space", 5, request(40, 7), cat(32, 3, 7, 0, uint64(256), uint64(0))),
		ok("zero_size BAR3", 5, request(32, 3), none(3)),
		ok("zero_size VGA", 5, request(4096, 8), none(8)),
		ok("small_argsz_caps", 5, request(32, 2), cat(80, 7, 2, 0, uint64(4*fakePage), uint64(fakePage))),
		ok("argsz one too small", 5, request(79, 2), cat(80, 7, 2, 0, uint64(4*fakePage), uint64(fakePage))),
	})
	// The full answer brings one descriptor, as often as it is asked for.
	full := answer(1, 5, 80, 15, 2, 32, uint64(4*fakePage), uint64(fakePage),
		uint16(1), uint16(1), 0, 2, 0,
		uint64(fakePage), uint64(fakePage), uint64(3*fakePage), uint64(fakePage))
	for _, req := range [][]byte{request(80, 2), append(request(80, 2), make([]byte, 48)...), request(1<<30, 2)} {
		s.write(message(1, 5, req))
		if fds := s.expect(full); len(fds) != 1 || !sameFile(t, fds[0], s.dev.mem) {
			t.Errorf("descriptors %v", fds)
		}
	}
	// Mappable as a whole: no capability, the descriptor comes at once.
	s.write(message(2, 5, request(32, 4)))
	if fds := s.expect(answer(2, 5, 32, 5, 4, 0, uint64(2*fakePage), uint64(0))); len(fds) != 1 || !sameFile(t, fds[0], s.dev.mem) {
		t.Errorf("descriptors %v", fds)
	}
}

func TestRegionInfoLarge(t *testing.T) {
	s := greeted(t, func(f *fake) {
		f.regions[0] = vfiouser.Region{Flags: 3, Size: 4 << 30}
		f.regions[2] = vfiouser.Region{Flags: 3, Size: 8 << 30}
	})
	for i, size := range map[int]uint64{0: 4 << 30, 2: 8 << 30} {
		s.write(message(1, 5, 32, 0, i, 0, uint64(0), uint64(0)))
		s.expect(answer(1, 5, 32, 3, i, 0, size, uint64(0)))
	}
	// A large region does not make large messages.
	s.run(t, []exchange{
		invalid("large_count", 9, uint64(0), 2, 1<<20+8),
		invalid("count 2^32-1", 9, uint64(0), 2, max32),
	})
}

// TestRegionInfoWithoutDescriptors: a client that can take none gets none.
func TestRegionInfoWithoutDescriptors(t *testing.T) {
	s := serve(t, vfiouser.ServerOptions{})
	s.greet(`{"capabilities":{"max_msg_fds":0}}`)
	s.run(t, []exchange{
		ok("BAR4", 5, cat(32, 0, 4, 0, uint64(0), uint64(0)), cat(32, 5, 4, 0, uint64(2*fakePage), uint64(0))),
	})
}

func TestIOFDs(t *testing.T) {
	s := greeted(t, func(f *fake) {
		a, b := eventfd(f.t, 0), eventfd(f.t, 0)
		f.iofds = []vfiouser.IOFD{
			{Offset: 12, Size: 4, Match: true, Data: 0x10002, FD: a},
			{Offset: 16, Size: 0, FD: b},
			{Offset: 20, Size: 8, Data: 99, FD: a}, // no match: the value is not sent
			{Offset: 24, Size: 1, FD: -1},
		}
	})
	s.run(t, []exchange{
		invalid("15-byte payload", 6, cat(512, 0, 0, 0)[:15]),
		invalid("bad_flags", 6, 512, 1, 0, 0),
		invalid("bad_count", 6, 512, 0, 0, 1),
		invalid("buffer_too_small", 6, 15, 0, 0, 0),
		invalid("buffer_too_large", 6, 1<<20+1, 0, 0, 0),
		invalid("no_regions_setup", 6, 512, 0, 3, 0),
		invalid("out_of_range", 6, 512, 0, 512, 0),
		ok("no_fds", 6, cat(512, 0, 1, 0), cat(16, 0, 1, 0)),
		ok("region_no_mmap", 6, cat(16, 0, 7, 0), cat(16, 0, 7, 0)),
		ok("read_write_nothing", 6, cat(16, 0, 0, 0), cat(16+4*40, 0, 0, 4)),
		ok("one byte too few", 6, cat(16+4*40-1, 0, 0, 0), cat(16+4*40, 0, 0, 4)),
	})
	s.write(message(1, 6, 16+4*40, 0, 0, 0))
	fds := s.expect(answer(1, 6, 16+4*40, 0, 0, 4,
		uint64(12), uint64(4), 0, 0, 1, 0, uint64(0x10002),
		uint64(16), uint64(0), 1, 0, 0, 0, uint64(0),
		uint64(20), uint64(8), 0, 0, 0, 0, uint64(0),
		uint64(24), uint64(1), max32, 0, 0, 0, uint64(0)))
	if len(fds) != 2 {
		t.Fatalf("%d descriptors, want 2", len(fds))
	}
	for i, fd := range fds {
		unix.Write(fd, cat(uint64(1)))
		if counter(s.dev.iofds[i].FD) != 1 {
			t.Errorf("descriptor %d is not the device's", i)
		}
	}
}

// TestIOFDsTooMany: a device that lists more than it was allowed.
func TestIOFDsTooMany(t *testing.T) {
	s := greeted(t, func(f *fake) {
		for range 17 {
			f.iofds = append(f.iofds, vfiouser.IOFD{Size: 4, FD: eventfd(f.t, 0)})
		}
	})
	s.run(t, []exchange{{"", 6, cat(1024, 0, 0, 0), unix.E2BIG, nil}})
}

func TestRegionReadWrite(t *testing.T) {
	access := func(offset uint64, region, count int, data ...any) []byte {
		return cat(offset, region, count, cat(data...))
	}
	config := make([]byte, 256)
	for i := range config {
		config[i] = byte(i)
	}
	const e = math.MaxUint64
	s := greeted(t)
	s.run(t, []exchange{
		invalid("read, 15-byte payload", 9, make([]byte, 15)),
		invalid("write, offset_too_short", 10, uint64(0)),
		invalid("offset_overflow", 9, access(e, 0, 256)),
		invalid("write offset overflow", 10, access(e-3, 0, 4, 1)),
		invalid("large_count", 9, access(0, 2, 1<<20+8)),
		invalid("count 2^32-1", 9, access(0, 2, max32)),
		invalid("index 9", 9, access(0, 9, 4)),
		invalid("index 2^32-1", 10, access(0, max32, 4, 1)),
		invalid("region of size 0", 9, access(0, 3, 0)),
		invalid("last byte beyond", 9, access(4093, 0, 4)),
		invalid("beyond", 10, access(4097, 0, 0)),
		invalid("write, too little data", 10, access(0, 0, 4, uint16(1))),
		invalid("write, too much data", 10, access(0, 0, 4, uint64(1))),
		invalid("write, no data", 10, access(0, 0, 4)),
		ok("zero_count read", 9, access(0, 0, 0), access(0, 0, 0)),
		ok("zero_count write", 10, access(4096, 0, 0), access(4096, 0, 0)),
		ok("write 4", 10, access(4092, 0, 4, 0x01020304), access(4092, 0, 4)),
		ok("read 4", 9, access(4092, 0, 4), access(4092, 0, 4, 0x01020304)),
		ok("write 1", 10, access(4093, 0, 1, byte(9)), access(4093, 0, 1)),
		ok("write 2", 10, access(0, 0, 2, uint16(0x1234)), access(0, 0, 2)),
		ok("write 8", 10, access(8, 0, 8, uint64(0x1122334455667788)), access(8, 0, 8)),
		ok("read 1", 9, access(4093, 0, 1), access(4093, 0, 1, byte(9))),
		ok("read 2", 9, access(8, 0, 2), access(8, 0, 2, uint16(0x7788))),
		ok("read 8", 9, access(8, 0, 8), access(8, 0, 8, uint64(0x1122334455667788))),
		ok("read 3", 9, access(0, 0, 3), access(0, 0, 3, uint16(0x1234), byte(0))),
		ok("whole config space", 9, access(0, 7, 256), access(0, 7, 256, config)),
		{"the device's own error", 9, access(0, 1, 4), unix.EPERM, nil},
		{"the device's own error", 10, access(0, 1, 4, 1), unix.EPERM, nil},
		ok("a read that the device leaves alone", 9, access(0, 2, 8), access(0, 2, 8, uint64(0))),
	})
}

func TestIRQInfo(t *testing.T) {
	greeted(t).run(t, []exchange{
		invalid("bad_in 8 bytes", 7, 16, 0),
		invalid("bad_in argsz", 7, 8, 0, 2, 0),
		invalid("bad_in index", 7, 16, 0, 5, 0),
		ok("INTx", 7, cat(16, 0, 0, 0), cat(16, 0, 0, 0)),
		ok("MSI-X", 7, cat(16, 0, 2, 0), cat(16, 1, 2, 2048)),
		ok("MSI-X, argsz 32", 7, cat(32, 0, 2, 0), cat(16, 1, 2, 2048)),
		ok("ERR", 7, cat(16, 0, 3, 0), cat(16, 1, 3, 1)),
		ok("REQ", 7, cat(16, 0, 4, 0), cat(16, 1, 4, 1)),
	})
}

// Flags of DEVICE_SET_IRQS.
const (
	none, boolean, event  = 1, 2, 4
	mask, unmask, trigger = 8, 16, 32
)

func TestSetIRQsInvalid(t *testing.T) {
	s := greeted(t)
	before := eventfd(t, 0)
	s.write(message(0, 8, 20, trigger|event, 2, 0, 1), before)
	s.expect(answer(0, 8))
	s.run(t, []exchange{
		invalid("no_irq_set", 8),
		invalid("short_write", 8, 20, 0),
		invalid("19 bytes", 8, cat(20, trigger|none, 2, 0, 0)[:19]),
		invalid("bad_argsz", 8, 3, trigger|none, 2, 0, 1),
		invalid("argsz 19", 8, 19, trigger|none, 2, 0, 1),
		invalid("bad_index", 8, 20, trigger|none, 5, 0, 1),
		invalid("bad_flags MASK+UNMASK", 8, 20, mask|unmask|none, 2, 0, 1),
		invalid("bad_flags NONE+BOOL", 8, 21, mask|none|boolean, 2, 0, 1, byte(1)),
		invalid("all flags", 8, 20, 63, 2, 0, 1),
		invalid("no action", 8, 20, none, 2, 0, 1),
		invalid("no data type", 8, 20, trigger, 2, 0, 1),
		invalid("unknown flag", 8, 20, trigger|none|64, 2, 0, 1),
		invalid("bad_start_count_range1", 8, 20, trigger|none, 2, 2047, 2),
		invalid("bad_start_count_range2", 8, 20, trigger|none, 2, 2049, 1),
		invalid("bad_start_count_range3", 8, 20, trigger|none, 2, 284, max32),
		invalid("start at the end", 8, 20, trigger|none, 2, 2048, 0),
		invalid("index without any", 8, 20, trigger|none, 0, 0, 0),
		invalid("bad_action_for_err", 8, 20, mask|none, 3, 0, 1),
		invalid("bad_action_for_req", 8, 20, unmask|none, 4, 0, 1),
		invalid("bad range for err", 8, 20, trigger|none, 3, 0, 2),
		invalid("bad range for req", 8, 20, trigger|event, 4, 0, 2),
		invalid("bad_start for count 0", 8, 20, trigger|none, 2, 1, 0),
		invalid("bad_action_for_count_0", 8, 20, mask|none, 2, 0, 0),
		invalid("bad_data_type_for_count_0", 8, 20, trigger|boolean, 2, 0, 0),
		invalid("EVENTFD count 0", 8, 20, trigger|event, 2, 0, 0),
		invalid("bool_too_small", 8, 21, trigger|boolean, 2, 0, 2, byte(0)),
		invalid("bool_too_large", 8, 23, trigger|boolean, 2, 0, 2, byte(0), byte(0), byte(0)),
		invalid("bool, argsz too small", 8, 21, trigger|boolean, 2, 0, 2, byte(1), byte(1)),
	})
	// The same with descriptors; they must all be closed, which the leak check
	// of serve sees.
	for _, c := range []struct {
		name    string
		request []byte
		fds     int
	}{
		{"bad_fds_for_BOOL", cat(21, trigger|boolean, 2, 0, 1, byte(1)), 1},
		{"bad_fds_for_NONE", cat(20, trigger|none, 2, 0, 1), 1},
		{"bad_fds for disable", cat(20, trigger|none, 2, 0, 0), 1},
		{"bad_fds_for_count_2", cat(20, trigger|event, 2, 0, 2), 1},
		{"more descriptors than count", cat(20, trigger|event, 2, 0, 2), 3},
		{"bad_request_closes_fds", cat(21, trigger|boolean, 2, 0, 1), 2},
		{"descriptors beyond the range", cat(20, trigger|event, 2, 2047, 2), 2},
		{"to mask by eventfd", cat(20, mask|event, 2, 0, 1), 1},
		{"to unmask by eventfd", cat(20, unmask|event, 2, 0, 1), 1},
		{"no payload", nil, 2},
	} {
		fds := make([]int, c.fds)
		for i := range fds {
			fds[i] = eventfd(t, 0)
		}
		s.write(message(9, 8, c.request), fds...)
		t.Log(c.name)
		s.expect(errorAnswer(9, 8, unix.EINVAL))
	}
	s.dev.state(func() {
		if len(s.dev.sets) != 1 {
			t.Errorf("the device was asked: %+v", s.dev.sets[1:])
		}
		s.dev.raise(2, 0)
	})
	if counter(before) != 1 {
		t.Error("an invalid request changed vector 0")
	}
}

func TestSetIRQs(t *testing.T) {
	s := greeted(t)
	id := uint16(0)
	set := func(fds []int, request ...any) {
		t.Helper()
		id++
		s.write(message(id, 8, request...), fds...)
		s.expect(answer(id, 8))
	}
	set(nil, 20, trigger|none, 4, 0, 0)  // disable REQ
	set(nil, 20, trigger|event, 4, 0, 1) // de-assign
	a, b := eventfd(t, 4), eventfd(t, 8)
	set([]int{eventfd(t, 0)}, 20, trigger|event, 2, 0, 1) // enable
	set([]int{a, b}, 20, trigger|event, 2, 0, 2)          // enable_update
	set(nil, 20, trigger|none, 2, 1, 1)                   // trigger_none
	if x, y := counter(a), counter(b); x != 4 || y != 9 {
		t.Errorf("trigger_none: %d and %d, want 4 and 9", x, y)
	}
	set(nil, 22, trigger|boolean, 2, 0, 2, byte(1), byte(0)) // trigger_bool
	if x, y := counter(a), counter(b); x != 1 || y != 0 {
		t.Errorf("trigger_bool: %d and %d, want 1 and 0", x, y)
	}
	set(nil, 20, mask|none, 2, 0, 1) // irq_state
	set(nil, 20, unmask|none, 2, 0, 2048)
	set(nil, 22, mask|boolean, 2, 0, 2, byte(0), byte(1))
	set(nil, 20, mask|event, 2, 0, 1) // takes away what cannot be there
	set(nil, 20, unmask|event, 2, 0, 1)
	set(nil, 20, trigger|event, 2, 0, 1) // vector 0 loses its eventfd, 1 keeps it
	set(nil, 20, trigger|none, 2, 0, 2048)
	if x, y := counter(a), counter(b); x != 0 || y != 1 {
		t.Errorf("after de-assigning vector 0: %d and %d, want 0 and 1", x, y)
	}
	c := eventfd(t, 4)
	set([]int{c}, 20, trigger|event, 2, 8, 1)
	s.dev.state(func() { s.dev.raise(2, 8) })
	if n := counter(c); n != 5 {
		t.Errorf("test_irq_trigger: counter %d, want 5", n)
	}
	set(nil, 20, trigger|none, 2, 0, 0) // disable all
	s.dev.state(func() {
		if len(s.dev.events[2]) != 0 {
			t.Errorf("%d eventfds left", len(s.dev.events[2]))
		}
		want := vfiouser.IRQSet{Index: 2, Action: vfiouser.IRQMask, Count: 2, Bools: []byte{0, 1}}
		found := false
		for _, got := range s.dev.sets {
			found = found || got.Action == want.Action && got.Count == 2 && bytes.Equal(got.Bools, want.Bools)
			if got.EventFD && got.Action != vfiouser.IRQTrigger {
				t.Errorf("the device got %+v", got)
			}
		}
		if !found {
			t.Error("the device did not get the booleans")
		}
	})
	s.alive()
}

// TestSetIRQsRefused: what the device refuses, it does not own.
func TestSetIRQsRefused(t *testing.T) {
	for _, c := range []struct {
		err  error
		want unix.Errno
	}{
		{unix.ENOSPC, unix.ENOSPC},
		{errors.New("no error number"), unix.EINVAL},
		{errors.Join(errors.New("with one inside"), unix.ENODEV), unix.ENODEV},
		{unix.Errno(0), unix.EINVAL},
		{unix.Errno(5000), unix.EINVAL},
	} {
		s := greeted(t, func(f *fake) { f.refuse = c.err })
		s.write(message(1, 8, 20, trigger|event, 2, 0, 2), eventfd(t, 0), eventfd(t, 0))
		s.expect(errorAnswer(1, 8, c.want))
		s.alive()
	}
}

func TestReset(t *testing.T) {
	s := greeted(t)
	s.write(cat(message(1, 13), message(2, 13, 1)))
	s.expect(answer(1, 13))
	s.expect(answer(2, 13))
	s.alive()
	s.dev.state(func() {
		if s.dev.resets != 2 {
			t.Errorf("%d resets, want 2", s.dev.resets)
		}
	})
}

func TestDMA(t *testing.T) {
	mapped := func(argsz, flags int, offset, address, size uint64) []byte {
		return cat(argsz, flags, offset, address, size)
	}
	unmap := func(argsz, flags int, address, size uint64) []byte { return cat(argsz, flags, address, size) }
	s := greeted(t)
	s.run(t, []exchange{
		ok("without descriptor", 2, mapped(32, 3, 0, 1<<32, 4096), nil),
		ok("read-only", 2, mapped(32, 1, 0, 2<<32, 4096), nil),
		ok("larger argsz and payload", 2, append(mapped(40, 1, 0, 2<<32, 4096), 1, 2, 3), nil),
		invalid("31-byte payload", 2, mapped(32, 1, 0, 0, 4096)[:31]),
		invalid("argsz 31", 2, mapped(31, 1, 0, 0, 4096)),
		invalid("unknown flag", 2, mapped(32, 16, 0, 0, 4096)),
		invalid("mmap without descriptor", 2, mapped(32, 7, 0, 0, 4096)),
		invalid("file I/O without descriptor", 2, mapped(32, 11, 0, 0, 4096)),
		invalid("short_write", 3, 24, 0),
		invalid("23-byte payload", 3, unmap(24, 0, 0, 0)[:23]),
		invalid("bad_argsz", 3, unmap(8, 0, 0, 4096)),
		invalid("bad_argsz2", 3, unmap(1<<20+8, 0, 0, 4096)),
		invalid("dirty_bad_argsz", 3, unmap(40, 1, 0, 4096), uint64(4096), uint64(math.MaxUint64-7)),
		invalid("dirty_not_tracking", 3, unmap(48, 1, 0, 4096), uint64(4096), uint64(8)),
		invalid("dirty without its header", 3, unmap(24, 1, 0, 4096)),
		invalid("invalid_flags", 3, unmap(24, 4, 0, 4096)),
		invalid("all_invalid_flags", 3, unmap(24, 3, 0, 0)),
		invalid("all_invalid_addr", 3, unmap(24, 2, 0x10000, 0)),
		invalid("all with size", 3, unmap(24, 2, 0, 4096)),
		ok("unmap", 3, unmap(24, 0, 1<<32, 4096), unmap(24, 0, 1<<32, 4096)),
		ok("unmap, larger argsz", 3, unmap(1<<20, 0, 1<<32, 4096), unmap(1<<20, 0, 1<<32, 4096)),
		ok("unmap_all", 3, unmap(24, 2, 0, 0), unmap(24, 2, 0, 0)),
	})
	// Descriptors are closed at once; the leak check of serve sees it.
	s.write(message(1, 2, mapped(32, 7, 0, 1<<32, 4096)), memfd(t, 4096))
	s.expect(answer(1, 2))
	s.write(message(2, 2, mapped(32, 3, 0, 1<<32, 4096)), memfd(t, 4096), memfd(t, 4096))
	s.expect(errorAnswer(2, 2, unix.EINVAL))
	// Pipelined, as QEMU does.
	var all []byte
	for i := range uint16(500) {
		all = append(all, message(i, 2, mapped(32, 3, 0, uint64(i)<<12, 4096))...)
	}
	s.write(all)
	for i := range uint16(500) {
		s.expect(answer(i, 2))
	}
}

// TestUnexpectedDescriptors: a message that takes none loses them, no more.
func TestUnexpectedDescriptors(t *testing.T) {
	s := greeted(t)
	s.write(message(1, 4, 16, 0, 0, 0), eventfd(t, 0), eventfd(t, 0))
	s.expect(answer(1, 4, 16, 3, 9, 5))
	s.write(message(2, 999, 1), eventfd(t, 0))
	s.expect(errorAnswer(2, 999, unix.EINVAL))
	before := len(openFDs(t))
	for range 50 {
		s.write(message(3, 13), s.dev.mem, s.dev.mem, s.dev.mem)
		s.expect(answer(3, 13))
	}
	if after := len(openFDs(t)); after != before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

// TestQEMUStart is the order of messages of a QEMU that starts.
func TestQEMUStart(t *testing.T) {
	s := greeted(t)
	list := []exchange{
		ok("", 2, cat(32, 3, uint64(0), uint64(0), uint64(0xa0000)), nil),
		ok("", 2, cat(32, 1, uint64(0), uint64(0xc0000), uint64(0x20000)), nil),
		ok("", 4, cat(16, 0, 0, 0), cat(16, 3, 9, 5)),
	}
	for i, size := range []int{4096, 4096, 0, 0, 0, 0, 0, 256} {
		if i == 6 || i == 2 || i == 4 {
			continue
		}
		flags := 3
		if size == 0 {
			flags = 0
		}
		list = append(list, ok("region", 5, cat(32, 0, i, 0, uint64(0), uint64(0)), cat(32, flags, i, 0, uint64(size), uint64(0))))
	}
	var config [256]byte
	s.dev.state(func() { config = s.dev.config })
	list = append(list,
		ok("", 7, cat(16, 0, 3, 0), cat(16, 1, 3, 1)),
		ok("", 7, cat(16, 0, 2, 0), cat(16, 1, 2, 2048)),
		ok("", 7, cat(16, 0, 0, 0), cat(16, 0, 0, 0)),
		ok("config", 9, cat(uint64(0), 7, 256), cat(uint64(0), 7, 256, config[:])),
		ok("", 13, nil, nil),
		ok("command", 10, cat(uint64(4), 7, 2, uint16(0)), cat(uint64(4), 7, 2)),
		ok("BAR0", 10, cat(uint64(16), 7, 4, 0), cat(uint64(16), 7, 4)),
	)
	s.run(t, list)
}
