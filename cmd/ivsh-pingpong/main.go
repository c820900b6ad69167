// Ivsh-pingpong measures the round trip between two peers of an ivshmem v2
// link, and checks every message.
//
// Without a device it starts a link and two peer processes by itself. With
// one, it plays with the other peer of its link: run it with the same --mode
// in two guests, or in a guest and on the host.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/pingpong"
	"github.com/ivshmem-go/ivshmem/regs"
)

const description = `Without --device, and on a machine without an ivshmem device, it starts a link
and two peer processes on this machine. With a device (a PCI address, the path
of a link's socket, or the machine's only one) it plays with the other peer of
the link; the peer with the lower ID leads and decides how many messages, and
both print what they measured.

Over a section a message is one word of shared memory. Over messages and conn it
is what a program sends by package stream: there both peers need the same --over
and --mode, and the leading one decides the rest. Mode interrupt sleeps; mode
adaptive looks first, for as long as that pays off.

Latencies are round trips. An error is a message that was lost, or not what
was due; it ends the run. Exit codes: 0 all messages came back, 1 otherwise,
2 wrong usage.

Example: ivsh-pingpong --mode interrupt --count 10000 --device /run/link0
         ivsh-pingpong --over conn --mode adaptive --measure throughput --size 64K`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	err := newApp(os.Stdout, os.Stderr).RunContext(ctx, os.Args)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "ivsh-pingpong: %v\n", err)
	var usage usageError
	if errors.As(err, &usage) {
		os.Exit(2)
	}
	os.Exit(1)
}

type usageError struct{ error }

// settings are the options of one invocation.
type settings struct {
	device   string
	peer     int
	over     pingpong.Over
	modes    []string
	count    uint64
	warmup   uint64
	batch    uint64
	streams  pingpong.StreamConfig
	peers    int // idle ones of the embedded link
	poller   bool
	cpus     []int // of the two embedded peers; nil: any
	silence  time.Duration
	json     bool
	out, err io.Writer
}

func newApp(out, errOut io.Writer) *cli.App {
	s := &settings{out: out, err: errOut}
	return &cli.App{
		Name:        "ivsh-pingpong",
		Usage:       "measure round trips over ivshmem v2 shared memory and doorbells",
		ArgsUsage:   " ",
		Description: description,
		Writer:      out,
		ErrWriter:   errOut,
		HideVersion: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "device", Aliases: []string{"d"}, Usage: "`DEVICE`: PCI address or socket path", EnvVars: []string{"IVSHMEM_DEVICE"}, Destination: &s.device},
			&cli.IntFlag{Name: "peer", Usage: "`ID` of the peer to play with (default: the only other one)", Value: -1, Destination: &s.peer},
			&cli.StringFlag{Name: "over", Usage: "what messages go over: section, messages or conn (default: section, or messages for mode adaptive)"},
			&cli.StringFlag{Name: "mode", Usage: "how to wait: poll, interrupt, both one after the other, or adaptive", Value: "both"},
			&cli.StringFlag{Name: "measure", Usage: "latency (round trips), or over streams: throughput (one way), rate (one way, 64 messages at a time), idle (CPU time of a connection on which nothing happens)", Value: "latency"},
			&cli.StringFlag{Name: "size", Usage: "`BYTES` of a message over streams", Value: "64"},
			&cli.Uint64Flag{Name: "count", Aliases: []string{"n"}, Usage: "messages, or round trips, that count", Value: 20000, Destination: &s.count},
			&cli.Uint64Flag{Name: "warmup", Usage: "those before", Value: 1000, Destination: &s.warmup},
			&cli.Uint64Flag{Name: "batch", Usage: "round trips that make a sample, so that the clock is read less", Value: 1, Destination: &s.batch},
			&cli.DurationFlag{Name: "duration", Usage: "of idle", Value: 10 * time.Second, Destination: &s.streams.Duration},
			&cli.IntFlag{Name: "conns", Usage: "idle connections besides, over streams", Destination: &s.streams.Conns},
			&cli.IntFlag{Name: "peers", Usage: "idle peers on the link that is started, with an endpoint each", Destination: &s.peers},
			&cli.StringFlag{Name: "sleep", Usage: "how to sleep in mode interrupt: thread (a blocked thread) or poller (Go's)", Value: "thread"},
			&cli.StringFlag{Name: "cpus", Usage: "`A,B`: the CPUs for the two processes of this machine"},
			&cli.DurationFlag{Name: "silence", Usage: "how long the peer may say nothing", Value: 10 * time.Second, Destination: &s.silence},
			&cli.BoolFlag{Name: "json", Usage: "print JSON, an object for each mode", Destination: &s.json},
		},
		HideHelpCommand: true,
		OnUsageError:    func(_ *cli.Context, err error, _ bool) error { return usageError{err} },
		ExitErrHandler:  func(*cli.Context, error) {},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return usageError{fmt.Errorf("unexpected argument %q", c.Args().First())}
			}
			if err := s.parse(c.String("mode"), c.String("sleep"), c.String("cpus")); err != nil {
				return usageError{err}
			}
			if err := s.parseStreams(c.String("over"), c.String("measure"), c.String("size")); err != nil {
				return usageError{err}
			}
			return s.run(c.Context)
		},
	}
}

func (s *settings) parse(mode, sleep, cpus string) error {
	switch mode {
	case "both":
		s.modes = []string{"poll", "interrupt"}
	case "poll", "interrupt", "adaptive":
		s.modes = []string{mode}
	default:
		return fmt.Errorf("--mode %q: expected poll, interrupt, both or adaptive", mode)
	}
	switch sleep {
	case "thread":
	case "poller":
		s.poller = true
	default:
		return fmt.Errorf("--sleep %q: expected thread or poller", sleep)
	}
	if cpus != "" {
		for f := range strings.SplitSeq(cpus, ",") {
			n, err := strconv.ParseUint(f, 10, 16)
			if err != nil {
				return fmt.Errorf("--cpus %q: expected two numbers such as 0,1", cpus)
			}
			s.cpus = append(s.cpus, int(n))
		}
		if len(s.cpus) != 2 {
			return fmt.Errorf("--cpus %q: expected two numbers such as 0,1", cpus)
		}
	}
	if s.peer < -1 || s.peer >= regs.PeersMax {
		return fmt.Errorf("--peer %d: expected an ID below %d", s.peer, regs.PeersMax)
	}
	if s.count == 0 {
		return errors.New("--count: expected at least 1")
	}
	if s.silence <= 0 {
		return errors.New("--silence: expected a time above 0")
	}
	return nil
}

func (s *settings) run(ctx context.Context) error {
	if s.device == "" {
		found, err := ivshmem.Discover()
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return s.embedded(ctx)
		}
	}
	return s.play(ctx)
}

// play plays one side on a device.
func (s *settings) play(ctx context.Context) error {
	sleep := ivshmem.SleepThread
	if s.poller {
		sleep = ivshmem.SleepPoller
	}
	dev, err := ivshmem.Open(s.device, ivshmem.WithSleep(sleep))
	if err != nil {
		return err
	}
	defer dev.Close()
	peer, err := s.other(dev)
	if err != nil {
		return err
	}
	report := newReport(s.out, s.json)
	report.title(fmt.Sprintf("peer %d with peer %d, %s through %s", dev.ID(), peer, dev.Address(), dev.Driver()))
	if s.over != pingpong.Section {
		return s.playStreams(ctx, dev, peer, report)
	}
	for phase, mode := range s.modes {
		m, err := pingpong.ParseMode(mode)
		if err != nil {
			return err
		}
		res, err := pingpong.Run(ctx, dev, peer, pingpong.Config{
			Mode: m, Messages: s.count, Warmup: s.warmup, Batch: s.batch, Phase: uint32(phase), Silence: s.silence,
			Blind: os.Getenv(embeddedPeer) != "",
		})
		if res != nil {
			if rerr := report.add(res); rerr != nil {
				return rerr
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *settings) other(dev *ivshmem.Device) (uint32, error) {
	if s.peer >= 0 {
		return uint32(s.peer), nil
	}
	if first, err := strconv.ParseUint(os.Getenv(embeddedPeer), 10, 16); err == nil {
		return 2*uint32(first) + 1 - dev.ID(), nil // of two, behind the idle ones
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
