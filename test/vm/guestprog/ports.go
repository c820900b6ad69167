package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/test/vm/internal/portload"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// portLoad exchanges words through many ports at once, and checks them. It prints
// how many seconds each took, and keeps the files open until the end of standard input: the other program may not have
// read all.
func portLoad(_ context.Context, args []string) (any, error) {
	f := flags("port-load")
	dir := f.String("dir", "", "where the ports are")
	end := f.Int("end", 0, "0 or 1: which of the two ends")
	size := f.Int64("bytes", 1<<20, "for each port, one way")
	corrupt := f.Bool("corrupt", false, "turn over a bit of the first port")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	var all sync.WaitGroup
	seconds := make([]float64, f.NArg())
	begin := time.Now()
	for i, name := range f.Args() {
		rw, err := portload.Open(filepath.Join(*dir, name))
		if err != nil {
			return nil, err
		}
		defer rw.Close()
		all.Go(func() {
			if err := portload.Exchange(rw, name, *end, *size, *corrupt && i == 0); err != nil {
				fmt.Fprintf(os.Stderr, "guestprog: port %s: %v\n", name, err)
				os.Exit(1) // other ports may wait for ever
			}
			seconds[i] = time.Since(begin).Seconds()
		})
	}
	all.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(seconds); err != nil {
		return nil, err
	}
	for b := make([]byte, 1); ; {
		if _, err := os.Stdin.Read(b); err != nil {
			return nil, nil
		}
	}
}

// portTerminal has a port's pseudo-terminal as its controlling one, and prints
// the size of the window: at first, and at each SIGWINCH. A line with rows and
// columns sets it.
func portTerminal(_ context.Context, args []string) (any, error) {
	if len(args) != 1 {
		return nil, errors.New("expected a terminal")
	}
	winch := make(chan os.Signal, 8)
	signal.Notify(winch, unix.SIGWINCH)
	signal.Ignore(unix.SIGHUP)
	fd, err := unix.Open(args[0], unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", args[0], err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.TIOCSCTTY, 0); err != nil {
		return nil, fmt.Errorf("TIOCSCTTY: %w", err)
	}
	sizes := make(chan unix.Winsize)
	go func() {
		defer close(sizes)
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			var s unix.Winsize
			if _, err := fmt.Sscan(lines.Text(), &s.Row, &s.Col); err != nil {
				return
			}
			sizes <- s
		}
	}()
	for {
		s, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		if err != nil {
			return nil, err
		}
		fmt.Printf("%d rows %d columns\n", s.Row, s.Col)
		select {
		case <-winch:
		case s, ok := <-sizes:
			if !ok {
				return nil, nil
			}
			if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &s); err != nil {
				return nil, err
			}
		}
	}
}

// portSide is one side of a console as package console has it, for what no file
// can ask for. It makes the calls that standard input tells, and prints what they
// return.
func portSide(ctx context.Context, args []string) (any, error) {
	f := flags("port-side")
	wire := f.String("wire", "", "how the two sides talk")
	names := f.String("ports", "", "of the device, with commas; those that begin with con are consoles")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	config := console.Config{MaxPorts: 12}
	for config.Wire.String() != *wire {
		if config.Wire++; config.Wire > console.Original {
			return nil, fmt.Errorf("-wire %q: unknown", *wire)
		}
	}
	dev, err := ivshmem.Open("")
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	s := &side{ctx: ctx}
	if *names != "" {
		if s.device, err = console.NewDevice(dev, config); err != nil {
			return nil, err
		}
		for name := range strings.SplitSeq(*names, ",") {
			if _, err := s.device.AddPort(console.PortConfig{Name: name, Console: strings.HasPrefix(name, "con")}); err != nil {
				return nil, err
			}
		}
		ctx, cancel := context.WithCancel(ctx)
		served := make(chan error, 1)
		go func() { served <- s.device.Serve(ctx) }()
		defer func() {
			cancel()
			<-served
		}()
	} else {
		if s.driver, err = console.Open(ctx, dev, config); err != nil {
			return nil, err
		}
		defer s.driver.Close()
	}
	fmt.Println("ready")
	return nil, answerCalls(s.call)
}

// side is the device's side or the driver's.
type side struct {
	ctx    context.Context
	device *console.Device
	driver *console.Driver
}

func (s *side) port(ctx context.Context, name string) (*console.Port, error) {
	switch {
	case s.device != nil:
		return s.device.WaitPort(ctx, name)
	case s.driver.Wire() == console.Single: // names are not carried
		return s.driver.Port(0), nil
	}
	return s.driver.WaitPort(ctx, name)
}

func (s *side) call(line string) (any, error) {
	words := strings.Fields(line)
	if len(words) == 2 && words[0] == "emergency" && s.driver != nil {
		return "sent", s.driver.EmergencyWrite(s.ctx, words[1][0])
	}
	if len(words) < 2 {
		return nil, fmt.Errorf("%q is no call", words)
	}
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	p, err := s.port(ctx, words[1])
	if err != nil {
		return nil, err
	}
	switch words[0] {
	case "open":
		return "open", p.Open()
	case "cached":
		return "asked", p.SetPeerCache(true)
	case "limit-1-mib":
		return "asked", p.SetPeerLimit(1)
	case "resize": // of the device only
		return "told", s.device.Resize(p, console.Size{Cols: 132, Rows: 43})
	case "write": // when there is somebody
		if err := p.WaitOpen(ctx); err != nil {
			return nil, err
		}
		_, err := p.WriteAll(ctx, []byte("unread"))
		return "wrote", err
	case "fill": // until the other side has throttled it
		for b := make([]byte, 4096); ; {
			changed := p.Changes()
			_, err := p.TryWrite(b)
			switch {
			case errors.Is(err, console.ErrThrottled):
				return "throttled", nil
			case errors.Is(err, console.ErrWouldBlock):
				select {
				case <-changed:
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			case err != nil:
				return nil, err
			}
		}
	}
	return nil, fmt.Errorf("%q is no call", words)
}
