package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/ports"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

func (p *program) portsCommand() *cli.Command {
	return &cli.Command{
		Name: "ports", Usage: "named ports of a virtio console, as files that any program can open",
		Action: unknownCommand, OnUsageError: onUsageError,
		Subcommands: []*cli.Command{p.portsServeCommand(), p.portsListCommand(), p.portsAddCommand(), p.portsRemoveCommand(), p.portsRenameCommand(), p.portsAttachCommand()},
	}
}

var (
	dirFlag = &cli.StringFlag{Name: "dir", Usage: "`DIR` with the ports (default: " + ports.DefaultDir() + ")", EnvVars: []string{"IVSHMEM_PORTS"}}
	asUsage = "as=socket (default), as=pty or as=char"
)

func portsDir(c *cli.Context) string {
	if dir := c.String("dir"); dir != "" {
		return dir
	}
	return ports.DefaultDir()
}

func wireFlag(unset string) *cli.StringFlag {
	return &cli.StringFlag{Name: "wire", Usage: "multiport, single or original, as the other side (default: " + unset + ")"}
}

func (p *program) portsServeCommand() *cli.Command {
	return command(0, &cli.Command{
		Name: "serve", Usage: "make every port a file in a directory, until it is interrupted",
		Description: `The link has to be of protocol type 8003h. Its peer 0 is the device, which has
the ports: those of --port, or else a console called "console". Peer 1 is their
driver, here or in Linux (virtio_ivshmem); it finds them, and takes from --port
what it wants of those with the names. A name of * stands for all others.

A port is a Unix socket; or a pseudo-terminal (as=pty), or a character device
(as=char: root, and the kernel's module cuse), to which there is a symbolic link.
One program at a time has it open. With cache, what it leaves unread is kept for
the next; limit is how much unread data there may be (256K), up to 64M.
docs/console.md tells more.

Example: ivshctl serve --socket /tmp/link0 --protocol 0x8003 --vectors 2 --output 0
         ivshctl ports serve -d /tmp/link0 --port console,console,as=pty --port org.example.log,cache`,
		Flags: []cli.Flag{deviceFlag, dirFlag, wireFlag("multiport"),
			&cli.GenericFlag{Name: "port", Usage: "`NAME[,console][,AS][,cache][,limit=SIZE]`, any number of times; AS is " + asUsage, Value: &portSpecs{}},
			&cli.IntFlag{Name: "max-ports", Usage: "how many ports there may be, up to 128", DefaultText: "4, or as many as are named, or the device has"},
			&cli.IntFlag{Name: "entries", Usage: "entries of each queue, a power of two; Linux puts 4096 bytes into the R/W section for each", DefaultText: "4"}},
		Action: p.portsServe,
	})
}

// portSpec is a port as it is written.
type portSpec struct {
	console.PortConfig
	set *ports.Settings // nil: none was said
}

func parsePort(s string) (portSpec, error) {
	name, rest, _ := strings.Cut(s, ",")
	spec, set := portSpec{PortConfig: console.PortConfig{Name: name}}, ports.Settings{}
	bad := func() (portSpec, error) {
		return spec, usagef("port %q: expected NAME[,console][,as=socket|pty|char][,cache][,limit=SIZE]", s)
	}
	if name == "" {
		return bad()
	}
	for rest != "" {
		var word string
		word, rest, _ = strings.Cut(rest, ",")
		key, value, _ := strings.Cut(word, "=")
		switch {
		case word == "console":
			spec.Console = true
			continue
		case word == "cache":
			set.Cache = true
		case key == "as":
			set.Form = ports.Form(value)
			if set.Form != ports.Socket && set.Form != ports.PTY && set.Form != ports.Char {
				return bad()
			}
		case key == "limit":
			n, err := parseSize("port "+name+": limit", value)
			if err != nil {
				return spec, err
			}
			if n < 1 || n > 64<<20 {
				return spec, usagef("port %s: limit=%s: expected 1 to 64M", name, value)
			}
			set.Limit = int(n)
		default:
			return bad()
		}
		spec.set = &set
	}
	return spec, nil
}

// portSpecs are all of --port.
type portSpecs []portSpec

func (s *portSpecs) Set(v string) error {
	spec, err := parsePort(v)
	*s = append(*s, spec)
	return err
}

func (s *portSpecs) String() string { return "" }

func parseWire(s string, unset console.Wire) (console.Wire, error) {
	for _, w := range []console.Wire{console.Multiport, console.Single, console.Original} {
		if s == w.String() {
			return w, nil
		}
	}
	if s != "" {
		return unset, usagef("--wire %q: expected multiport, single or original", s)
	}
	return unset, nil
}

func (p *program) portsServe(c *cli.Context) error {
	wire, err := parseWire(c.String("wire"), console.Multiport)
	if err != nil {
		return err
	}
	config := console.Config{Wire: wire, MaxPorts: c.Int("max-ports"), Entries: c.Int("entries")}
	files := ports.Config{
		Dir: portsDir(c), Settings: map[string]ports.Settings{},
		Ready:  func(path string) { fmt.Fprintf(p.out, "ready %s\n", path) },
		Gone:   func(path string) { fmt.Fprintf(p.out, "gone %s\n", path) },
		Failed: p.warn,
	}
	var named []portSpec
	for _, spec := range *c.Generic("port").(*portSpecs) {
		set := spec.set
		if set == nil {
			set = &ports.Settings{}
		}
		if spec.Name == "*" {
			files.Others = *set
			continue
		}
		if spec.set != nil {
			files.Settings[spec.Name] = *set
		}
		named = append(named, spec)
	}
	d, err := ivshmem.Open(c.String("device"))
	if err != nil {
		return err
	}
	defer d.Close()
	s, err := ports.New(files)
	if err != nil {
		return err
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(c.Context)
	defer cancel()
	if d.Protocol()&regs.VirtioBackEnd != 0 {
		return p.servePorts(ctx, d, config, s, named)
	}
	return p.followPorts(ctx, d, config, s)
}

func (p *program) warn(err error) { fmt.Fprintf(p.err, "ivshctl: %v\n", err) }

// servePorts is the device's side.
func (p *program) servePorts(ctx context.Context, d *ivshmem.Device, config console.Config, s *ports.Service, named []portSpec) error {
	if len(named) == 0 {
		named = []portSpec{{PortConfig: console.PortConfig{Name: "console", Console: true}}}
	}
	if config.MaxPorts == 0 {
		// On the multiport wire port 0 is for a console.
		config.MaxPorts = max(4, len(named)+1)
	}
	device, err := console.NewDevice(d, config)
	if err != nil {
		return err
	}
	if queues := 2*config.MaxPorts + 2; config.Wire == console.Multiport && config.MaxPorts > 1 && d.Vectors() >= queues {
		p.warn(fmt.Errorf("the link has %d vectors: Linux's driver cannot use %d ports with %d vectors or more: serve the link with --vectors 2", d.Vectors(), config.MaxPorts, queues))
	}
	for _, spec := range named {
		if _, err := device.AddPort(spec.PortConfig); err != nil {
			return fmt.Errorf("port %s: %w", spec.Name, err)
		}
	}
	s.Use(device)
	files, cancel := context.WithCancel(ctx)
	defer p.answerControl(files, s)()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.Run(files)
	}()
	err = device.Serve(ctx)
	cancel()
	<-ended
	return err
}

// followPorts is the driver's side. Devices come and go.
func (p *program) followPorts(ctx context.Context, d *ivshmem.Device, config console.Config, s *ports.Service) error {
	ctx, cancel := context.WithCancel(ctx)
	answered := p.answerControl(ctx, s)
	defer func() {
		cancel()
		answered()
	}()
	for {
		driver, err := console.Open(ctx, d, config)
		switch {
		case ofDevice(err):
			p.warn(fmt.Errorf("%w: waiting for the next device", err))
		case err != nil:
			return interrupted(err)
		default:
			s.Use(driver)
			files, cancel := context.WithCancel(ctx)
			go func() {
				<-driver.Done()
				cancel()
			}()
			s.Run(files)
			driver.Close()
			if ctx.Err() == nil {
				p.warn(errors.New("the device left: waiting for it"))
			}
		}
		// One that comes and goes all the time has to be bearable.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// ofDevice reports whether the device at the other end is to blame for an error:
// the next one may do better.
func ofDevice(err error) bool {
	var violation *virtio.ViolationError
	var message *console.MessageError
	return errors.As(err, &violation) || errors.As(err, &message) || errors.Is(err, virtio.ErrBackEndGone) || errors.Is(err, virtio.ErrNeedsReset)
}

func (p *program) portsListCommand() *cli.Command {
	return command(0, &cli.Command{
		Name: "list", Usage: "show the ports in a directory",
		Description: `HERE and THERE say who has a port open: a program on this side, and the other
side. NAME is that of the file; --json has the port's own name beside it.

Example: ivshctl ports list`,
		Flags: []cli.Flag{dirFlag, jsonFlag},
		Action: func(c *cli.Context) error {
			all, err := listPorts(portsDir(c))
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return printNames(p.out, all)
			}
			open := map[bool]string{true: "open", false: "closed"}
			w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tPORT\tKIND\tHERE\tTHERE\tUNREAD\tFLOW\tFORM\tPATH")
			for _, s := range all {
				kind, flow, form, path := "plain", "free", string(s.Form), s.Path
				if s.Console {
					kind = "console"
				}
				if s.Throttled {
					flow = "throttled"
				}
				if s.Error != "" {
					form, path = "failed", s.Error
				}
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", filepath.Base(s.Path), s.Number, kind, open[s.OpenHere], open[s.OpenThere], s.Unread, flow, form, path)
			}
			return w.Flush()
		},
	})
}

func (p *program) portsAddCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "add", Usage: "add a port to a running `ports serve` of the device's side", ArgsUsage: "NAME[,console][,AS][,cache][,limit=SIZE]",
		Description: "AS is " + asUsage + `. Prints the path when the port can be opened.

Example: ivshctl ports add org.example.log,cache`,
		Flags: []cli.Flag{dirFlag},
		Action: func(c *cli.Context) error {
			spec, err := parsePort(c.Args().First())
			if err != nil {
				return err
			}
			return p.askPath(portsDir(c), controlRequest{Do: "add", Name: spec.Name, Console: spec.Console, Settings: spec.set})
		},
	})
}

func (p *program) portsRemoveCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "remove", Usage: "remove a port of the device's side, also while it is in use", ArgsUsage: "NAME",
		Description: "Example: ivshctl ports remove org.example.log",
		Flags:       []cli.Flag{dirFlag},
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return usagef("ports remove: expected NAME")
			}
			_, err := askPorts(portsDir(c), controlRequest{Do: "remove", Name: c.Args().First()})
			return err
		},
	})
}

func (p *program) portsRenameCommand() *cli.Command {
	return command(2, &cli.Command{
		Name: "rename", Usage: "give a port of the device's side another name", ArgsUsage: "NAME NEW",
		Description: `Linux does not take a second name for a port, so the port is removed and added
again: programs of the other side lose it, and unread data is dropped. Nobody may
have it open on this side. Prints the new path.

Example: ivshctl ports rename org.example.log org.example.trace`,
		Flags: []cli.Flag{dirFlag},
		Action: func(c *cli.Context) error {
			if c.NArg() != 2 {
				return usagef("ports rename: expected NAME NEW")
			}
			return p.askPath(portsDir(c), controlRequest{Do: "rename", Name: c.Args().Get(0), New: c.Args().Get(1)})
		},
	})
}

// printNames prints JSON with names that the other side chose: nothing in them is
// for the terminal, which may take U+009B for the beginning of a command.
func printNames(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var out []byte
	for _, r := range string(b) {
		if strconv.IsPrint(r) {
			out = utf8.AppendRune(out, r)
			continue
		}
		for _, u := range utf16.AppendRune(nil, r) {
			out = fmt.Appendf(out, `\u%04x`, u)
		}
	}
	_, err = w.Write(append(out, '\n'))
	return err
}

// askPath asks for something that ends in a path, and prints that.
func (p *program) askPath(dir string, r controlRequest) error {
	a, err := askPorts(dir, r)
	if err == nil {
		fmt.Fprintln(p.out, a.Path)
	}
	return err
}
