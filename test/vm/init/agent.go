package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm/internal/wire"
)

// agent serves the host until the guest ends.
func agent(bootError string) {
	err := serve(bootError)
	fmt.Println("init: agent:", err)
	os.Exit(1)
}

func serve(bootError string) error {
	b, err := readBoot()
	if err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	if _, err := port.Write(b.GuestToken); err != nil {
		return err
	}
	r := bufio.NewReaderSize(port, 64<<10)
	if err := wire.SkipPast(r, b.HostToken); err != nil {
		return err
	}
	s := &session{conn: wire.NewConn(r, port), env: b.Env, commands: map[uint32]*command{}}
	if err := s.conn.SendJSON(wire.Ready, 0, wire.Status{Error: bootError}); err != nil {
		return err
	}
	for {
		f, err := s.conn.Receive()
		if err != nil {
			return err
		}
		if err := s.handle(f); err != nil {
			return err
		}
	}
}

// portPatience is how long the harness's port may take to appear.
const portPatience = 30 * time.Second

// openPort opens the virtio-serial port of the harness, in blocking mode. The
// driver hears of its ports and their names some time after it was loaded.
func openPort() (*os.File, error) {
	for end := time.Now().Add(portPatience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			name, _ := os.ReadFile(n)
			if strings.TrimSpace(string(name)) != wire.Port {
				continue
			}
			path := "/dev/" + filepath.Base(filepath.Dir(n))
			fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("open %s: %w", path, err)
			}
			return os.NewFile(uintptr(fd), path), nil
		}
	}
	return nil, fmt.Errorf("no virtio-serial port named %q", wire.Port)
}

type session struct {
	conn *wire.Conn
	env  []string

	mu       sync.Mutex
	commands map[uint32]*command
}

// command is one running process. The channels hold what the window of one
// frame per stream allows, so the receiving loop never blocks on them.
type command struct {
	pid   int
	stdin chan []byte
	acks  map[wire.Type]chan struct{}
}

func (s *session) handle(f wire.Frame) error {
	if f.Type == wire.Start {
		var c wire.Command
		if err := json.Unmarshal(f.Payload, &c); err != nil {
			return err
		}
		s.start(f.ID, c)
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.commands[f.ID]
	if c == nil {
		return nil // it has just ended
	}
	switch {
	case f.Type == wire.Stdin && c.stdin != nil:
		c.stdin <- f.Payload
	case f.Type == wire.Signal && len(f.Payload) == 1:
		// To the group: what the command has started ends with it.
		_ = syscall.Kill(-c.pid, syscall.Signal(f.Payload[0]))
	case f.Type == wire.Ack && len(f.Payload) == 1:
		c.acks[wire.Type(f.Payload[0])] <- struct{}{}
	default:
		return fmt.Errorf("unexpected frame type %d", f.Type)
	}
	return nil
}

func (s *session) start(id uint32, w wire.Command) {
	fail := func(err error) {
		_ = s.conn.SendJSON(wire.Exit, id, wire.Status{Code: 127, Error: err.Error()})
	}
	if len(w.Argv) == 0 {
		fail(errors.New("empty command"))
		return
	}
	c := &command{acks: map[wire.Type]chan struct{}{wire.Stdout: make(chan struct{}, 1), wire.Stderr: make(chan struct{}, 1)}}
	cmd := exec.Command(w.Argv[0], w.Argv[1:]...)
	cmd.Env = append(append(os.Environ(), s.env...), w.Env...)
	cmd.Dir = w.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/root"
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stdout = &stream{s.conn, id, wire.Stdout, c.acks[wire.Stdout]}
	cmd.Stderr = &stream{s.conn, id, wire.Stderr, c.acks[wire.Stderr]}
	var stdin io.WriteCloser
	if w.Stdin {
		var err error
		if stdin, err = cmd.StdinPipe(); err != nil {
			fail(err)
			return
		}
		c.stdin = make(chan []byte, 1)
	}
	if err := cmd.Start(); err != nil {
		fail(err)
		return
	}
	c.pid = cmd.Process.Pid
	s.mu.Lock()
	s.commands[id] = c
	s.mu.Unlock()
	if w.Stdin {
		go s.feed(id, c.stdin, stdin)
	}
	go func() {
		// Like ssh: the command ends when its process has ended and
		// nobody holds its outputs open any more, so nothing is lost.
		err := cmd.Wait()
		s.mu.Lock()
		delete(s.commands, id)
		if c.stdin != nil {
			close(c.stdin)
		}
		s.mu.Unlock()
		var st wire.Status
		ws, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
		switch {
		case ws.Signaled():
			st.Signal = int(ws.Signal())
		case ws.Exited():
			st.Code = ws.ExitStatus()
		default:
			st.Error = fmt.Sprint(err)
		}
		_ = s.conn.SendJSON(wire.Exit, id, st)
	}()
}

// feed writes what the host sends to a process's standard input. A process
// that has closed its input, or has ended, just loses the rest.
func (s *session) feed(id uint32, from <-chan []byte, to io.WriteCloser) {
	for data := range from {
		if len(data) == 0 {
			to.Close()
			continue
		}
		_, _ = to.Write(data)
		_ = s.conn.Send(wire.Ack, id, []byte{byte(wire.Stdin)})
	}
	to.Close()
}

// stream sends one output of a process to the host.
type stream struct {
	conn *wire.Conn
	id   uint32
	kind wire.Type
	ack  <-chan struct{}
}

func (w *stream) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		n := min(len(p)-done, wire.MaxPayload)
		if err := w.conn.Send(w.kind, w.id, p[done:done+n]); err != nil {
			return done, err
		}
		<-w.ack
		done += n
	}
	return len(p), nil
}
