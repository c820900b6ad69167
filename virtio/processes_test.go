package virtio_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
	"github.com/ivshmem-go/ivshmem/peer"
)

// Devices and models of Linux's drivers are processes on a link of the service
// here, and killed.

// part is what a process of a test plays.
type part struct {
	Kind    int // index in kinds
	BackEnd bool
	Socket  string
	Vectors int
	Image   string
	Seed    uint64
	Lives   int  // of the driver
	Deaths  bool // some of them by SIGKILL
	Steps   int  // of such a life, about
	// Sabotage has the device not do what it should, where that shows at once.
	Sabotage bool
}

// partVariable holds a part as JSON.
const partVariable = "IVSHMEM_VIRTIO_PART"

// TestPart is the whole of such a process, and nothing in any other.
func TestPart(t *testing.T) {
	text := os.Getenv(partVariable)
	if text == "" {
		return
	}
	var p part
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	if p.BackEnd {
		var dev *ivshmem.Device
		// Its predecessor may still be there.
		until(t, "the peer ID is free", func() bool {
			var err error
			if dev, err = ivshmem.Open(p.Socket); err != nil && !errors.Is(err, ivshmem.ErrBusy) {
				t.Fatal(err)
			}
			return err == nil
		})
		t.Error(kinds[p.Kind].serve(t.Context(), dev, &p))
		return
	}
	p.drive(t)
}

// drive binds the driver, works and unbinds, again and again. It says what it
// did in lines on file 3, and is answered on it.
func (p *part) drive(t *testing.T) {
	control := os.NewFile(3, "control")
	answers := bufio.NewReader(control)
	kind := &kinds[p.Kind]
	random := rand.New(rand.NewPCG(p.Seed, 0))
	steps := 0
	for life := range p.Lives {
		l := newProcess(t, p.Socket, p.Vectors)
		l.accept = kind.accept
		l.callbacks = func(q int) bool { return q != kind.silent }
		death, victim := -1, random.IntN(3)
		if p.Deaths && victim > 0 {
			death = random.IntN(p.Steps)
		}
		steps = 0
		l.step = func() {
			if steps++; steps != death {
				return
			}
			if victim == 1 {
				unix.Kill(os.Getpid(), unix.SIGKILL)
				select {}
			}
			fmt.Fprintln(control, "kill")
			if _, err := answers.ReadString('\n'); err != nil {
				os.Exit(1) // the test is over
			}
		}
		err := l.again(kind.queues(p.Vectors))
		if err == nil {
			err = kind.work(l, fmt.Appendf(nil, "%x.%d", p.Seed, life))
		}
		killed := victim == 2 && death >= 0 && steps >= death
		l.remove()
		switch {
		case killed && (err == nil || errors.Is(err, errBackEnd) || errors.Is(err, errBroken)):
			continue
		case err != nil:
			t.Fatalf("life %d: %v", life, err)
		case t.Failed():
			return
		}
		// The next one has about as many.
		p.Steps = steps
		fmt.Fprintln(control, "life", steps)
	}
}

// newProcess is a guest's driver in a process.
func newProcess(t *testing.T, socket string, vectors int) *linux {
	var back *peer.Backend
	l := &linux{TB: t, host: host{vectors: vectors, alive: func() bool { return true }}}
	l.bind = func() (hostDevice, []byte) {
		// Its predecessor may still be there.
		until(t, "the peer ID is free", func() (ok bool) {
			var err error
			if back, err = peer.Dial(socket); err != nil && !errors.Is(err, ivshmem.ErrBusy) {
				t.Fatal(err)
			}
			return err == nil
		})
		rw := back.Sections().ReadWrite
		memory, err := rw.ReadOnly().UnsafeBytes(0, rw.Size())
		if err != nil {
			t.Fatal(err)
		}
		return back, memory
	}
	l.ready = func() bool {
		s, err := back.Sections().States.Load(0)
		return err == nil && s == 1
	}
	l.cond = sync.NewCond(&l.mu)
	return l
}

// tally is what became of a device.
type tally struct{ Lives, GuestDeaths, DeviceDeaths int }

// stage is a link with a device, and a driver now and then.
type stage struct {
	*testing.T
	part
	sockets [2]string
	device  *exec.Cmd
	tally   tally
}

func newStage(t *testing.T, kind, vectors int, sabotage bool) *stage {
	s := &stage{T: t, part: part{Kind: kind, Vectors: vectors, Sabotage: sabotage, Steps: 400}}
	l, err := link.New(link.Config{Peers: 2, Vectors: uint16(vectors), Protocol: kinds[kind].protocol, ReadWrite: 0x40000})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 2)
	for i := range s.sockets {
		s.sockets[i] = filepath.Join(dir, fmt.Sprint(i))
		listener, err := pcidev.Listen(s.sockets[i])
		if err != nil {
			t.Fatal(err)
		}
		id := uint32(i)
		go func() {
			served <- (&pcidev.Server{Link: l, Options: pcidev.Options{Pin: &id}}).Serve(ctx, listener)
		}()
	}
	t.Cleanup(func() {
		s.killDevice()
		cancel()
		for range s.sockets {
			if err := <-served; err != nil {
				t.Error(err)
			}
		}
		l.Close()
	})
	s.Image = filepath.Join(dir, "image")
	if err := os.WriteFile(s.Image, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	s.startDevice()
	return s
}

func (s *stage) command(p part) *exec.Cmd {
	text, err := json.Marshal(p)
	if err != nil {
		s.Fatal(err)
	}
	c := exec.Command("/proc/self/exe", "-test.run", "^TestPart$", "-test.timeout", "0")
	// The race detector would make the end of each take a second.
	c.Env = append(os.Environ(), partVariable+"="+string(text), "GORACE=atexit_sleep_ms=0")
	c.Stdout, c.Stderr = os.Stderr, os.Stderr
	// Its end ends the process, too.
	if _, err := c.StdinPipe(); err != nil {
		s.Fatal(err)
	}
	return c
}

func (s *stage) startDevice() {
	p := s.part
	p.BackEnd, p.Socket = true, s.sockets[0]
	s.device = s.command(p)
	if err := s.device.Start(); err != nil {
		s.Fatal(err)
	}
}

func (s *stage) killDevice() {
	s.device.Process.Kill()
	s.device.Wait()
}

// play has drivers come and go until there were so many lives.
func (s *stage) play(lives int, deaths bool, seed uint64) {
	for more := lives; more > 0; seed++ {
		p := s.part
		p.Socket, p.Seed, p.Lives, p.Deaths = s.sockets[1], seed, more, deaths
		n, err := s.guest(p)
		more -= n
		var exit *exec.ExitError
		switch {
		case err == nil:
			if deaths {
				return // lives that were cut short by a kill count as well
			}
		case errors.As(err, &exit) && exit.Sys().(interface{ Signal() unix.Signal }).Signal() == unix.SIGKILL && deaths:
			s.tally.GuestDeaths++
			more--
		default:
			s.Fatalf("%s, %d vectors: %v", kinds[s.Kind].name, s.Vectors, err)
		}
	}
}

// guest runs a process of the driver.
func (s *stage) guest(p part) (lives int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	control, its := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	defer control.Close()
	c := s.command(p)
	c.ExtraFiles = []*os.File{its}
	if err := c.Start(); err != nil {
		return 0, err
	}
	its.Close()
	lines := bufio.NewReader(control)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			break
		}
		if n, _ := fmt.Sscanf(line, "life %d", &s.Steps); n == 1 {
			lives++
			s.tally.Lives++
			continue
		}
		// The driver wants its device killed, and waits.
		s.killDevice()
		s.tally.DeviceDeaths++
		io.WriteString(control, "killed\n")
		s.startDevice()
	}
	return lives, c.Wait()
}

// processesVariable says how long TestProcesses plays: lives without deaths,
// lives with, the seed, and whether to send wrong answers. The campaign sets it.
const processesVariable = "IVSHMEM_VIRTIO_PROCESSES"

// TestProcesses has the drivers of all kinds bound and unbound, and killed at
// any step of theirs, as are the devices.
func TestProcesses(t *testing.T) {
	lives, deaths, seed, sabotage, links := 2, 6, uint64(1), false, []int{2}
	campaign := os.Getenv(processesVariable)
	if campaign != "" {
		if _, err := fmt.Sscan(campaign, &lives, &deaths, &seed, &sabotage); err != nil {
			t.Fatal(err)
		}
		links = []int{1, 2, 3, 16}
	}
	for kind := range kinds {
		for _, vectors := range links {
			t.Run(fmt.Sprintf("%s, %d vectors", kinds[kind].name, vectors), func(t *testing.T) {
				begin := time.Now()
				s := newStage(t, kind, vectors, sabotage)
				seed += uint64(1000*kind + vectors)
				s.play(lives, false, seed)
				clean := s.tally.Lives
				s.play(deaths, true, seed)
				if clean < lives || deaths >= 50 && (s.tally.GuestDeaths < deaths/5 || s.tally.DeviceDeaths < deaths/5) {
					t.Errorf("%+v: too few to show anything", s.tally)
				}
				if campaign != "" {
					row, err := json.Marshal([]any{kinds[kind].name, vectors, clean, s.tally.Lives - clean, s.tally.GuestDeaths, s.tally.DeviceDeaths, time.Since(begin).Seconds()})
					if err != nil {
						t.Error(err)
					}
					fmt.Printf("row %s\n", row)
				}
			})
		}
	}
}
