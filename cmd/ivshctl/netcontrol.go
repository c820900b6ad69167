package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/fdpass"
)

// A `net up` listens on a socket of the kernel's abstract name space, which a
// network name space has its own of, as it has of interfaces, and which leaves
// nothing behind. Who connects says a word: "status" is answered by a line of
// JSON; "down" by the end of the process, and "capture" by frames, for its user
// and root.
const controlPrefix = "@ivshmem-net/"

// controlPatience is how long either side waits for the other.
const controlPatience = 10 * time.Second

// control is what others can ask of a `net up`.
type control struct {
	name     string
	status   func() any
	down     func()
	captures *captures // nil: there are none

	listener net.Listener
}

// listen begins to answer.
func (c *control) listen() (err error) {
	if c.listener, err = net.Listen("unix", controlPrefix+c.name); err != nil {
		return fmt.Errorf("interface %s: %w: another `ivshctl net up` has it", c.name, err)
	}
	go func() {
		for {
			conn, err := c.listener.Accept()
			if err != nil {
				return
			}
			go c.answer(conn.(*net.UnixConn))
		}
	}()
	return nil
}

func (c *control) close() { c.listener.Close() }

func (c *control) answer(conn *net.UnixConn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(controlPatience))
	b := make([]byte, 16)
	n, err := conn.Read(b)
	if err != nil {
		return
	}
	word := string(b[:n])
	if word == "status" {
		json.NewEncoder(conn).Encode(c.status())
		return
	}
	cred, err := fdpass.PeerCredentials(conn)
	if err != nil || cred.Uid != 0 && cred.Uid != uint32(os.Geteuid()) {
		io.WriteString(conn, refused)
		return
	}
	conn.SetDeadline(time.Time{})
	switch word {
	case "down":
		c.down()
		io.Copy(io.Discard, conn) // until the process ends
	case "capture":
		if c.captures == nil {
			io.WriteString(conn, notHere)
			return
		}
		one, err := c.captures.begin(conn, c.name)
		if err != nil {
			return
		}
		io.Copy(io.Discard, conn) // until the reader ends
		conn.SetDeadline(time.Unix(1, 0))
		c.captures.end(one)
	}
}

// Answers to who must not ask, and to who asks for frames that are to be had
// elsewhere.
const (
	refused = "refused\n"
	notHere = "not here\n"
)

// dialControl asks the `net up` of an interface.
func dialControl(name, word string) (*net.UnixConn, error) {
	conn, err := net.Dial("unix", controlPrefix+name)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: interface %s: expected one that `ivshctl net up` runs in this network name space: `ivshctl net status` lists them", ivshmem.ErrNotFound, name)
	}
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(controlPatience))
	if _, err := io.WriteString(conn, word); err != nil {
		conn.Close()
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

func refusedError(name string) error {
	return fmt.Errorf("interface %s: it was brought up by another user: run as root", name)
}

// askControl asks for "status", or "down": that returns when it has ended.
func askControl(name, word string) (json.RawMessage, error) {
	conn, err := dialControl(name, word)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	b, err := bufio.NewReader(conn).ReadBytes('\n')
	switch {
	case string(b) == refused:
		return nil, refusedError(name)
	case word == "down" && (err == io.EOF || errors.Is(err, unix.ECONNRESET)):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	return b, nil
}

// readCapture writes an interface's frames to the output until either ends.
func (p *program) readCapture(ctx context.Context, name string) error {
	conn, err := dialControl(name, "capture")
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Time{})
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	r := bufio.NewReaderSize(conn, 256<<10)
	if b, err := r.Peek(len(refused)); err == nil && string(b) == refused {
		return refusedError(name)
	}
	if b, err := r.Peek(len(notHere)); err == nil && string(b) == notHere {
		return fmt.Errorf("interface %s: it is the other end of a virtio device: capture on the interface, with tcpdump -i %s", name, name)
	}
	_, err = io.Copy(p.out, r)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, unix.ECONNRESET): // the other side ended
		return nil
	}
	return err
}

// controlled lists the interfaces that a `net up` runs in this network name
// space.
func controlled() ([]string, error) {
	b, err := os.ReadFile("/proc/self/net/unix")
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if name, is := strings.CutPrefix(f[len(f)-1], controlPrefix); is && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}
