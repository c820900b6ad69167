package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// patience bounds each single wait.
const patience = 30 * time.Second

// buildGuestProgram builds the program that campaigns run in guests.
func buildGuestProgram(ctx context.Context, dir, arch string) (string, error) {
	out := filepath.Join(dir, "guestprog")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/ivshmem-go/ivshmem/test/vm/guestprog")
	cmd.Dir = os.Getenv("IVSHMEM_SOURCE") + "/test/vm"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build guestprog: %w\n%s", err, text)
	}
	return out, nil
}
