package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm/internal/wire"
	"golang.org/x/sys/unix"
)

// Errors of guests, for errors.Is.
var (
	// ErrGone means that the guest's QEMU has ended.
	ErrGone = errors.New("guest is gone")
	// ErrReset means that the guest was reset while a command ran in it.
	ErrReset = errors.New("guest was reset")
)

// BootTimeout bounds the time from the start of QEMU to the answer of init.
// Guests usually need 4 to 8 seconds under emulation.
const BootTimeout = 3 * time.Minute

// Guest is a running guest. Its methods are safe for concurrent use.
type Guest struct {
	name    string
	kvm     bool
	boot    wire.Boot
	child   *Child
	console *console
	qmp     *Monitor
	agent   net.Conn

	sessions chan bootResult // one per boot

	mu      sync.Mutex
	session *session // nil while the guest boots
}

type bootResult struct {
	session *session
	err     error
}

// Start boots a guest and returns when commands can be run in it. ctx bounds
// the start, not the guest's life. What is missing in the cache is fetched,
// which takes some seconds once (package fetch).
func Start(ctx context.Context, c Config) (*Guest, error) {
	img, err := c.prepare(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.name(), err)
	}
	defer img.initrd.Close()
	return c.start(ctx, img, kvmWorks(ctx, img.cacheDir))
}

// StartAll boots several guests at the same time. Their devices connect to
// their services in the order of configs, so that guests of one link get
// ascending peer IDs. If one cannot start, none runs.
func StartAll(ctx context.Context, configs []Config) ([]*Guest, error) {
	guests := make([]*Guest, len(configs))
	errs := make([]error, len(configs))
	var all sync.WaitGroup
	for i, c := range configs {
		connected := make(chan struct{})
		c.connected = sync.OnceFunc(func() { close(connected) })
		all.Go(func() {
			defer c.connected() // in case it fails before
			guests[i], errs[i] = Start(ctx, c)
		})
		<-connected
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		for _, g := range guests {
			if g != nil {
				g.Close()
			}
		}
		return nil, err
	}
	return guests, nil
}

func (c *Config) start(ctx context.Context, img *image, kvm bool) (*Guest, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, BootTimeout, fmt.Errorf("no answer from init within %v", BootTimeout))
	defer cancel()
	args, err := c.arguments(img, kvm)
	if err != nil {
		return nil, err
	}
	agent, agentQEMU, err := socketPair()
	if err != nil {
		return nil, err
	}
	monitor, monitorQEMU, err := socketPair()
	if err != nil {
		agent.Close()
		agentQEMU.Close()
		return nil, err
	}

	g := &Guest{name: c.name(), kvm: kvm, boot: img.boot, console: &console{}, agent: agent, sessions: make(chan bootResult, 1)}
	cmd := exec.Command(img.qemu[0], args...)
	cmd.Stdout, cmd.Stderr = g.console, g.console
	cmd.ExtraFiles = []*os.File{agentQEMU, monitorQEMU, img.initrd} // agentFD, monitorFD, initrdFD
	g.child, err = StartChild(cmd)
	// Only QEMU keeps its ends open, so that its end is seen at ours.
	agentQEMU.Close()
	monitorQEMU.Close()
	if err != nil {
		agent.Close()
		monitor.Close()
		return nil, fmt.Errorf("%s: start QEMU: %w", g.name, err)
	}
	g.qmp = newMonitor(monitor)
	go g.serve()
	// QEMU answers when it has set up the machine and its devices.
	err = g.qmp.negotiate(ctx)
	if err == nil {
		if c.connected != nil {
			c.connected()
		}
		err = g.waitBoot(ctx)
	}
	if err != nil {
		g.Close()
		return nil, g.explain(err)
	}
	return g, nil
}

// socketPair returns one end as a connection and the other for a child.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn, theirs, nil
}

// explain adds the guest's name, and the end of its console if it is gone.
func (g *Guest) explain(err error) error {
	err = fmt.Errorf("%s: %w", g.name, err)
	if tail := g.console.tail(2000); tail != "" {
		err = fmt.Errorf("%w\nthe console's last lines:\n%s", err, tail)
	}
	return err
}

// waitBoot waits for the session of a boot and makes it the current one.
func (g *Guest) waitBoot(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := make(chan struct{})
	go func() {
		// QEMU stops the machine when KVM reports an internal error.
		if _, err := g.qmp.WaitEvent(ctx, "STOP"); err == nil {
			close(stopped)
		}
	}()
	select {
	case <-stopped:
		return errors.New("QEMU has stopped the machine")
	case b := <-g.sessions:
		if b.err != nil {
			return b.err
		}
		g.mu.Lock()
		g.session = b.session
		g.mu.Unlock()
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// serve reads what the guest's agent sends, boot after boot.
func (g *Guest) serve() {
	r := bufio.NewReaderSize(g.agent, 64<<10)
	for {
		s, err := g.handshake(r)
		if err != nil {
			g.sessions <- bootResult{err: err}
		} else {
			g.sessions <- bootResult{session: s}
			err = s.receive()
		}
		reset := errors.Is(err, os.ErrDeadlineExceeded) // Reset's doing
		if reset {
			err = ErrReset
		}
		if s != nil {
			s.fail(err)
		}
		if !reset {
			return
		}
		_ = g.agent.SetDeadline(time.Time{})
	}
}

func (g *Guest) handshake(r *bufio.Reader) (*session, error) {
	if err := wire.SkipPast(r, g.boot.GuestToken); err != nil {
		return nil, gone(err)
	}
	if _, err := g.agent.Write(g.boot.HostToken); err != nil {
		return nil, gone(err)
	}
	conn := wire.NewConn(r, g.agent)
	f, err := conn.Receive()
	if err != nil {
		return nil, gone(err)
	}
	var st wire.Status
	if err := json.Unmarshal(f.Payload, &st); err != nil || f.Type != wire.Ready {
		return nil, fmt.Errorf("unexpected first message of init (type %d): %w", f.Type, err)
	}
	if st.Error != "" {
		return nil, fmt.Errorf("init: %s", st.Error)
	}
	return &session{conn: conn, processes: map[uint32]*Process{}}, nil
}

// gone wraps the error of a lost connection.
func gone(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrGone, err)
}

// Name returns the guest's name.
func (g *Guest) Name() string { return g.name }

// Pid returns the process id of the guest's QEMU.
func (g *Guest) Pid() int { return g.child.Pid() }

// Done is closed when QEMU has ended.
func (g *Guest) Done() <-chan struct{} { return g.child.Done() }

// Monitor returns the connection to QEMU's monitor.
func (g *Guest) Monitor() *Monitor { return g.qmp }

// Accelerated says whether the guest runs under KVM.
func (g *Guest) Accelerated() bool { return g.kvm }

// Console returns the last 256 KiB that the guest's kernel and QEMU itself
// have written.
func (g *Guest) Console() string { return g.console.tail(consoleSize) }

// Reset resets the machine and waits until the guest has booted again.
// Commands that run in it end with ErrReset.
func (g *Guest) Reset(ctx context.Context) error {
	g.mu.Lock()
	g.session = nil
	g.mu.Unlock()
	// Ends the session, whatever is being sent or received; from now on
	// the stream is searched for the token of the next boot.
	if err := g.agent.SetDeadline(time.Unix(1, 0)); err != nil {
		return g.explain(err)
	}
	// QEMU was told to end instead of rebooting, for guests that panic.
	type action struct {
		Reboot string `json:"reboot"`
	}
	for _, step := range []func() error{
		func() error { return g.qmp.Execute(ctx, "set-action", action{"reset"}, nil) },
		func() error { return g.qmp.Execute(ctx, "system_reset", nil, nil) },
		func() error { return g.waitBoot(ctx) },
		func() error { return g.qmp.Execute(ctx, "set-action", action{"shutdown"}, nil) },
	} {
		if err := step(); err != nil {
			return g.explain(fmt.Errorf("reset: %w", err))
		}
	}
	return nil
}

// Kill ends QEMU with SIGKILL, as in a crash of the host's process, and waits
// until it is gone.
func (g *Guest) Kill() { _ = g.child.Kill() }

// Close ends the guest, without shutting it down, and frees what it used. It
// may be called more than once.
func (g *Guest) Close() {
	g.Kill()
	g.agent.Close()
	g.qmp.conn.Close()
}

const consoleSize = 256 << 10

// console keeps the end of what is written to it.
type console struct {
	mu   sync.Mutex
	text []byte
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, p...)
	if len(c.text) > 2*consoleSize {
		c.text = append([]byte(nil), c.text[len(c.text)-consoleSize:]...)
	}
	return len(p), nil
}

func (c *console) tail(n int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.TrimSpace(string(c.text[max(0, len(c.text)-n):]))
}
