package main

import (
	"bufio"
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
// nothing behind. Who connects says a word and is answered by a line of JSON.
const controlPrefix = "@ivshmem-net/"

// controlPatience is how long either side waits for the other.
const controlPatience = 10 * time.Second

// serveControl answers "status" with what status returns, and calls down on
// "down" by the same user or root.
func serveControl(name string, status func() any, down func()) (net.Listener, error) {
	l, err := net.Listen("unix", controlPrefix+name)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w: another `ivshctl net up` has it", name, err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go answerControl(conn.(*net.UnixConn), status, down)
		}
	}()
	return l, nil
}

func answerControl(conn *net.UnixConn, status func() any, down func()) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(controlPatience))
	word := make([]byte, 16)
	n, err := conn.Read(word)
	if err != nil {
		return
	}
	var answer any
	switch strings.TrimSpace(string(word[:n])) {
	case "status":
		answer = status()
	case "down":
		cred, err := fdpass.PeerCredentials(conn)
		if err != nil || cred.Uid != 0 && cred.Uid != uint32(os.Geteuid()) {
			answer = map[string]string{"refused": "not your interface"}
			break
		}
		down()
		// The end of the process is the answer.
		conn.SetDeadline(time.Time{})
		io.Copy(io.Discard, conn)
		return
	}
	json.NewEncoder(conn).Encode(answer)
}

// askControl asks the `net up` of an interface. "down" returns when it has
// ended.
func askControl(name, word string) (json.RawMessage, error) {
	conn, err := net.Dial("unix", controlPrefix+name)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: interface %s: expected one that `ivshctl net up` runs in this network name space: `ivshctl net status` lists them", ivshmem.ErrNotFound, name)
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(controlPatience))
	if _, err := io.WriteString(conn, word); err != nil {
		return nil, err
	}
	b, err := bufio.NewReader(conn).ReadBytes('\n')
	if word == "down" {
		switch {
		case len(b) > 0:
			return nil, fmt.Errorf("interface %s: it was brought up by another user: run as root", name)
		case err == io.EOF || errors.Is(err, unix.ECONNRESET):
			return nil, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	return b, nil
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
