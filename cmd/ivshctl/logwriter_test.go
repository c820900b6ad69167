package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem"
)

// TestLogWriter writes to a log that nobody reads, and then reads it.
func TestLogWriter(t *testing.T) {
	r, w := io.Pipe() // has no room at all
	l := newLogWriter(w)
	const n = 10000
	for i := range n {
		fmt.Fprintf(l, "record %d\n", i)
	}
	lines := bufio.NewScanner(r)
	seen, lost, last := 0, 0, -1
	for seen+lost < n {
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		var more, record int
		switch {
		case scan(lines.Text(), "%d log records were lost", &more):
			lost += more
		case scan(lines.Text(), "record %d", &record) && record > last:
			seen, last = seen+1, record
		default:
			t.Fatalf("%q after record %d", lines.Text(), last)
		}
	}
	if seen+lost != n || lost == 0 {
		t.Errorf("%d records seen, %d told to be lost, of %d", seen, lost, n)
	}
	l.Close()
}

func scan(line, format string, n *int) bool {
	_, err := fmt.Sscanf(line, format, n)
	return err == nil
}

// stuck is a standard error that nobody reads.
type stuck struct{ release chan struct{} }

func (s stuck) Write(p []byte) (int, error) {
	<-s.release
	return len(p), nil
}

// TestServeUnreadLog serves while nobody reads the log.
func TestServeUnreadLog(t *testing.T) {
	dir, err := os.MkdirTemp("", "ivshctl")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	qemu, others := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	ctx, cancel := context.WithCancel(t.Context())
	log := stuck{make(chan struct{})}
	defer close(log.release)
	ready, out := io.Pipe()
	p := &program{out: out, err: log}
	code := make(chan int, 1)
	go func() {
		code <- p.run(ctx, []string{"ivshctl", "serve", "--socket", qemu, "--ivshmem2-socket", others})
	}()
	for lines := bufio.NewScanner(ready); lines.Scan() && !strings.HasPrefix(lines.Text(), "ready"); {
	}
	for range 1000 {
		for _, path := range []string{qemu, others} {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
	}
	d, err := ivshmem.Open(qemu)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	cancel()
	if c := <-code; c != 0 {
		t.Errorf("exit code %d", c)
	}
}
