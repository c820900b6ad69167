package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/pingpong"
	"github.com/ivshmem-go/ivshmem/stream"
)

var streamModes = map[string]stream.Mode{"poll": stream.Poll, "interrupt": stream.Sleep, "adaptive": stream.Adaptive}

// play plays one side of everything on a device.
func (s *settings) play(ctx context.Context) error {
	dev, err := openDevice(s.device, s.poller)
	if err != nil {
		return err
	}
	defer dev.Close()
	peer, err := s.other(dev)
	if err != nil {
		return err
	}
	s.report.title(fmt.Sprintf("peer %d with peer %d, %s through %s; %s", dev.ID(), peer, dev.Address(), dev.Driver(), machine()))
	stop, err := startProfile(s.profile, fmt.Sprintf("peer%d", dev.ID()))
	if err != nil {
		return err
	}
	defer stop()
	phase := uint32(0)
	for _, over := range s.overs {
		for _, mode := range s.modes {
			switch {
			case over != pingpong.Section:
				err = s.playStreams(ctx, dev, peer, over, mode)
			case mode != "adaptive":
				for round := range s.rounds {
					var r *record
					r, err = playSection(ctx, dev, peer, mode, s.task, sectionRun{phase: phase, silence: s.silence})
					phase++
					if rerr := s.report.add(r, round); err == nil {
						err = rerr
					}
					if err != nil {
						return err
					}
				}
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// playStreams plays all sizes and rounds: the peer with the lower ID leads, and
// decides which.
func (s *settings) playStreams(ctx context.Context, dev *ivshmem.Device, peer uint32, over pingpong.Over, mode string) error {
	if dev.ID() > peer {
		return followStreams(ctx, dev, peer, mode, s.task.Conns)
	}
	ep, err := endpoint(dev, mode, s.task.Conns)
	if err != nil {
		return err
	}
	defer ep.Close()
	for round := range s.rounds {
		for i, size := range s.sizes {
			t := s.task
			t.Over, t.Size, t.More = over, size, round < s.rounds-1 || i < len(s.sizes)-1
			r, err := leadStream(ctx, dev, ep, peer, mode, t)
			if err != nil {
				return err
			}
			if err := s.report.add(r, round); err != nil {
				return err
			}
		}
	}
	return nil
}

// openDevice opens a device for the calling goroutine to play on.
func openDevice(address string, poller bool) (*ivshmem.Device, error) {
	if poller {
		return ivshmem.Open(address, ivshmem.WithSleep(ivshmem.SleepPoller))
	}
	keepThread()
	return ivshmem.Open(address, ivshmem.WithSleep(ivshmem.SleepThread))
}

// keepThread lets a goroutine that blocks in the kernel stay on its thread, as
// waking another one costs more than the wait. One that Go's poller wakes would
// pay for that.
func keepThread() { runtime.LockOSThread() }

// sectionRun is what a run over a section needs besides its task.
type sectionRun struct {
	phase   uint32
	silence time.Duration
	blind   bool
}

func playSection(ctx context.Context, dev *ivshmem.Device, peer uint32, mode string, t pingpong.Task, run sectionRun) (*record, error) {
	m, err := pingpong.ParseMode(mode)
	if err != nil {
		return nil, err
	}
	res, err := pingpong.Run(ctx, dev, peer, pingpong.Config{
		Mode: m, Messages: t.Messages, Duration: t.Duration, Warmup: t.Warmup, Batch: t.Batch, Rate: t.Rate,
		Phase: run.phase, Silence: run.silence, Blind: run.blind,
	})
	if res == nil {
		return nil, err
	}
	return sectionRecord(res, t.Rate), err
}

func endpoint(dev *ivshmem.Device, mode string, conns int) (*stream.Endpoint, error) {
	config := stream.Config{Mode: streamModes[mode]}
	if conns > 0 {
		config.Ring = 4 << 10 // there are many
	}
	return stream.New(dev, config)
}

func leadStream(ctx context.Context, dev *ivshmem.Device, ep *stream.Endpoint, peer uint32, mode string, t pingpong.Task) (*record, error) {
	t.Read = streamModes[mode] != stream.Poll
	res, err := pingpong.Lead(ctx, dev, ep, peer, t)
	if err != nil {
		return nil, err
	}
	return taskRecord(res, string(t.Over), mode), nil
}

func followStreams(ctx context.Context, dev *ivshmem.Device, peer uint32, mode string, conns int) error {
	ep, err := endpoint(dev, mode, conns)
	if err != nil {
		return err
	}
	defer ep.Close()
	return pingpong.Follow(ctx, dev, ep, peer)
}

// startProfile writes a CPU profile of this process until it is stopped; no
// directory: nothing.
func startProfile(dir, name string) (stop func(), err error) {
	if dir == "" {
		return func() {}, nil
	}
	f, err := os.Create(filepath.Join(dir, name+".pprof"))
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		f.Close()
		return nil, err
	}
	return func() {
		pprof.StopCPUProfile()
		f.Close()
	}, nil
}

func (s *settings) other(dev *ivshmem.Device) (uint32, error) {
	if s.peer >= 0 {
		return uint32(s.peer), nil
	}
	if dev.MaxPeers() == 2 {
		return 1 - dev.ID(), nil
	}
	var ids []string
	for id := range dev.MaxPeers() {
		if id != dev.ID() {
			ids = append(ids, fmt.Sprint(id))
		}
	}
	return 0, usageError{fmt.Errorf("the link has %d peers: choose one by --peer, of %s", dev.MaxPeers(), strings.Join(ids, ", "))}
}
