// Ivsh-pingpong measures what two peers of an ivshmem v2 link can do: round
// trips, and messages one way. It checks every message.
//
// Without a device it starts a link and two peer processes by itself, and can
// measure beside it what else two processes of a machine could use. With a
// device, it plays with the other peer of its link: run it with the same
// options in two guests, or in a guest and on the host.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
)

const description = `Without --device, and on a machine without an ivshmem device, it starts a link
and two peer processes on this machine. With a device (a PCI address, the path
of a link's socket, or the machine's only one) it plays with the other peer of
the link; the peer with the lower ID leads and decides how many messages. Both
need the same --over, --mode and --repeat.

Over a section a message is one word of shared memory. Over messages and conn it
is what a program sends by package stream. Mode interrupt sleeps; mode adaptive
looks first, for as long as that pays off. Every cache line of every message is
written by its sender and checked by its receiver. With --compare the same is
measured, in turn and on the same CPUs, over what two processes of a machine
could use instead.

Latencies are round trips. With --rate they count from the time at which a
message should have been sent. An error is a message that was lost, or not what
was due; it ends the run. Exit codes: 0 all messages came back, 1 otherwise,
2 wrong usage.

Example: ivsh-pingpong --mode interrupt --count 10000 --device /run/link0
         ivsh-pingpong --over conn --mode adaptive --measure throughput --size 64,4K,64K
         ivsh-pingpong --compare --over section,messages --repeat 5 --duration 1s`

func main() {
	// A thread that sleeps for an interrupt keeps what runs Go code for a
	// moment, if there is more of that. A process on one CPU has one.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	if job := os.Getenv(jobVariable); job != "" {
		if err := work(job); err != nil {
			fmt.Fprintf(os.Stderr, "ivsh-pingpong: %v\n", err)
			os.Exit(1)
		}
		return
	}
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
	plan
	device  string
	peer    int
	compare bool
	peers   int // idle ones of the embedded link
	cpus    []int
	report  report
	err     io.Writer
}

func newApp(out, errOut io.Writer) *cli.App {
	s := &settings{err: errOut, report: report{out: out}}
	return &cli.App{
		Name:        "ivsh-pingpong",
		Usage:       "measure round trips and throughput over ivshmem v2 shared memory and doorbells",
		ArgsUsage:   " ",
		Description: description,
		Writer:      out,
		ErrWriter:   errOut,
		HideVersion: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "device", Aliases: []string{"d"}, Usage: "`DEVICE`: PCI address or socket path", EnvVars: []string{"IVSHMEM_DEVICE"}, Destination: &s.device},
			&cli.IntFlag{Name: "peer", Usage: "`ID` of the peer to play with (default: the only other one)", Value: -1, Destination: &s.peer},
			&cli.StringFlag{Name: "over", Usage: "what messages go over: section, messages or conn, or some of them as in section,conn (default: section, or messages for mode adaptive)"},
			&cli.StringFlag{Name: "mode", Usage: "how to wait: poll, interrupt or adaptive, or some of them as in poll,adaptive; both is poll,interrupt", Value: "both"},
			&cli.StringFlag{Name: "measure", Usage: "latency (round trips), or over streams: throughput (one way), rate (one way, 64 messages at a time), idle (CPU time of a connection on which nothing happens)", Value: "latency"},
			&cli.StringFlag{Name: "size", Usage: "`BYTES` of a message over streams, or some sizes as in 64,1K,64K", Value: "64"},
			&cli.Uint64Flag{Name: "count", Aliases: []string{"n"}, Usage: "messages, or round trips, that count", DefaultText: "20000, or no limit with --duration"},
			&cli.Uint64Flag{Name: "warmup", Usage: "those before", Value: 1000, Destination: &s.task.Warmup},
			&cli.Uint64Flag{Name: "batch", Usage: "round trips that make a sample, so that the clock is read less", Value: 1, Destination: &s.task.Batch},
			&cli.DurationFlag{Name: "duration", Usage: "of each measurement", DefaultText: "10s for idle, no limit otherwise"},
			&cli.Float64Flag{Name: "rate", Usage: "`N` round trips per second, whether or not the last answer is there (default: each when it is)", Destination: &s.task.Rate},
			&cli.IntFlag{Name: "conns", Usage: "idle connections besides, over streams", Destination: &s.task.Conns},
			&cli.IntFlag{Name: "peers", Usage: "idle peers on the link that is started, with an endpoint each", Destination: &s.peers},
			&cli.StringFlag{Name: "sleep", Usage: "how to sleep in mode interrupt: thread (a blocked thread) or poller (Go's)", Value: "thread"},
			&cli.BoolFlag{Name: "compare", Usage: "measure in turn what else two processes of this machine could use", Destination: &s.compare},
			&cli.IntFlag{Name: "repeat", Usage: "`N` rounds of all measurements; the table has medians", Value: 1, Destination: &s.rounds},
			&cli.StringFlag{Name: "cpus", Usage: "`A,B`: the CPUs for the two processes of this machine", DefaultText: "with --compare the first two, otherwise any"},
			&cli.DurationFlag{Name: "silence", Usage: "how long the peer may say nothing, over a section", Value: 10 * time.Second, Destination: &s.silence},
			&cli.BoolFlag{Name: "json", Usage: "print JSON, an object for each measurement", Destination: &s.report.json},
			&cli.BoolFlag{Name: "csv", Usage: "print CSV, a line for each measurement", Destination: &s.report.csv},
			&cli.StringFlag{Name: "hdr", Usage: "write latencies to `FILE`: a log of HDR histograms, or, if it ends in .hgrm, the percentiles of the one measurement", TakesFile: true, Destination: &s.report.hdr},
			&cli.StringFlag{Name: "profile", Usage: "write CPU profiles of both processes to `DIR`, for go tool pprof", TakesFile: true, Destination: &s.profile},
		},
		HideHelpCommand: true,
		OnUsageError:    func(_ *cli.Context, err error, _ bool) error { return usageError{err} },
		ExitErrHandler:  func(*cli.Context, error) {},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return usageError{fmt.Errorf("unexpected argument %q", c.Args().First())}
			}
			if err := s.parse(c); err != nil {
				return usageError{err}
			}
			return s.run(c.Context)
		},
	}
}

func (s *settings) run(ctx context.Context) error {
	embedded := s.compare
	if s.device == "" && !embedded {
		found, err := ivshmem.Discover()
		if err != nil {
			return err
		}
		embedded = len(found) == 0
	}
	if err := s.report.open(s); err != nil {
		return err
	}
	var err error
	if embedded {
		err = s.embedded(ctx)
	} else {
		err = s.play(ctx)
	}
	return errors.Join(err, s.report.close())
}
