package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// Columns of numbers in what the tests print, behind check, model and size.
const (
	modelsTo = iota
	modelsFrom
	modelsCompletions
	modelsResets
	modelsDoorbells
	modelsItsDoorbells
	modelsWaits
	modelsSleeps
	modelsItsWaits
	modelsStalls
	modelsFaults
	modelsColumns
)

// modelsRow is what one test counted, or several of one name.
type modelsRow struct {
	check, model string
	output       uint64
	counts       [modelsColumns]uint64
}

// ethernetModels has virtual Ethernet talk to models of the drivers of Linux and
// Zephyr: the tests of package vnet, for longer.
func ethernetModels(ctx context.Context, r *Report) error {
	duration, frames, common, events, random, tests := r.Duration, 2000, 50_000, 2, 30, "^TestModel"
	if !r.Quick {
		frames = int(max(2000, min(50_000, 50_000*r.Duration/(10*time.Minute))))
		common = int(max(50_000, min(10_000_000, 10_000_000*r.Duration/(10*time.Minute))))
		random = int(max(30, min(1000, 1000*r.Duration/(10*time.Minute))))
		if r.Duration >= 10*time.Minute {
			events = 4
		}
	}
	if r.Sabotage {
		tests = "^TestModelsTransfer$" // all of them would fail
	}
	r.Config["frames_each_way"], r.Config["frames_each_way_common_sizes"] = frames, common
	r.Config["longest_of_all_sequences"], r.Config["random_sequences"] = events, random

	// All tests that last for the duration do so at the same time.
	out, err := packageTests(ctx, "vnet", fmt.Sprintf("IVSHMEM_VNET_MODELS=%v %d %d %d %d %d %v", duration, frames, common, events, random, r.Seed, r.Sabotage),
		"-test.run", tests, "-test.parallel", "16")
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		return err
	}
	rows, rest, parsed := modelsRows(out)
	if parsed != nil {
		return parsed
	}
	// The tests of one check end in any order.
	order := map[string]int{}
	for i, row := range rows {
		if _, known := order[row.check]; !known {
			order[row.check] = i
		}
	}
	slices.SortFunc(rows, func(a, b *modelsRow) int {
		return cmp.Or(order[a.check]-order[b.check], strings.Compare(a.model, b.model), cmp.Compare(a.output, b.output))
	})
	if err != nil {
		r.Failures = append(r.Failures, fmt.Sprintf("the tests: %v\n%s", err, rest))
	}

	table := Table{
		Title: "Virtual Ethernet against models of other drivers. To and from are frames to the model and from it; " +
			"stalls are those of the reference that it sits out until the next frame, faults those that only a restart mends",
		Head: []string{"check", "model", "L", "to", "from", "completions", "resets", "doorbells", "its doorbells",
			"waits for room", "sleeps", "its waits for room", "its stalls", "its faults"},
	}
	sums := map[string]*[modelsColumns]uint64{}
	for _, row := range rows {
		line := []string{row.check, row.model, fmt.Sprintf("%#x", row.output)}
		sum := sums[row.check]
		if sum == nil {
			sum = new([modelsColumns]uint64)
			sums[row.check] = sum
		}
		for i, n := range row.counts {
			line = append(line, fmt.Sprint(n))
			sum[i] += n
		}
		table.Rows = append(table.Rows, line)
	}
	r.Tables = append(r.Tables, table)
	if len(r.Failures) > 0 {
		return nil
	}

	least := func(check string, column int) (n uint64) {
		n = 1<<64 - 1
		for _, row := range rows {
			if row.check == check && (row.output == 0x7f000 || row.output == 0x100000) && !strings.Contains(row.model, ", ") {
				n = min(n, row.counts[column])
			}
		}
		return n
	}
	r.atLeast("transfers, frames to each model, common sizes", float64(least("transfer", modelsTo)), float64(common))
	r.atLeast("transfers, frames from each model, common sizes", float64(least("transfer", modelsFrom)), float64(common))
	for _, check := range []string{"transfer", "every MTU", "service", "soak", "soak, to the model", "soak, from the model"} {
		if sums[check] == nil {
			return fmt.Errorf("no row for %q", check)
		}
		r.atMost(check+", resets", float64(sums[check][modelsResets]), 0)
	}
	completions, sleeps := 10_000.0, 100.0
	if r.Duration >= 10*time.Minute {
		completions, sleeps = 5e6, 1e5
	}
	soak := sums["soak"]
	for i, n := range sums["soak, to the model"] {
		soak[i] += n + sums["soak, from the model"][i]
	}
	r.atLeast("soak, completions", float64(soak[modelsCompletions]), completions)
	r.atLeast("soak, waits for room", float64(soak[modelsWaits]), sleeps)
	r.atLeast("soak, waits for room of the models", float64(soak[modelsItsWaits]), sleeps)
	r.atLeast("soak, sleeps", float64(soak[modelsSleeps]), sleeps)
	for _, check := range []string{"all sequences", "events in traffic", "service, events"} {
		if sums[check] == nil {
			return fmt.Errorf("no row for %q", check)
		}
		r.atLeast(check+", resets", float64(sums[check][modelsResets]), 20)
	}
	return nil
}

// modelsRows takes the rows out of what the tests print. Those of the same name
// are one.
func modelsRows(out []byte) (rows []*modelsRow, rest string, err error) {
	var others strings.Builder
	known := map[string]*modelsRow{}
	for line := range bytes.Lines(out) {
		text, found := bytes.CutPrefix(line, []byte("row "))
		if !found {
			if len(bytes.TrimSpace(line)) > 0 {
				others.Write(line)
			}
			continue
		}
		row := new(modelsRow)
		fields := []any{&row.check, &row.model, &row.output}
		for i := range row.counts {
			fields = append(fields, &row.counts[i])
		}
		if err := json.Unmarshal(text, &fields); err != nil || len(fields) != 3+modelsColumns {
			return nil, "", fmt.Errorf("expected a row of a check, a model, a size and %d counts, found %s", modelsColumns, text)
		}
		name := fmt.Sprint(row.check, "/", row.model, "/", row.output)
		if known[name] == nil {
			known[name] = row
			rows = append(rows, row)
			continue
		}
		for i, n := range row.counts {
			known[name].counts[i] += n
		}
	}
	return rows, others.String(), nil
}
