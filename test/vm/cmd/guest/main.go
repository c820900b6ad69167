// Command guest runs a command in fresh guests on one ivshmem link. It is
// what scripts/guest starts; see its --help.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/fetch"
)

const usage = `Usage: scripts/guest [OPTIONS] -- COMMAND [ARGUMENT...]

Boots fresh Linux guests on one ivshmem link, runs COMMAND in each of them,
and prints its output. The exit status is the first one that is not 0.
The guests have the project's commands, busybox and a shell; COMMAND finds its
guest's number in $GUEST (0, 1, ...) and how many there are in $GUESTS.
With more than one guest each line of output starts with "guest N: ".

  -n GUESTS           how many guests (1)
  --link OPTIONS      options for "ivshctl serve", one string
  --with PACKAGES     Debian packages for the guests, separated by spaces or
                      commas; their installation scripts do not run, and in
                      the shell busybox's applets win over programs of the
                      same name (give the path of the program)
  --driver DRIVER     kernel driver to bind to the device, such as vfio-pci, or
                      uio_ivshmem, which is built (kmod/)
  --kernel RELEASE    Debian release of kernel and packages (trixie, bookworm, or
                      trixie-backports for the kernel alone), or small: a kernel
                      that is built once, in minutes, and has iommufd
  --arch ARCH         architecture of the guests: amd64 or arm64
  --root-port         put the device behind a PCI Express root port
  --no-device         boot without a link and a device
  --fetch             only fetch what guests need, into the cache
  --console           print the consoles of the guests on stderr at the end

Examples:
  scripts/guest -- ivshctl info
  scripts/guest -n 2 --driver vfio-pci -- sh -c 'ivshctl info --json'
  scripts/guest --with pciutils -- lspci -v

QEMU and the kernel are fetched once, from the Debian mirror of this machine's
apt configuration into $IVSHMEM_CACHE (${XDG_CACHE_HOME:-~/.cache}/ivshmem);
nothing is installed. $IVSHMEM_QEMU names a QEMU to use instead, and
$IVSHMEM_MIRROR another mirror.
`

type options struct {
	guests                               int
	link, packages, driver, kernel, arch string
	rootPort, noDevice                   bool
	fetch, console                       bool
	command                              []string
}

func main() {
	var o options
	flags := flag.NewFlagSet("guest", flag.ContinueOnError)
	flags.Usage = func() {}
	flags.SetOutput(io.Discard)
	flags.IntVar(&o.guests, "n", 1, "")
	flags.StringVar(&o.link, "link", "", "")
	flags.StringVar(&o.packages, "with", "", "")
	flags.StringVar(&o.driver, "driver", "", "")
	flags.StringVar(&o.kernel, "kernel", fetch.Trixie, "")
	flags.StringVar(&o.arch, "arch", vm.AMD64, "")
	flags.BoolVar(&o.rootPort, "root-port", false, "")
	flags.BoolVar(&o.noDevice, "no-device", false, "")
	flags.BoolVar(&o.fetch, "fetch", false, "")
	flags.BoolVar(&o.console, "console", false, "")
	err := flags.Parse(os.Args[1:])
	o.command = flags.Args()
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return
	case err == nil && o.guests < 1:
		err = errors.New("-n needs a number above 0")
	case err == nil && len(o.command) == 0 && !o.fetch:
		err = errors.New("no COMMAND")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "guest: %v; see --help\n", err)
		os.Exit(2)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		s := <-signals
		signal.Reset() // a second one ends us at once
		cancel(interrupted(s.(syscall.Signal)))
	}()
	code, err := run(ctx, o)
	var signal interrupted
	if errors.As(context.Cause(ctx), &signal) {
		code = 128 + int(signal)
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
	}
	os.Exit(code)
}

// interrupted is why a run was given up.
type interrupted syscall.Signal

func (s interrupted) Error() string { return syscall.Signal(s).String() }

// failed is the exit status of the harness's own failures, told apart from
// those of most commands.
const failed = 125

func progress(message string) { fmt.Fprintln(os.Stderr, "guest:", message) }

func run(ctx context.Context, o options) (int, error) {
	cache, err := fetch.Open(progress)
	if err != nil {
		return failed, err
	}
	packages := strings.FieldsFunc(o.packages, func(r rune) bool { return r == ',' || r == ' ' })
	if o.fetch {
		return status(vm.Fetch(ctx, cache, o.kernel, o.arch, packages))
	}
	config := vm.Config{
		Driver: o.driver, Kernel: o.kernel, Arch: o.arch, Packages: packages, Progress: progress,
	}
	if !o.noDevice {
		// Later options win, so --link can have another number of peers.
		options := append([]string{"--quiet", "--peers", fmt.Sprint(max(o.guests, 2))}, strings.Fields(o.link)...)
		service, err := vm.Serve(ctx, os.Stderr, options...)
		if err != nil {
			return failed, err
		}
		defer service.Close()
		config.Devices = []vm.Device{{Socket: service.Socket, RootPort: o.rootPort}}
	}
	return runGuests(ctx, o, config)
}

func status(err error) (int, error) {
	if err != nil {
		return failed, err
	}
	return 0, nil
}

// runGuests boots the guests, all at the same time, and runs the command in
// all of them when all have booted.
func runGuests(ctx context.Context, o options, config vm.Config) (int, error) {
	configs := make([]vm.Config, o.guests)
	for i := range configs {
		configs[i] = config
		configs[i].Name = fmt.Sprintf("guest%d", i)
		configs[i].Env = []string{fmt.Sprintf("GUEST=%d", i), fmt.Sprintf("GUESTS=%d", o.guests)}
	}
	guests, err := vm.StartAll(ctx, configs)
	if err != nil {
		return failed, err
	}
	defer func() {
		for i, g := range guests {
			g.Close()
			if o.console {
				fmt.Fprintf(os.Stderr, "console of guest %d:\n%s\n", i, g.Console())
			}
		}
	}()
	errs := make([]error, o.guests)
	codes := make(chan int, o.guests)
	var output sync.Mutex
	var all sync.WaitGroup
	for i, g := range guests {
		all.Go(func() {
			stdout, stderr := io.Writer(os.Stdout), io.Writer(os.Stderr)
			if o.guests > 1 {
				out, err := &lines{to: stdout, mu: &output, guest: i}, &lines{to: stderr, mu: &output, guest: i}
				defer out.flush()
				defer err.flush()
				stdout, stderr = out, err
			}
			var st vm.Status
			p, err := g.Exec(vm.Command{Argv: o.command, Stdout: stdout, Stderr: stderr})
			if err == nil {
				st, err = p.Wait(ctx)
			}
			code := st.ExitCode()
			var start *vm.StartError
			if errors.As(err, &start) {
				code = 127
			} else if err != nil {
				code = failed
			}
			errs[i] = err
			codes <- code
		})
	}
	all.Wait()
	close(codes)
	for code := range codes {
		if code != 0 {
			return code, errors.Join(errs...)
		}
	}
	return 0, nil
}

// lines writes whole lines with the guest's number in front, so that those of
// several guests do not mix.
type lines struct {
	to    io.Writer
	mu    *sync.Mutex // shared by all writers
	guest int
	rest  []byte // the begun line
}

func (l *lines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	end := bytes.LastIndexByte(l.rest, '\n') + 1
	err := l.emit(l.rest[:end])
	l.rest = append(l.rest[:0], l.rest[end:]...)
	return len(p), err
}

func (l *lines) flush() {
	if len(l.rest) > 0 {
		_ = l.emit(append(l.rest, '\n'))
		l.rest = nil
	}
}

func (l *lines) emit(text []byte) error {
	if len(text) == 0 {
		return nil
	}
	var out []byte
	for line := range bytes.Lines(text) {
		out = append(fmt.Appendf(out, "guest %d: ", l.guest), line...)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.to.Write(out)
	return err
}
