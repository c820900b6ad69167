// Ivshctl uses ivshmem v2 devices from the command line: it finds them, says
// what is wrong with them, reads and writes states, doorbells and shared
// memory, and serves links to guests and host processes.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/virtio"
)

// Exit codes, also in the help text.
const (
	exitFailed       = 1
	exitUsage        = 2
	exitNotFound     = 3
	exitBusy         = 4
	exitTimeout      = 5
	exitNotSupported = 6
	exitGone         = 7
)

const description = `DEVICE is a PCI address (0000:00:04.0), the path of a link's socket, or
nothing where the machine has one device. Numbers may be decimal or 0x…;
sizes may end in K, M, G or T (powers of 1024).

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such device, 4 device or
link in use, 5 time is up, 6 not possible the way the device is held,
7 the device is gone.`

// program is one invocation: where it reads and prints.
type program struct {
	in       io.Reader
	out, err io.Writer
}

// usageError is wrong usage, for the exit code.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() {
	// A thread that sleeps for an interrupt keeps what runs Go code for a
	// moment. On a machine with one CPU there has to be more of that.
	runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0)))
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	p := &program{in: os.Stdin, out: os.Stdout, err: os.Stderr}
	code := p.run(ctx, os.Args)
	stop()
	os.Exit(code)
}

// run runs the program and returns its exit code.
func (p *program) run(ctx context.Context, args []string) int {
	app := p.app()
	err := app.RunContext(ctx, permute(app, args))
	if err == nil {
		return 0
	}
	fmt.Fprintf(p.err, "ivshctl: %v\n", err)
	return exitCode(err)
}

func exitCode(err error) int {
	var usage usageError
	for _, c := range []struct {
		is   bool
		code int
	}{
		{errors.As(err, &usage), exitUsage},
		{errors.Is(err, ivshmem.ErrNotFound), exitNotFound},
		{errors.Is(err, ivshmem.ErrBusy), exitBusy},
		{errors.Is(err, context.DeadlineExceeded), exitTimeout},
		{errors.Is(err, ivshmem.ErrNotSupported), exitNotSupported},
		{errors.Is(err, ivshmem.ErrGone) || errors.Is(err, virtio.ErrBackEndGone), exitGone},
	} {
		if c.is {
			return c.code
		}
	}
	return exitFailed
}

func (p *program) app() *cli.App {
	return &cli.App{
		Name:                 "ivshctl",
		Usage:                "use ivshmem v2 devices: memory and doorbells between virtual machines",
		Description:          description,
		Reader:               p.in,
		Writer:               p.out,
		ErrWriter:            p.err,
		EnableBashCompletion: true,
		Suggest:              true,
		HideVersion:          true,
		// The exit code is ours to choose; the library would end the process.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   onUsageError,
		Action:         unknownCommand,
		Commands: []*cli.Command{
			p.listCommand(), p.infoCommand(), p.doctorCommand(), p.stateCommand(), p.ringCommand(), p.waitCommand(),
			p.readCommand(), p.writeCommand(), p.sendCommand(), p.recvCommand(), p.cpCommand(), p.proxyCommand(), p.netCommand(), p.blockCommand(), p.consoleCommand(), p.portsCommand(), p.entropyCommand(), p.serveCommand(), p.ivshmem2ServerCommand(),
			p.bindCommand(), p.unbindCommand(), p.udevCommand(),
		},
	}
}

func onUsageError(_ *cli.Context, err error, _ bool) error { return usageError{err} }

// unknownCommand is the action of what only has subcommands.
func unknownCommand(c *cli.Context) error {
	if c.NArg() == 0 {
		return cli.ShowSubcommandHelp(c)
	}
	return usagef("unknown command %q: `%s --help` lists the commands", c.Args().First(), c.App.Name)
}

// command completes a command: wrong options are usage errors, and so are
// surplus arguments.
func command(maxArgs int, c *cli.Command) *cli.Command {
	action := c.Action
	c.OnUsageError = onUsageError
	c.Action = func(ctx *cli.Context) error {
		if maxArgs >= 0 && ctx.NArg() > maxArgs {
			return usagef("%s: unexpected argument %q", c.Name, ctx.Args().Get(maxArgs))
		}
		return action(ctx)
	}
	return c
}

var deviceFlag = &cli.StringFlag{
	Name: "device", Aliases: []string{"d"}, Usage: "`DEVICE`: PCI address or socket path",
	EnvVars: []string{"IVSHMEM_DEVICE"},
}

var jsonFlag = &cli.BoolFlag{Name: "json", Usage: "print JSON"}
