package main

import (
	"context"
	"fmt"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
)

// doctor runs `ivshctl doctor` in set-ups that are broken on purpose: it has to
// name the cause and the remedy of each.
func doctor(ctx context.Context, r *Report) error {
	c, err := checks.OpenClinic(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	c.Healthy = r.Sabotage
	r.say("booting %d guests", len(c.Configs))
	guests, err := vm.StartAll(ctx, c.Configs)
	if err != nil {
		return err
	}
	for _, g := range guests {
		defer g.Close()
	}
	t := Table{Title: "what is wrong, and what the doctor says of it", Head: []string{"set-up", "cause named", "remedy named", "exit code"}}
	named := 0
	for _, s := range checks.Setups {
		f, exit, err := c.Examine(ctx, guests, s)
		cause := fmt.Sprintf("%s: %s: %s", f.Status, f.Name, f.Found)
		if err != nil {
			cause = cellFailed
			r.Failures = append(r.Failures, fmt.Sprintf("%s: %v", s.Name, err))
		} else {
			named++
		}
		t.Rows = append(t.Rows, []string{s.Name, cause, f.Remedy, fmt.Sprint(exit)})
	}
	r.Tables = append(r.Tables, t)
	r.atLeast("set-ups whose cause and remedy are named", float64(named), float64(len(checks.Setups)))
	return nil
}
