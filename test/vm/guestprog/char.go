package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/cuse"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// charServe is the driver of a console, and has a character device in a folder
// of /dev for each port with a name, until SIGTERM. It prints a line for each
// that is made or that has ended.
func charServe(ctx context.Context, args []string) (any, error) {
	if len(args) != 2 {
		return nil, errors.New("expected a device and a folder of /dev")
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM)
	defer stop()
	dev, err := ivshmem.Open(args[0])
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	driver, err := console.Open(ctx, dev, console.Config{})
	if err != nil {
		return nil, err
	}
	defer driver.Close()
	var all sync.WaitGroup
	defer all.Wait()
	for served := map[*console.Port]bool{}; ; {
		changed := driver.Changes()
		for _, p := range driver.Ports() {
			if served[p] || p.Name() == "" {
				continue
			}
			served[p] = true
			node := path.Join(args[1], p.Name())
			all.Go(func() {
				err := cuse.Serve(ctx, cuse.Config{Name: node, Port: p, Ready: func() { fmt.Println("ready", node) }})
				fmt.Println("ended", node, err)
			})
		}
		select {
		case <-changed:
		case <-driver.Done():
			return nil, errors.New("the device is gone")
		case <-ctx.Done():
			return nil, nil
		}
	}
}

// charDrive makes the system calls that standard input tells, a line for each,
// on one file, and prints what they return.
func charDrive(_ context.Context, args []string) (any, error) {
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT)
	fd := -1
	return nil, answerCalls(func(line string) (any, error) {
		call, argument, _ := strings.Cut(line, " ")
		return systemCall(&fd, call, argument)
	})
}

// answerCalls makes the calls that standard input tells, a line for each, and
// prints what they return, or the name of the error number.
func answerCalls(call func(line string) (any, error)) error {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		result, err := call(lines.Text())
		var number unix.Errno
		switch {
		case errors.As(err, &number):
			fmt.Println(unix.ErrnoName(number))
		case err != nil:
			return err
		default:
			fmt.Println(result)
		}
	}
	return nil
}

func systemCall(fd *int, call, argument string) (any, error) {
	number, _ := strconv.Atoi(argument)
	buffer := make([]byte, number)
	switch call {
	case "open":
		var err error
		*fd, err = unix.Open(argument, unix.O_RDWR|unix.O_CLOEXEC, 0)
		return "open", err
	case "close":
		return "close", unix.Close(*fd)
	case "nonblock":
		return "nonblock", unix.SetNonblock(*fd, argument == "on")
	case "read":
		n, err := unix.Read(*fd, buffer)
		return fmt.Sprintf("%d %q", n, buffer[:max(n, 0)]), err
	case "count":
		return unix.Read(*fd, buffer)
	case "interrupted": // by SIGINT
		return interrupted(*fd)
	case "write":
		return unix.Write(*fd, []byte(argument))
	case "fill": // writes until there is an error
		for {
			if _, err := unix.Write(*fd, make([]byte, 4096)); err != nil {
				return nil, err
			}
		}
	case "skip": // reads past what fill wrote
		for b := make([]byte, 64<<10); ; {
			n, err := unix.Read(*fd, b)
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				return nil, errors.Join(err, io.ErrUnexpectedEOF)
			}
			if rest := bytes.TrimLeft(b[:n], "\x00"); len(rest) > 0 {
				return fmt.Sprintf("%q", rest), nil
			}
		}
	case "poll": // waits for some of the events; 0: does not wait
		p := []unix.PollFd{{Fd: int32(*fd), Events: unix.POLLIN | unix.POLLOUT}}
		timeout := 0
		switch argument {
		case "in":
			p[0].Events, timeout = unix.POLLIN, -1
		case "hup":
			p[0].Events, timeout = 0, -1
		}
		_, err := unix.Poll(p, timeout)
		return names(uint32(p[0].Revents)), err
	case "edge": // waits for the next edge; the first is the state
		return edge(*fd)
	case "inq":
		return unix.IoctlGetInt(*fd, unix.TIOCINQ)
	case "winsize":
		w, err := unix.IoctlGetWinsize(*fd, unix.TIOCGWINSZ)
		if err != nil {
			return nil, err
		}
		return fmt.Sprintf("%d rows %d columns", w.Row, w.Col), nil
	case "isatty":
		_, err := unix.IoctlGetTermios(*fd, unix.TCGETS)
		return "yes", err
	}
	return nil, fmt.Errorf("%q is no call", call)
}

func names(events uint32) string {
	s := []string{}
	for _, e := range []struct {
		bit  uint32
		name string
	}{{unix.POLLIN, "IN"}, {unix.POLLOUT, "OUT"}, {unix.POLLERR, "ERR"}, {unix.POLLHUP, "HUP"}} {
		if events&e.bit != 0 {
			s = append(s, e.name)
		}
	}
	return strings.Join(s, "|")
}

// interrupted reads until a signal for the thread ends it.
func interrupted(fd int) (any, error) {
	thread, ended := make(chan int), make(chan error)
	go func() {
		runtime.LockOSThread()
		thread <- unix.Gettid()
		_, err := unix.Read(fd, make([]byte, 10))
		ended <- err
	}()
	tid := <-thread
	for state := ""; state != "S"; { // it sleeps in the read
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", tid))
		if err != nil {
			return nil, err
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		state, _, _ = strings.Cut(rest, " ")
		if b, err = os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid)); err != nil || !strings.HasPrefix(string(b), strconv.Itoa(unix.SYS_READ)+" ") {
			state = ""
		}
	}
	if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGINT); err != nil {
		return nil, err
	}
	return "no error", <-ended
}

// edges is an epoll set of one file, for edges.
var edges = -1

func edge(fd int) (any, error) {
	if edges < 0 {
		var err error
		if edges, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
			return nil, err
		}
		if err := unix.EpollCtl(edges, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}); err != nil {
			return nil, err
		}
	}
	for {
		e := make([]unix.EpollEvent, 1)
		n, err := unix.EpollWait(edges, e, -1)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != 1 {
			return nil, errors.Join(err, io.ErrUnexpectedEOF)
		}
		return names(e[0].Events), nil
	}
}
