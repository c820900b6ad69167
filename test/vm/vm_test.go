package vm_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// TestGuest runs everything that one guest can show, because a boot is what
// costs time.
func TestGuest(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho from a file\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	g := vm.New(t, vm.Config{
		Name: "harness", Env: []string{"COLOUR=blue"}, Modules: []string{"dummy"},
		Files: map[string]string{"/opt/script": script},
		QEMU:  []string{"-device", "pcie-root-port,id=hot,chassis=9"},
	})
	t.Logf("booted in %.1f s, KVM %v", time.Since(start).Seconds(), g.Accelerated())

	run := func(t *testing.T, argv ...string) vm.Result {
		t.Helper()
		r, err := g.Run(t.Context(), argv...)
		if err != nil {
			t.Fatalf("%q: %v", argv, err)
		}
		return r
	}

	t.Run("status and outputs", func(t *testing.T) {
		r := run(t, "sh", "-c", "echo $COLOUR $(hostname); echo problem >&2; exit 7")
		if got := string(r.Stdout); got != "blue harness\n" {
			t.Errorf("stdout %q", got)
		}
		if got := string(r.Stderr); got != "problem\n" {
			t.Errorf("stderr %q", got)
		}
		if r.Code != 7 || r.Signal != 0 {
			t.Errorf("ended with %v, want exit status 7", r.Status)
		}
	})
	t.Run("command does not exist", func(t *testing.T) {
		_, err := g.Run(t.Context(), "no-such-command")
		var se *vm.StartError
		if !errors.As(err, &se) || !strings.Contains(err.Error(), "no-such-command") {
			t.Errorf("error %v, want a StartError that names the command", err)
		}
	})
	t.Run("system", func(t *testing.T) {
		if got := string(run(t, "/opt/script").Stdout); got != "from a file\n" {
			t.Errorf("file in the guest says %q", got)
		}
		modules := string(run(t, "lsmod").Stdout)
		for _, m := range []string{"vfio_pci ", "vfio_iommu_type1 ", "uio_pci_generic ", "dummy "} {
			if !strings.Contains(modules, m) {
				t.Errorf("module %s is not loaded", m)
			}
		}
		if r := run(t, "sh", "-c", "ls -d /dev/shm /dev/pts/ptmx /sys/kernel/iommu_groups/0 && ! ps | grep '[d]efunct'"); r.Code != 0 {
			t.Errorf("system is incomplete: %s%s", r.Stdout, r.Stderr)
		}
	})
	t.Run("binary data both ways", func(t *testing.T) {
		data := make([]byte, 4<<20+12345)
		rand.NewChaCha8([32]byte{1}).Read(data)
		var back bytes.Buffer
		start := time.Now()
		p, err := g.Exec(vm.Command{Argv: []string{"cat"}, Stdin: bytes.NewReader(data), Stdout: &back})
		if err != nil {
			t.Fatal(err)
		}
		if st, err := p.Wait(t.Context()); err != nil || st.Code != 0 {
			t.Fatalf("cat: %v, %v", st, err)
		}
		if !bytes.Equal(back.Bytes(), data) {
			t.Errorf("%d bytes came back as %d others", len(data), back.Len())
		}
		t.Logf("%d bytes there and back in %v", len(data), time.Since(start))
	})
	t.Run("commands at once", func(t *testing.T) {
		// Each waits for what the other does, so they must really run
		// at the same time, and one blocked output must not stop the
		// other command.
		run(t, "mkfifo", "/tmp/a", "/tmp/b")
		blocked, release := io.Pipe()
		p, err := g.Exec(vm.Command{Argv: []string{"cat", "/bin/busybox"}, Stdout: release})
		if err != nil {
			t.Fatal(err)
		}
		var both sync.WaitGroup
		for _, line := range []string{"echo x >/tmp/a; cat /tmp/b", "cat /tmp/a; echo x >/tmp/b"} {
			both.Go(func() {
				if r, err := g.Run(t.Context(), "sh", "-c", line); err != nil || string(r.Stdout) != "x\n" {
					t.Errorf("%s: %q, %v", line, r.Stdout, err)
				}
			})
		}
		both.Wait()
		sum := sha256.New()
		go func() {
			<-p.Done()
			release.Close()
		}()
		if _, err := io.Copy(sum, blocked); err != nil {
			t.Fatal(err)
		}
		want, _, _ := strings.Cut(string(run(t, "sha256sum", "/bin/busybox").Stdout), " ")
		if got := hex.EncodeToString(sum.Sum(nil)); got != want {
			t.Errorf("the blocked output has sum %s, want %s", got, want)
		}
	})
	t.Run("signals", func(t *testing.T) {
		for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			out, in := io.Pipe()
			p, err := g.Exec(vm.Command{Argv: []string{"sh", "-c", "echo go; sleep 1000"}, Stdout: in})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			if err := p.Signal(s); err != nil {
				t.Fatal(err)
			}
			if st, err := p.Wait(t.Context()); err != nil || st.Signal != s {
				t.Errorf("after %v: %v, %v", s, st, err)
			}
		}
		if r := run(t, "pidof", "sleep"); r.Code == 0 {
			t.Errorf("children are left: %s", r.Stdout)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		out, in := io.Pipe()
		p, err := g.Exec(vm.Command{Argv: []string{"sh", "-c", "echo go; exec sleep 1000"}, Stdout: in})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		cancel()
		if st, err := p.Wait(ctx); !errors.Is(err, context.Canceled) || st.Signal != syscall.SIGKILL {
			t.Errorf("%v, %v", st, err)
		}
		if r := run(t, "pidof", "sleep"); r.Code == 0 {
			t.Errorf("the command still runs: %s", r.Stdout)
		}
	})
	t.Run("monitor", func(t *testing.T) {
		var v struct{ QEMU struct{ Major, Minor int } }
		if err := g.Monitor().Execute(t.Context(), "query-version", nil, &v); err != nil {
			t.Fatal(err)
		}
		if v.QEMU.Major*100+v.QEMU.Minor < 1001 {
			t.Errorf("QEMU %d.%d, want at least 10.1", v.QEMU.Major, v.QEMU.Minor)
		}
		var me *vm.MonitorError
		if err := g.Monitor().Execute(t.Context(), "device_del", map[string]string{"id": "none"}, nil); !errors.As(err, &me) {
			t.Errorf("error %v, want a MonitorError", err)
		}
	})
	t.Run("reset", func(t *testing.T) {
		run(t, "touch", "/tmp/mark")
		// One command is in the middle of its output, one of its input.
		_, blocked := io.Pipe()
		var ps []*vm.Process
		for _, c := range []vm.Command{
			{Argv: []string{"yes"}, Stdout: io.Discard},
			{Argv: []string{"yes"}, Stdout: blocked},
			{Argv: []string{"cat"}, Stdin: endless{}, Stdout: io.Discard},
		} {
			p, err := g.Exec(c)
			if err != nil {
				t.Fatal(err)
			}
			ps = append(ps, p)
		}
		if err := g.Reset(t.Context()); err != nil {
			t.Fatal(err)
		}
		blocked.Close()
		for _, p := range ps {
			if _, err := p.Wait(t.Context()); !errors.Is(err, vm.ErrReset) && !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("a command ended with %v, want ErrReset", err)
			}
		}
		if r := run(t, "ls", "/tmp/mark"); r.Code == 0 {
			t.Error("the file system has outlived the reset")
		}
	})
	t.Run("kill", func(t *testing.T) {
		p, err := g.Exec(vm.Command{Argv: []string{"sleep", "1000"}})
		if err != nil {
			t.Fatal(err)
		}
		g.Kill()
		if _, err := p.Wait(t.Context()); !errors.Is(err, vm.ErrGone) {
			t.Errorf("a command in the killed guest ended with %v, want ErrGone", err)
		}
		if _, err := g.Run(t.Context(), "true"); !errors.Is(err, vm.ErrGone) {
			t.Errorf("a command after that: %v, want ErrGone", err)
		}
	})
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestBootFailure shows that a guest that cannot boot as asked is an error
// that says why.
func TestBootFailure(t *testing.T) {
	for name, c := range map[string]struct {
		config vm.Config
		want   string
	}{
		"no service": {vm.Config{Devices: []vm.Device{{Socket: "/nonexistent/socket"}}}, "Failed to connect"},
		"panic":      {vm.Config{Append: []string{"rdinit=/nonexistent"}}, "panic"},
		"no module":  {vm.Config{Modules: []string{"nosuchmodule"}}, `no module "nosuchmodule"`},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := vm.Start(t.Context(), c.config)
			if err == nil {
				g.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}
