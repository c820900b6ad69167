package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// patience bounds each single wait.
const patience = 30 * time.Second

// buildGuestProgram builds the program that campaigns run in guests.
func buildGuestProgram(ctx context.Context, dir string) (string, error) {
	out := filepath.Join(dir, "guestprog")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/ivshmem-go/ivshmem/test/vm/guestprog")
	cmd.Dir = os.Getenv("IVSHMEM_SOURCE") + "/test/vm"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build guestprog: %w\n%s", err, text)
	}
	return out, nil
}

// background is a command in a guest whose output is read by lines.
type background struct {
	*vm.Process
	lines  chan string
	rest   string
	stderr bytes.Buffer
}

func start(g *vm.Guest, argv ...string) (*background, error) {
	b := &background{lines: make(chan string, 1<<16)}
	var err error
	b.Process, err = g.Exec(vm.Command{Argv: argv, Stdout: b, Stderr: &b.stderr})
	return b, err
}

// Write implements io.Writer for the command's output.
func (b *background) Write(p []byte) (int, error) {
	b.rest += string(p)
	for {
		line, rest, ok := strings.Cut(b.rest, "\n")
		if !ok {
			return len(p), nil
		}
		b.rest = rest
		b.lines <- line
	}
}

// next waits for a line of output.
func (b *background) next(ctx context.Context) (string, error) {
	select {
	case l := <-b.lines:
		return l, nil
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(patience):
		return "", fmt.Errorf("no output in %v", patience)
	}
}

// result waits for the end of the command and decodes what it printed.
func (b *background) result(ctx context.Context, v any) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	st, err := b.Wait(ctx)
	if err != nil {
		return err
	}
	if st.ExitCode() != 0 {
		return fmt.Errorf("in the guest: %v: %s", st, strings.TrimSpace(b.stderr.String()))
	}
	line, err := b.next(ctx)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(line), v)
}
