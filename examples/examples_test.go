// Package examples has small programs over the toolkit, and runs them.
package examples

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
)

var names = []string{"http", "rpc", "pubsub", "sensor"}

// build builds the examples, and returns where they are.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", dir+"/", "./...").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

func TestShort(t *testing.T) {
	for _, n := range names {
		text, err := os.ReadFile(filepath.Join(n, "main.go"))
		if err != nil {
			t.Fatal(err)
		}
		if lines := strings.Count(string(text), "\n"); lines >= 100 {
			t.Errorf("%s has %d lines, want less than 100", n, lines)
		}
	}
}

// program is an example that runs.
type program struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
}

func start(t *testing.T, name string, args ...string) *program {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &program{t, in, bufio.NewReader(out)}
}

func (p *program) expect(want string) {
	p.t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil || !strings.Contains(line, want) {
		p.t.Fatalf("%q, %v, want %q", line, err, want)
	}
}

func TestExamples(t *testing.T) {
	dir := build(t)
	c := link.Config{Peers: 3, Vectors: 2, ReadWrite: 4096, Output: 256 << 10}
	run := func(name string, f func(t *testing.T, start func(args ...string) *program)) {
		t.Run(name, func(t *testing.T) {
			device := ivshmemtest.Serve(t, c)
			f(t, func(args ...string) *program {
				return start(t, filepath.Join(dir, name), append([]string{device}, args...)...)
			})
		})
	}
	run("http", func(t *testing.T, start func(...string) *program) {
		start("serve").expect("ready")
		for range 3 {
			start("get", "http://0/hello").expect("from peer 0")
		}
	})
	run("rpc", func(t *testing.T, start func(...string) *program) {
		start("serve").expect("ready")
		start("add", "20", "20", "2").expect("42")
	})
	run("pubsub", func(t *testing.T, start func(...string) *program) {
		publisher := start("publish")
		publisher.expect("ready")
		var subscribers []*program
		for range 2 {
			s := start("subscribe")
			publisher.expect("subscriber")
			subscribers = append(subscribers, s)
		}
		for i := range 100 {
			fmt.Fprintf(publisher.in, "news %d.\n", i)
		}
		for _, s := range subscribers {
			for i := range 100 {
				s.expect(fmt.Sprintf("news %d.", i))
			}
		}
	})
	run("sensor", func(t *testing.T, start func(...string) *program) {
		viewer := start("show")
		viewer.expect("ready")
		sensor := start("measure")
		for i := range 10 {
			fmt.Fprintln(sensor.in, 1000+i)
			viewer.expect(fmt.Sprintf("reading %d is %d", i+1, 1000+i))
		}
	})
}
