package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
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
	findings := 0
	for _, t := range targets {
		pkg, name, _ := strings.Cut(t, " ")
		r.say("fuzzing %s for %v", t, r.Duration)
		runs, err := fuzzOne(ctx, root, tags, pkg, name, r.Duration)
		short := strings.TrimPrefix(pkg, "github.com/ivshmem-go/ivshmem/") + " " + name
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			findings++
			r.Failures = append(r.Failures, fmt.Sprintf("%s: %v", short, err))
			continue
		}
		r.atLeast(short+", runs", runs, 1)
	}
	r.atMost("findings", float64(findings), 0)
	return nil
}

var execs = regexp.MustCompile(`execs: (\d+)`)

func fuzzOne(ctx context.Context, root, tags, pkg, name string, d time.Duration) (runs float64, err error) {
	cmd := exec.CommandContext(ctx, "go", "test", tags, "-run", "^$", "-fuzz", "^"+name+"$", "-fuzztime", d.String(), pkg)
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	for _, m := range execs.FindAllStringSubmatch(string(out), -1) {
		runs, _ = strconv.ParseFloat(m[1], 64)
	}
	if err != nil {
		return runs, fmt.Errorf("%w\n%s", err, out)
	}
	return runs, nil
}
