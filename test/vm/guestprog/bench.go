package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// benchOptions is a measurement of the campaign bench-guests over what joins
// two guests beside the link.
type benchOptions struct {
	over    string // v1 (QEMU's ivshmem-doorbell), serial (virtio), tcp (virtio-net)
	mode    string // how the ends wait: poll, thread or poller
	measure string // as that of ivsh-pingpong
	size    int
	limit   time.Duration // of what counts
	warmup  uint64
	batch   uint64 // round trips that make a sample, where ivsh-pingpong measures
	v1      string // PCI address
	serial  string // name of the port
	other   string // the other guest's address, for the one that leads; else ""
}

const benchPort = ":7000"

// benchOther measures round trips through doorbells and serial ports by itself.
// All else it prepares for ivsh-pingpong: the loop is then the very same as over
// a link.
func benchOther(_ context.Context, args []string) (any, error) {
	f := flags("bench")
	var o benchOptions
	f.StringVar(&o.over, "over", "", "v1, serial or tcp")
	f.StringVar(&o.mode, "mode", "", "poll, thread or poller")
	f.StringVar(&o.measure, "measure", "latency", "latency, throughput or rate")
	f.IntVar(&o.size, "size", 64, "bytes of a message")
	f.DurationVar(&o.limit, "duration", time.Second, "of the measurement")
	f.Uint64Var(&o.warmup, "warmup", 1000, "messages before those that count")
	f.Uint64Var(&o.batch, "batch", 1, "round trips that make a sample, with -mode poll")
	f.StringVar(&o.v1, "v1", "", "PCI address")
	f.StringVar(&o.serial, "serial", "", "name of the port")
	f.StringVar(&o.other, "other", "", "address of the other guest; none: this one follows")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	switch o.over + " " + o.mode {
	case "v1 poll":
		kind := "memory"
		if o.size == 8 {
			kind = "line"
		}
		fd, err := unix.Open(o.memory(), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil && o.other != "" {
			err = wipe(fd)
		}
		if err != nil {
			return nil, err
		}
		return nil, o.handOver(kind, fd)
	case "tcp thread":
		return nil, o.handOver("tcp", -1)
	case "tcp poller":
		return nil, o.handOver("tcp-go", -1)
	case "v1 thread", "v1 poller":
		m, err := o.openV1()
		if err != nil {
			return nil, err
		}
		return o.roundTrips(m)
	case "serial thread", "serial poller":
		fd, err := openSerial(o.serial)
		if err != nil {
			return nil, err
		}
		if o.measure != "latency" {
			return nil, o.handOver("pipe", fd)
		}
		f, err := file(fd, o.mode)
		if err != nil {
			return nil, err
		}
		return o.roundTrips(serialPort{f})
	}
	return nil, fmt.Errorf("-over %s -mode %s: unknown", o.over, o.mode)
}

// memory is the v1 device's shared memory, as a file.
func (o *benchOptions) memory() string { return "/sys/bus/pci/devices/" + o.v1 + "/resource2" }

// mapAll maps all of a file.
func mapAll(fd int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	return unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// wipe makes memory as fresh memory is. The one that leads does so before it
// calls the other one.
func wipe(fd int) error {
	m, err := mapAll(fd)
	if err != nil {
		return err
	}
	clear(m)
	return unix.Munmap(m)
}

// openSerial opens a virtio serial port by its name.
func openSerial(name string) (int, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return -1, err
	}
	for _, file := range names {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == name {
			return unix.Open("/dev/"+filepath.Base(filepath.Dir(file)), unix.O_RDWR|unix.O_CLOEXEC, 0)
		}
	}
	return -1, fmt.Errorf("no virtio serial port %q among %d", name, len(names))
}

// file makes a file of a descriptor: for Go's poller, or to block the thread.
func file(fd int, mode string) (*os.File, error) {
	err := unix.SetNonblock(fd, mode == "poller")
	return os.NewFile(uintptr(fd), "device"), err
}

// connect makes n connections with the other guest; both call in the same order.
func (o *benchOptions) connect(n int) (conns []net.Conn, err error) {
	if o.other == "" {
		l, err := net.Listen("tcp", benchPort)
		if err != nil {
			return nil, err
		}
		defer l.Close()
		for len(conns) < n {
			c, err := l.Accept()
			if err != nil {
				return nil, err
			}
			conns = append(conns, c)
		}
		return conns, nil
	}
	for end := time.Now().Add(patience); len(conns) < n; {
		c, err := net.Dial("tcp", o.other+benchPort)
		switch {
		case err == nil:
			conns = append(conns, c)
		case time.Now().After(end):
			return nil, err
		default: // it does not listen yet
			time.Sleep(time.Millisecond)
		}
	}
	return conns, nil
}

// handOver starts ivsh-pingpong as its --compare does, with a connection for
// control, and what is to be measured: fd, or a connection, too, if it is -1.
func (o *benchOptions) handOver(contestant string, fd int) error {
	n := 1
	if fd < 0 {
		n = 2
	}
	conns, err := o.connect(n)
	if err != nil {
		return err
	}
	cmd := exec.Command("ivsh-pingpong")
	for _, c := range conns {
		f, err := c.(*net.TCPConn).File()
		if err != nil {
			return err
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		c.Close()
	}
	if fd >= 0 {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), "device"))
	}
	side := 0
	if o.other == "" {
		side = 1
	}
	order, err := json.Marshal(map[string]any{
		"Contestant": contestant, "Side": side, "Files": 1,
		"Task": map[string]any{"measure": o.measure, "size": o.size, "duration": o.limit, "warmup": o.warmup, "batch": o.batch},
	})
	if err != nil {
		return err
	}
	cmd.Env = append(os.Environ(), "IVSH_PINGPONG_JOB="+string(order))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// medium carries messages of one size.
type medium interface {
	send(p []byte) error
	receive(p []byte) error
}

// benchResult has the keys of ivsh-pingpong.
type benchResult struct {
	RTT      map[string]float64 `json:"rtt_ns"`
	Messages int                `json:"messages"`
	Seconds  float64            `json:"elapsed_s"`
}

// roundTrips sends messages there and back, and checks each; the number ~0 is
// the last one.
func (o *benchOptions) roundTrips(m medium) (any, error) {
	conns, err := o.connect(1) // from here on both are ready
	if err != nil {
		return nil, err
	}
	defer conns[0].Close()
	runtime.LockOSThread()
	const last = 1<<64 - 1
	p, back := make([]byte, o.size), make([]byte, o.size)
	if o.other == "" {
		for seq := uint64(0); ; seq++ {
			if err := m.receive(p); err != nil {
				return nil, err
			}
			switch got := binary.LittleEndian.Uint64(p); got {
			case last:
				return nil, nil
			case seq:
			default:
				return nil, fmt.Errorf("message %d: found %#x", seq, got)
			}
			if err := m.send(p); err != nil {
				return nil, err
			}
		}
	}
	var times []float64
	begin := time.Now()
	for seq := uint64(0); ; seq++ {
		if seq == o.warmup {
			begin = time.Now()
		}
		binary.LittleEndian.PutUint64(p, seq)
		sent := time.Now()
		if err := errors.Join(m.send(p), m.receive(back)); err != nil {
			return nil, err
		}
		now := time.Now()
		if got := binary.LittleEndian.Uint64(back); got != seq {
			return nil, fmt.Errorf("answer to message %d: found %#x", seq, got)
		}
		if seq >= o.warmup {
			times = append(times, float64(now.Sub(sent)))
			if now.Sub(begin) >= o.limit {
				break
			}
		}
	}
	binary.LittleEndian.PutUint64(p, last)
	elapsed := time.Since(begin)
	if err := m.send(p); err != nil {
		return nil, err
	}
	io.Copy(io.Discard, conns[0]) // until the other one has it
	slices.Sort(times)
	return &benchResult{map[string]float64{"p50": times[len(times)/2]}, len(times), elapsed.Seconds()}, nil
}

// serialPort carries bytes.
type serialPort struct{ *os.File }

func (s serialPort) send(p []byte) error {
	_, err := s.Write(p)
	return err
}

func (s serialPort) receive(p []byte) error {
	_, err := io.ReadFull(s.File, p)
	return err
}

// v1Medium is the v1 device: a place in its memory for each direction, a
// doorbell for each message.
type v1Medium struct {
	*v1Device
	out, in []byte
	bell    *os.File
}

const v1Vector = 1

func (o *benchOptions) openV1() (*v1Medium, error) {
	d, err := openV1(o.v1)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(o.memory(), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	all, err := mapAll(fd)
	if err != nil {
		return nil, err
	}
	m := &v1Medium{v1Device: d, out: all[4096:8192], in: all[:4096]}
	if o.other == "" {
		m.out, m.in = m.in, m.out
	}
	m.bell, err = file(d.eventfds[v1Vector], o.mode)
	return m, err
}

// send fills the place: what was there has been taken, as its answer came.
func (m *v1Medium) send(p []byte) error {
	copy(m.out, p)
	return m.ring(1-m.id(), v1Vector)
}

func (m *v1Medium) receive(p []byte) error {
	var n [8]byte
	if _, err := m.bell.Read(n[:]); err != nil {
		return err
	}
	if n := binary.NativeEndian.Uint64(n[:]); n != 1 {
		return fmt.Errorf("%d interrupts at once, expected 1", n)
	}
	copy(p, m.in)
	return nil
}
