package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/compare"
	"github.com/ivshmem-go/ivshmem/internal/pingpong"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/stream"
)

// embedded measures between processes of this machine: two fresh ones, and a
// fresh link, for each measurement. The rounds go over all of them, so that
// what the machine does meanwhile hits all alike.
func (s *settings) embedded(ctx context.Context) error {
	where := "two processes of this machine"
	if s.cpus != nil {
		where = fmt.Sprintf("%s, on CPUs %d and %d", where, s.cpus[0], s.cpus[1])
	}
	s.report.title(where + "; " + machine())
	jobs := s.jobs()
	var contestants []job
	if s.compare {
		contestants = s.contestants(jobs)
	}
	total, done := s.rounds*(len(jobs)+len(contestants)), 0
	progress := newProgress(s.err)
	defer progress.done()
	for round := range s.rounds {
		measure := func(jobs []job, by func(context.Context, job) (*record, error)) error {
			for _, j := range jobs {
				done++
				progress.show(fmt.Sprintf("%d of %d: %s %s %d", done, total, j.Over, j.Mode, j.Size))
				r, err := by(ctx, j)
				progress.done()
				if rerr := s.report.add(r, round); err == nil {
					err = rerr
				}
				if err != nil {
					return fmt.Errorf("over %s, mode %s: %w", j.Over, j.Mode, err)
				}
			}
			return nil
		}
		if err := measure(jobs, s.overLink); err != nil {
			return err
		}
		if err := measure(contestants, s.overContestant); err != nil {
			return err
		}
	}
	return nil
}

// contestants is what to measure beside the jobs: messages of the same sizes.
func (s *settings) contestants(jobs []job) (out []job) {
	var sizes []int
	seen := map[int]bool{}
	for _, j := range jobs {
		if !seen[j.Size] {
			seen[j.Size] = true
			sizes = append(sizes, j.Size)
		}
	}
	for _, size := range sizes {
		for _, c := range compare.Contestants {
			fits := c.OneWay
			if s.task.Measure == pingpong.Latency {
				fits = c.RoundTrips
			}
			if fits && c.Takes(size) {
				out = append(out, job{pingpong.Over(c.Name), c.Mode, size})
			}
		}
	}
	return out
}

func (s *settings) order(j job) workOrder {
	o := workOrder{
		Name: fmt.Sprintf("%s-%s-%d", j.Over, j.Mode, j.Size), Mode: j.Mode, Task: s.task,
		Profile: s.profile, Poller: s.poller, Silence: s.silence,
	}
	o.Task.Over, o.Task.Size = j.Over, j.Size
	return o
}

func (s *settings) overContestant(ctx context.Context, j job) (*record, error) {
	c, err := compare.Find(string(j.Over))
	if err != nil {
		return nil, err
	}
	files, err := c.Open(j.Size)
	if err != nil {
		return nil, err
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	var orders [2]workOrder
	for i := range orders {
		files[i] = append([]*os.File{os.NewFile(uintptr(ends[i]), "control")}, files[i]...)
		o := s.order(j)
		o.Contestant, o.Side, o.Files = c.Name, i, len(files[i])-1
		o.Yield = runtime.NumCPU() == 1 || s.cpus != nil && s.cpus[0] == s.cpus[1]
		orders[i] = o
	}
	return s.processes(ctx, orders, files)
}

func (s *settings) overLink(ctx context.Context, j job) (r *record, err error) {
	dir, err := os.MkdirTemp("", "ivsh-pingpong")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "link")
	config := link.Config{Peers: uint32(2 + s.peers), Vectors: 3, ReadWrite: 4096, Output: 4096}
	if j.Over != pingpong.Section {
		// Memory that nobody touches costs nothing.
		config.Output = 16 << 20
	}
	l, err := link.New(config)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	listener, err := pcidev.Listen(socket)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- (&pcidev.Server{Link: l}).Serve(ctx, listener) }()

	idle, err := s.idlePeers(socket, j.Over)
	if err == nil {
		o := s.order(j)
		o.Socket, o.First = socket, uint32(s.peers)
		r, err = s.processes(ctx, [2]workOrder{o, o}, [2][]*os.File{})
	}
	for _, d := range idle {
		d.Close()
	}
	cancel()
	return r, errors.Join(err, <-served)
}

// idlePeers takes the first peer IDs, each with an endpoint that does nothing.
func (s *settings) idlePeers(socket string, over pingpong.Over) (idle []*ivshmem.Device, err error) {
	for range s.peers {
		d, err := ivshmem.Open(socket)
		if err != nil {
			return idle, err
		}
		idle = append(idle, d)
		if over != pingpong.Section {
			if _, err := stream.New(d, stream.Config{Mode: stream.Sleep}); err != nil {
				return idle, err
			}
		}
	}
	return idle, nil
}

// processes runs both processes of a measurement, which inherit the files, and
// returns what the leading one found.
func (s *settings) processes(ctx context.Context, orders [2]workOrder, files [2][]*os.File) (*record, error) {
	// When one fails, the other would wait in vain.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var outputs [2]bytes.Buffer
	exits := make(chan error, 2)
	for i := range 2 {
		text, err := json.Marshal(orders[i])
		if err != nil {
			return nil, err
		}
		cmd := exec.CommandContext(ctx, "/proc/self/exe")
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), jobVariable+"="+string(text))
		cmd.ExtraFiles = files[i]
		cmd.Stdout, cmd.Stderr = &outputs[i], s.err
		cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
		cmd.WaitDelay = 5 * time.Second
		go func() {
			// The kernel takes the end of the thread that starts a child for
			// the end of its parent, so the thread has to stay; and the child
			// inherits the CPUs of the thread.
			runtime.LockOSThread()
			exits <- s.runOn(i, cmd)
		}()
	}
	var first error
	for range 2 {
		if err := <-exits; err != nil && first == nil {
			first = fmt.Errorf("peer process: %w", err)
			cancel()
		}
	}
	for _, out := range outputs {
		if out.Len() > 0 {
			r, err := decodeRecord(out.Bytes())
			return r, errors.Join(first, err)
		}
	}
	if first == nil {
		first = errors.New("neither process reported what it found")
	}
	return nil, first
}

// runOn runs a process, on a CPU of its own if --cpus names some.
func (s *settings) runOn(i int, cmd *exec.Cmd) error {
	if s.cpus != nil {
		var set unix.CPUSet
		set.Set(s.cpus[i])
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("run on CPU %d: %w", s.cpus[i], err)
		}
	}
	err := cmd.Start()
	// What the child inherited is its own: its end has to close when it ends.
	for _, f := range cmd.ExtraFiles {
		f.Close()
	}
	if err != nil {
		return err
	}
	return cmd.Wait()
}
