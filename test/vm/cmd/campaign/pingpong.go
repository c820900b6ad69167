package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

type roundTrips struct {
	Mode     string  `json:"mode"`
	Messages float64 `json:"messages"`
	Errors   float64 `json:"errors"`
	RTT      *struct {
		P50 float64 `json:"p50"`
		P99 float64 `json:"p99"`
	} `json:"rtt_ns"`
}

// pingPong runs the embedded default and the floor in turn, and compares them
// pair by pair, so that what the machine does meanwhile hits both.
func pingPong(ctx context.Context, r *Report) error {
	floor, ours, done, err := buildBench(ctx)
	if err != nil {
		return err
	}
	defer done()
	const pollCount, interruptCount = 200000, 10000
	kinds := []struct {
		name       string
		floor, our []string
		target     float64
	}{
		{"poll", []string{"poll", fmt.Sprint(pollCount), "1000", "0", "1"}, []string{"--mode", "poll", "--count", fmt.Sprint(pollCount)}, 1.25},
		{"interrupt", []string{"eventfd", fmt.Sprint(interruptCount), "1000", "0", "1"}, []string{"--mode", "interrupt", "--count", fmt.Sprint(interruptCount)}, 1.5},
	}
	r.Config["counts"] = map[string]int{"poll": pollCount, "interrupt": interruptCount}
	var messages, errs float64
	rounds := 0
	for begin := time.Now(); rounds < 3 || time.Since(begin) < r.Duration; rounds++ {
		for _, k := range kinds {
			var low roundTrips
			if err := runJSON(ctx, 2*patience, &low, floor, k.floor...); err != nil {
				return err
			}
			args := append([]string{"--json", "--cpus", "0,1"}, k.our...)
			var own roundTrips
			limit := 2 * patience
			if r.Sabotage {
				// It ends in the middle: messages without an answer.
				args, limit = append(args, "--count", "1000000000"), 3*time.Second
			}
			if err := runJSON(ctx, limit, &own, ours, args...); err != nil {
				return err
			}
			messages += own.Messages
			errs += own.Errors
			if own.RTT == nil || low.RTT == nil {
				return fmt.Errorf("%s: no round trips in the result", k.name)
			}
			r.sample(k.name+"_floor_p50_ns", low.RTT.P50)
			r.sample(k.name+"_p50_ns", own.RTT.P50)
			r.sample(k.name+"_ratio", own.RTT.P50/low.RTT.P50)
		}
	}
	r.atLeast("rounds", float64(rounds), 3)
	r.atLeast("messages", messages, float64(rounds)*(pollCount+interruptCount))
	r.atMost("errors", errs, 0)
	for _, k := range kinds {
		for _, s := range []string{"floor_p50_ns", "p50_ns"} {
			r.info(k.name+" "+s+", median", median(r.Samples[k.name+"_"+s]))
		}
		ratios := r.Samples[k.name+"_ratio"]
		r.info(k.name+" ratio, lowest", slices.Min(ratios))
		r.info(k.name+" ratio, highest", slices.Max(ratios))
		r.info(k.name+" ratio, median", median(ratios))
		r.info(k.name+" ratio, target", k.target)
	}
	return nil
}

// buildBench builds the floor, and ivsh-pingpong, for machines with a CPU for
// each of two processes. Done removes the floor.
func buildBench(ctx context.Context) (floor, ours string, done func(), err error) {
	if runtime.NumCPU() < 2 {
		return "", "", nil, fmt.Errorf("two CPUs are needed, found %d", runtime.NumCPU())
	}
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err != nil {
		return "", "", nil, err
	}
	done = func() { os.RemoveAll(dir) }
	floor = filepath.Join(dir, "floor")
	source := filepath.Join(os.Getenv("IVSHMEM_SOURCE"), "test/floor/floor.c")
	if text, cerr := exec.CommandContext(ctx, "cc", "-O2", "-Wall", "-Werror", "-o", floor, source).CombinedOutput(); cerr != nil {
		err = fmt.Errorf("compile the floor: %w\n%s", cerr, text)
	} else {
		ours, err = vm.HostBinary(ctx, "ivsh-pingpong")
	}
	if err != nil {
		done()
		return "", "", nil, err
	}
	return floor, ours, done, nil
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

// runJSON runs a program that prints one JSON object within a time limit.
func runJSON(ctx context.Context, limit time.Duration, v any, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s %q: %w: %s%s", filepath.Base(name), args, err, out, stderr.String())
	}
	return json.Unmarshal(out, v)
}
