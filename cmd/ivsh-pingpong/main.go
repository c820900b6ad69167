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

Latencies are round trips. An error is a message that was lost, or not what
was due; it ends the run. Exit codes: 0 all messages came back, 1 otherwise,
2 wrong usage.

Example: ivsh-pingpong --mode interrupt --count 10000 --device /run/link0`

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
	modes    []pingpong.Mode
	count    uint64
	warmup   uint64
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
			&cli.StringFlag{Name: "mode", Usage: "poll, interrupt, or both one after the other", Value: "both"},
			&cli.Uint64Flag{Name: "count", Aliases: []string{"n"}, Usage: "round trips that count", Value: 20000, Destination: &s.count},
			&cli.Uint64Flag{Name: "warmup", Usage: "round trips before those", Value: 1000, Destination: &s.warmup},
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
			return s.run(c.Context)
		},
	}
}

func (s *settings) parse(mode, sleep, cpus string) error {
	if mode == "both" {
		s.modes = []pingpong.Mode{pingpong.Poll, pingpong.Interrupt}
	} else {
		m, err := pingpong.ParseMode(mode)
		if err != nil {
			return fmt.Errorf("--mode %q: expected poll, interrupt or both", mode)
		}
		s.modes = []pingpong.Mode{m}
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
	for phase, mode := range s.modes {
		res, err := pingpong.Run(ctx, dev, peer, pingpong.Config{
			Mode: mode, Messages: s.count, Warmup: s.warmup, Phase: uint32(phase), Silence: s.silence,
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
