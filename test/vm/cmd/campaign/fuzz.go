package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
)

// fuzz runs every fuzzer of the module for the duration, one after the other.
func fuzz(ctx context.Context, r *Report) error {
	root := os.Getenv("IVSHMEM_SOURCE")
	tags := "-tags="
	if r.Sabotage {
		tags = "-tags=sabotage" // brings a fuzzer that has to find something
	}
	list := exec.CommandContext(ctx, "go", "test", tags, "-list", "^Fuzz", "./...")
	list.Dir = root
	out, err := list.Output()
	if err != nil {
		return fmt.Errorf("list fuzzers: %w\n%s", err, out)
	}
	var targets, names []string
	for line := range strings.Lines(string(out)) {
		switch f := strings.Fields(line); {
		case len(f) == 1 && strings.HasPrefix(f[0], "Fuzz"):
			names = append(names, f[0])
		case len(f) >= 2 && f[0] == "ok":
			for _, n := range names {
				targets = append(targets, f[1]+" "+n)
			}
			names = nil
		}
	}
	r.Config["targets"] = targets
	r.atLeast("fuzzers", float64(len(targets)), 3)
	// A number of runs, where it is seconds: on a busy machine they may be over
	// before the corpus was read.
	long := r.Duration.String()
	if r.Quick {
		long = "100x"
	}
	// As many at a time as there are CPUs, each with one worker.
	type result struct {
		runs float64
		err  error
	}
	results := make([]result, len(targets))
	free := make(chan struct{}, runtime.NumCPU())
	var all sync.WaitGroup
	for i, t := range targets {
		free <- struct{}{}
		r.say("fuzzing %s", t)
		all.Go(func() {
			defer func() { <-free }()
			pkg, name, _ := strings.Cut(t, " ")
			results[i].runs, results[i].err = fuzzOne(ctx, root, tags, pkg, name, long)
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	findings := 0
	for i, t := range targets {
		short := strings.TrimPrefix(t, "github.com/ivshmem-go/ivshmem/")
		if err := results[i].err; err != nil {
			findings++
			r.Failures = append(r.Failures, fmt.Sprintf("%s: %v", short, err))
			continue
		}
		r.atLeast(short+", runs", results[i].runs, 1)
	}
	r.atMost("findings", float64(findings), 0)
	return nil
}

var execs = regexp.MustCompile(`execs: (\d+)`)

func fuzzOne(ctx context.Context, root, tags, pkg, name, long string) (runs float64, err error) {
	cmd := exec.CommandContext(ctx, "go", "test", tags, "-run", "^$", "-fuzz", "^"+name+"$", "-fuzztime", long, "-fuzzminimizetime", "1x", "-parallel", "1", pkg)
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	for _, m := range execs.FindAllStringSubmatch(string(out), -1) {
		runs, _ = strconv.ParseFloat(m[1], 64)
	}
	// Now and then the go command takes the end of the time that it was given
	// for a failure. What a fuzzer finds is written down.
	timeUp := bytes.Contains(out, []byte("\n    context deadline exceeded\n")) && !bytes.Contains(out, []byte("Failing input written"))
	if err != nil && !timeUp {
		return runs, fmt.Errorf("%w\n%s", err, out)
	}
	// What it was told to do it has done, though it may not have said so yet.
	if n, is := strings.CutSuffix(long, "x"); is {
		return strconv.ParseFloat(n, 64)
	}
	return runs, nil
}
