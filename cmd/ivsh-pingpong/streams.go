package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/pingpong"
	"github.com/ivshmem-go/ivshmem/stream"
)

var streamModes = map[string]stream.Mode{"poll": stream.Poll, "interrupt": stream.Sleep, "adaptive": stream.Adaptive}

func (s *settings) parseStreams(over, measure, size string) error {
	c := &s.streams
	s.over = pingpong.Over(over)
	if over == "" {
		s.over = pingpong.Section
		if s.modes[0] == "adaptive" {
			s.over = pingpong.Messages
		}
	}
	c.Over, c.Measure = s.over, pingpong.Measure(measure)
	c.Messages, c.Warmup, c.Batch = s.count, s.warmup, s.batch
	switch s.over {
	case pingpong.Section, pingpong.Messages, pingpong.Conn:
	default:
		return fmt.Errorf("--over %q: expected section, messages or conn", over)
	}
	switch c.Measure {
	case pingpong.Latency:
	case pingpong.Throughput, pingpong.Rate, pingpong.Idle:
		if s.over == pingpong.Section {
			return fmt.Errorf("--measure %s: expected --over messages or conn, a section has latency only", measure)
		}
	default:
		return fmt.Errorf("--measure %q: expected latency, throughput, rate or idle", measure)
	}
	if s.over == pingpong.Section && s.modes[0] == "adaptive" {
		return errors.New("--mode adaptive: expected --over messages or conn")
	}
	digits, unit := strings.TrimRight(size, "KMkm"), 1
	switch strings.ToUpper(size[len(digits):]) {
	case "":
	case "K":
		unit = 1 << 10
	case "M":
		unit = 1 << 20
	default:
		digits = ""
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || n*uint64(unit) < 8 || n*uint64(unit) > math.MaxInt32 {
		return fmt.Errorf("--size %q: expected a size such as 64 or 64K, at least 8", size)
	}
	c.Size = int(n) * unit
	if c.Conns < 0 || s.peers < 0 || s.peers > 1000 {
		return errors.New("--conns, --peers: expected a number from 0 on, and at most 1000 peers")
	}
	return nil
}

// playStreams plays one side over streams: the peer with the lower ID leads.
func (s *settings) playStreams(ctx context.Context, dev *ivshmem.Device, peer uint32, r *report) error {
	for _, mode := range s.modes {
		if err := s.playStream(ctx, dev, peer, mode, r); err != nil {
			return err
		}
	}
	return nil
}

func (s *settings) playStream(ctx context.Context, dev *ivshmem.Device, peer uint32, mode string, r *report) error {
	config := stream.Config{Mode: streamModes[mode]}
	streams := s.streams
	streams.Read = config.Mode != stream.Poll
	if s.streams.Conns > 0 {
		config.Ring = 4 << 10 // there are many
	}
	ep, err := stream.New(dev, config)
	if err != nil {
		return err
	}
	defer ep.Close()
	if dev.ID() > peer {
		return pingpong.Follow(ctx, ep, true)
	}
	res, err := pingpong.Lead(ctx, ep, peer, streams)
	if err != nil {
		return err
	}
	return r.addStream(mode, res)
}
