package vm_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// script starts scripts/guest with a folder of its own for temporary files.
func script(t *testing.T, args ...string) (*exec.Cmd, string) {
	tmp := t.TempDir()
	cmd := exec.Command("../../scripts/guest", args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	return cmd, tmp
}

func TestScript(t *testing.T) {
	t.Run("one guest", func(t *testing.T) {
		cmd, _ := script(t, "--", "sh", "-c", `printf "$GUEST/$GUESTS"; cat /sys/bus/pci/devices/*/vendor | grep -c 0x110a >&2; exit 3`)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		var ee *exec.ExitError
		if !errors.As(err, &ee) || ee.ExitCode() != 3 {
			t.Errorf("ended with %v, want exit status 3", err)
		}
		if stdout.String() != "0/1" {
			t.Errorf("stdout %q, want only what the command writes", stdout.String())
		}
		if stderr.String() != "1\n" {
			t.Errorf("stderr %q, want the number of ivshmem devices, 1", stderr.String())
		}
	})
	t.Run("two guests", func(t *testing.T) {
		cmd, _ := script(t, "-n", "2", "--driver", "vfio-pci", "--", "sh", "-c",
			`ivshctl info --json | grep '"id"'; ls /dev/vfio | grep -v vfio`)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		slices.Sort(lines)
		var want []string
		for i := range 2 { // the guest's number is its peer ID
			want = append(want, fmt.Sprintf(`guest %d:   "id": %d,`, i, i), fmt.Sprintf("guest %d: 1", i))
		}
		slices.Sort(want)
		if !slices.Equal(lines, want) {
			t.Errorf("output %q, want %q", lines, want)
		}
	})
	t.Run("usage", func(t *testing.T) {
		cmd, _ := script(t, "-n", "none")
		var ee *exec.ExitError
		if out, err := cmd.CombinedOutput(); !errors.As(err, &ee) || ee.ExitCode() != 2 || !strings.Contains(string(out), "--help") {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// TestInterrupt shows that nothing is left of a script that is interrupted,
// whatever the signal and whatever it is doing.
func TestInterrupt(t *testing.T) {
	for _, c := range []struct {
		name   string
		signal syscall.Signal
		booted bool
		code   int
	}{
		{"SIGINT while a command runs", syscall.SIGINT, true, 130},
		{"SIGTERM while the guest boots", syscall.SIGTERM, false, 143},
		{"SIGKILL while a command runs", syscall.SIGKILL, true, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd, tmp := script(t, "--", "sh", "-c", "echo running; sleep 1000")
			// Not a buffer: Wait would wait for all who have it open.
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			cmd.Stdout, cmd.Stderr = w, os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			w.Close()
			if c.booted {
				if line, err := bufio.NewReader(r).ReadString('\n'); line != "running\n" {
					t.Fatalf("%q, %v", line, err)
				}
			}
			left := waitChildren(t, cmd.Process.Pid)
			if err := cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != c.code {
				t.Errorf("exit status %d, want %d", code, c.code)
			}
			for name, fd := range left {
				// Readable when the process has ended; the test's
				// own time limit ends a wait in vain.
				waitReadable(t, fd)
				t.Log(name, "has ended")
			}
			// The outputs are closed when the last process is gone
			// that could have inherited them.
			if _, err := io.Copy(io.Discard, r); err != nil {
				t.Error(err)
			}
			if c.signal == syscall.SIGKILL {
				return // nobody is there to clean up
			}
			if files, _ := filepath.Glob(filepath.Join(tmp, "*")); len(files) > 0 {
				t.Errorf("left behind: %q", files)
			}
		})
	}
}

// waitChildren waits until a process has started the service and a QEMU, and
// returns descriptors of both.
func waitChildren(t *testing.T, pid int) map[string]int {
	for t.Context().Err() == nil {
		pids := map[string]int{}
		stats, _ := filepath.Glob("/proc/[0-9]*/stat")
		for _, file := range stats {
			text, err := os.ReadFile(file)
			if err != nil {
				continue
			}
			// pid (name) state parent ...
			rest := string(text[bytes.LastIndexByte(text, ')')+1:])
			if f := strings.Fields(rest); f[1] != strconv.Itoa(pid) {
				continue
			}
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			command, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
			name, _, _ := strings.Cut(string(command), "\x00")
			switch {
			case bytes.Contains(command, []byte("vfio-user-pci")):
				name = "qemu"
			case bytes.Contains(command, []byte("\x00serve\x00")):
				name = "serve"
			default:
				continue
			}
			pids[name] = child
		}
		if len(pids) < 2 {
			time.Sleep(10 * time.Millisecond) // between two looks
			continue
		}
		for name, child := range pids {
			fd, err := unix.PidfdOpen(child, 0)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			t.Cleanup(func() { unix.Close(fd) })
			pids[name] = fd
		}
		return pids
	}
	t.Fatal("no QEMU and no service were started")
	return nil
}

func waitReadable(t *testing.T, fd int) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(p, -1)
		if err == nil {
			return
		}
		if err != unix.EINTR {
			t.Fatal(err)
		}
	}
}
