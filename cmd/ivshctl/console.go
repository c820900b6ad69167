package main

import (
	"context"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/ports"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

func (p *program) consoleCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "console", Usage: "be a terminal on a console port, at either end of a link", ArgsUsage: "[NAME]",
		Description: `Peer 0 of a link of protocol type 8003h is a device with one console, such as
Linux's driver (virtio_ivshmem) shows as /dev/hvc0. Peer 1 uses the first console
of the device, or the port NAME, and waits for it. The other side may close the
port and open it again. The escape key leaves; the terminal is as before then.
In place of this terminal --pty makes one for other programs, and --socket takes
one program at a time. Many ports: 'ivshctl ports serve'.

Example: ivshctl serve --socket /tmp/link0 --protocol 0x8003 --vectors 2 --output 0
         ivshctl console -d /tmp/link0`,
		Flags: []cli.Flag{deviceFlag, wireFlag("single at peer 0, multiport at peer 1"), escapeFlag,
			&cli.BoolFlag{Name: "pty", Usage: "make a pseudo-terminal, and print its path"},
			&cli.StringFlag{Name: "link", Usage: "with --pty: `PATH` of a symbolic link to it, and print that"},
			&cli.StringFlag{Name: "socket", Usage: "listen on a Unix socket at `PATH`"}},
		Action: p.console,
	})
}

func (p *program) console(c *cli.Context) error {
	escape, err := parseEscape(c.String("escape"))
	if err != nil {
		return err
	}
	if c.IsSet("link") && !c.Bool("pty") {
		return usagef("console: --link is for --pty")
	}
	if c.Bool("pty") && c.IsSet("socket") {
		return usagef("console: expected --pty or --socket")
	}
	if _, err := parseWire(c.String("wire"), console.Single); err != nil {
		return err
	}
	d, err := ivshmem.Open(c.String("device"))
	if err != nil {
		return err
	}
	defer d.Close()
	return p.withConsole(c, d, func(ctx context.Context, port *console.Port, resize func(*console.Port, console.Size) error) error {
		door := &ports.Door{Port: port, Resize: resize, Ready: func(path string) { fmt.Fprintf(p.out, "ready %s\n", path) }, Failed: p.warn}
		switch {
		case c.Bool("pty"):
			door.Path = c.String("link")
			return door.PTY(ctx)
		case c.IsSet("socket"):
			door.Path = c.String("socket")
			return door.Socket(ctx)
		}
		open, err := openLine(ctx, port)
		if err != nil {
			return err
		}
		l := &line{ReadWriteCloser: open}
		if resize != nil {
			l.resize = func(s console.Size) { resize(port, s) }
		}
		name := port.Name()
		if name == "" {
			name = "console"
		}
		return (&session{program: p, line: l, name: name, escape: escape}).run(ctx)
	})
}

// withConsole uses a port of a device until the context or the device ends.
func (p *program) withConsole(c *cli.Context, d *ivshmem.Device, use func(context.Context, *console.Port, func(*console.Port, console.Size) error) error) error {
	ctx, cancel := context.WithCancelCause(c.Context)
	defer cancel(nil)
	name := c.Args().First()
	if d.Protocol()&regs.VirtioBackEnd != 0 {
		wire, _ := parseWire(c.String("wire"), console.Single)
		device, err := console.NewDevice(d, console.Config{Wire: wire, MaxPorts: 1})
		if err != nil {
			return err
		}
		if name == "" {
			name = "console"
		}
		port, err := device.AddPort(console.PortConfig{Name: name, Console: true})
		if err != nil {
			return err
		}
		served := make(chan struct{})
		go func() {
			defer close(served)
			cancel(device.Serve(ctx))
		}()
		err = use(ctx, port, device.Resize)
		flush(ctx, port)
		cancel(err)
		<-served
		return interrupted(context.Cause(ctx))
	}
	wire, _ := parseWire(c.String("wire"), console.Multiport)
	driver, err := console.Open(ctx, d, console.Config{Wire: wire})
	if err != nil {
		return interrupted(err)
	}
	defer driver.Close()
	go func() {
		<-driver.Done()
		cancel(fmt.Errorf("the console at the other end of the link left: %w", ivshmem.ErrGone))
	}()
	port, err := findPort(ctx, driver, name)
	if err == nil {
		err = use(ctx, port, nil)
		flush(ctx, port)
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return interrupted(err)
}

// flush gives the other side a moment to take what was written: it goes with the
// console.
func flush(ctx context.Context, p *console.Port) {
	ctx, cancel := context.WithTimeout(ctx, lastWords)
	defer cancel()
	p.Flush(ctx)
}

// findPort waits for a port with a name, or a console.
func findPort(ctx context.Context, d *console.Driver, name string) (*console.Port, error) {
	for {
		changed := d.Changes()
		for _, p := range d.Ports() {
			if name == "" && p.Console() || name != "" && p.Name() == name {
				return p, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// portLine is a port that the other side may close and open again.
type portLine struct {
	port   *console.Port
	ctx    context.Context // until Close
	cancel context.CancelFunc
}

func openLine(ctx context.Context, p *console.Port) (*portLine, error) {
	if err := p.Open(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	return &portLine{p, ctx, cancel}, nil
}

func (l *portLine) Read(b []byte) (int, error) {
	for {
		n, err := l.port.Read(b)
		if err != io.EOF {
			return n, err
		}
		if err := l.port.WaitOpen(l.ctx); err != nil {
			return 0, err
		}
	}
}

// Write drops what nobody is there for, as a terminal that is not connected
// does.
func (l *portLine) Write(b []byte) (int, error) {
	if !l.port.PeerOpen() {
		return len(b), nil
	}
	return l.port.WriteAll(l.ctx, b)
}

func (l *portLine) Close() error {
	l.cancel()
	return l.port.Close()
}
