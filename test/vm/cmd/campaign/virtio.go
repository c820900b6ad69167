package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// virtioRow is what became of a device on a link.
type virtioRow struct {
	device                            string
	vectors                           int
	removals, others, guests, devices int
	seconds                           float64
}

// virtioProcesses binds and removes a model of Linux's drivers to every type of
// device, and kills both: the test of package virtio, for longer.
func virtioProcesses(ctx context.Context, r *Report) error {
	removals, killed := 2, 6
	if !r.Quick {
		removals = int(max(2, 1000*r.Duration/(10*time.Minute)))
		killed = int(max(6, 200*r.Duration/(10*time.Minute)))
	}
	r.Config["removals"], r.Config["lives_with_kills"] = removals, killed
	tests := "^TestProcesses$"
	if r.Sabotage {
		tests += "/^entropy" // what does not give random bytes then
	}
	out, err := packageTests(ctx, "virtio", fmt.Sprintf("IVSHMEM_VIRTIO_PROCESSES=%d %d %d %v", removals, killed, r.Seed, r.Sabotage), "-test.run", tests)
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		return err
	}
	table := Table{
		Title: "Linux's drivers, as the protocol pages have them, in processes: probed, used, removed; then killed at any step, or their device is",
		Head:  []string{"device", "vectors", "removals", "more, between kills", "drivers killed", "devices killed", "s"},
	}
	var rest strings.Builder
	least, sum := removals, virtioRow{}
	for line := range bytes.Lines(out) {
		text, found := bytes.CutPrefix(line, []byte("row "))
		if !found {
			rest.Write(line)
			continue
		}
		var row virtioRow
		fields := []any{&row.device, &row.vectors, &row.removals, &row.others, &row.guests, &row.devices, &row.seconds}
		if err := json.Unmarshal(text, &fields); err != nil {
			return fmt.Errorf("row %s: %w", text, err)
		}
		table.Rows = append(table.Rows, []string{row.device, fmt.Sprint(row.vectors), fmt.Sprint(row.removals), fmt.Sprint(row.others),
			fmt.Sprint(row.guests), fmt.Sprint(row.devices), fmt.Sprintf("%.0f", row.seconds)})
		least = min(least, row.removals)
		sum.removals, sum.guests, sum.devices = sum.removals+row.removals+row.others, sum.guests+row.guests, sum.devices+row.devices
	}
	r.Tables = append(r.Tables, table)
	if err != nil {
		r.Failures = append(r.Failures, fmt.Sprintf("the tests: %v\n%s", err, rest.String()))
		return nil
	}
	r.atLeast("devices on links", float64(len(table.Rows)), 20)
	r.atLeast("removals of each", float64(least), float64(removals))
	r.info("removals", float64(sum.removals))
	r.atLeast("drivers killed", float64(sum.guests), float64(killed))
	r.atLeast("devices killed", float64(sum.devices), float64(killed))
	return nil
}

// packageTests builds the tests of a package of the toolkit and runs some of them
// with a variable of the environment. That they failed is an [exec.ExitError].
func packageTests(ctx context.Context, pkg, variable string, args ...string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "tests")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", program, "./"+pkg)
	build.Dir = os.Getenv("IVSHMEM_SOURCE")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the tests of %s: %v\n%s", pkg, err, out)
	}
	cmd := exec.CommandContext(ctx, program, append([]string{"-test.timeout", "0"}, args...)...)
	cmd.Dir = filepath.Join(build.Dir, pkg)
	cmd.Env = append(os.Environ(), variable)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return out, err
}
