package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/test/vm/internal/portload"
)

// portRecords exchanges records through many ports, whatever becomes of their
// files. A line of standard input tells all ports what to do; when they do it the
// counts are printed.
func portRecords(_ context.Context, args []string) (any, error) {
	f := flags("port-records")
	dir := f.String("dir", "", "where the ports are")
	end := f.Int("end", 0, "0 or 1: which of the two ends")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	all := map[string]*recordPort{}
	for _, name := range f.Args() {
		p := &recordPort{End: portload.NewEnd(name, *end), path: filepath.Join(*dir, name), fd: -1, orders: make(chan string, 1), counts: make(chan portload.Counts, 1)}
		all[name] = p
		go func() {
			if err := p.run(); err != nil {
				fmt.Fprintf(os.Stderr, "guestprog: port %s: %v\n", name, err)
				os.Exit(1)
			}
		}()
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		for _, p := range all {
			p.orders <- lines.Text()
		}
		counts := map[string]portload.Counts{}
		for name, p := range all {
			counts[name] = <-p.counts
		}
		if err := json.NewEncoder(os.Stdout).Encode(counts); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// recordPort is a port's file, which may go at any time.
type recordPort struct {
	*portload.End
	path   string
	fd     int  // -1: closed
	closed bool // it was told to
	again  bool // the file was closed and is to be opened again
	paused bool // it does not read
	order  string
	orders chan string
	counts chan portload.Counts
}

// pace is how long a port waits in one place, in ms.
const pace = 20

func (p *recordPort) run() error {
	b := make([]byte, 64<<10)
	for {
		select {
		case p.order = <-p.orders:
			p.obey()
		default:
		}
		if p.done() {
			p.order = ""
			p.counts <- p.Counts()
		}
		if p.closed {
			time.Sleep(pace * time.Millisecond)
			continue
		}
		if err := p.step(b); err != nil {
			return err
		}
		time.Sleep(pace * time.Millisecond) // services that start need the processor
	}
}

func (p *recordPort) obey() {
	switch p.order {
	case "pause":
		p.paused = true
	case "close":
		p.close()
		p.closed = true
	case "open":
		p.closed, p.paused, p.again = false, false, true
		p.Reopened()
	case "finish":
		p.Finish()
	}
}

// done says whether an order has been carried out.
func (p *recordPort) done() bool {
	switch p.order {
	case "":
		return false
	case "finish":
		return p.Idle()
	case "open":
		return !p.again && !p.Opening()
	}
	return true
}

func (p *recordPort) close() {
	if p.fd >= 0 {
		unix.Close(p.fd)
	}
	p.fd = -1
}

// step opens the file, or writes and reads what can be.
func (p *recordPort) step(b []byte) error {
	if p.fd < 0 {
		fd, err := unix.Open(p.path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil { // the service is not there, or knows the port not yet
			time.Sleep(pace * time.Millisecond)
			return nil
		}
		p.fd = fd
		if !p.again {
			p.Anew()
		}
		p.again = false
	}
	poll := []unix.PollFd{{Fd: int32(p.fd)}}
	if !p.paused {
		poll[0].Events |= unix.POLLIN
	}
	out := p.Output()
	if len(out) > 0 {
		poll[0].Events |= unix.POLLOUT
	}
	if _, err := unix.Poll(poll, pace); err != nil && err != unix.EINTR {
		return err
	}
	events := poll[0].Revents
	if events&unix.POLLIN != 0 && !p.paused {
		n, err := unix.Read(p.fd, b)
		switch {
		case err != nil:
			return p.failed(err)
		case n == 0:
			p.Ended()
		default:
			if err := p.Input(b[:n]); err != nil {
				return err
			}
		}
	}
	if events&unix.POLLOUT != 0 && len(out) > 0 {
		n, err := unix.Write(p.fd, out)
		if err != nil {
			return p.failed(err)
		}
		p.Wrote(n)
	}
	if events&unix.POLLHUP != 0 && events&(unix.POLLIN|unix.POLLOUT) == 0 {
		if !p.paused { // the port was removed
			return p.failed(unix.ENODEV)
		}
		time.Sleep(pace * time.Millisecond)
	}
	if events&unix.POLLERR != 0 {
		return p.failed(unix.ENOTCONN)
	}
	return nil
}

// failed looks at what a call returned: the file may have gone.
func (p *recordPort) failed(err error) error {
	switch err {
	case unix.EAGAIN, unix.EINTR, unix.ENOSPC:
		return nil
	case unix.ENODEV, unix.ENOTCONN, unix.ECONNABORTED:
		p.close()
		return nil
	}
	return err
}
