package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
)

func (p *program) ringCommand() *cli.Command {
	return command(2, &cli.Command{
		Name: "ring", Usage: "ring the doorbell of a peer", ArgsUsage: "PEER [VECTOR]",
		Description: `Beside the owner of the device, where the driver allows it. Nothing tells
whether the peer is there, or has interrupts enabled.

Example: ivshctl ring 1 2`,
		Flags: []cli.Flag{deviceFlag,
			&cli.UintFlag{Name: "count", Usage: "ring `N` times", Value: 1}},
		Action: func(c *cli.Context) error {
			if c.NArg() == 0 {
				return usagef("ring: expected a peer")
			}
			peer, err := parseUint("peer", c.Args().First(), 16)
			if err != nil {
				return err
			}
			vector := uint64(0)
			if c.NArg() > 1 {
				if vector, err = parseUint("vector", c.Args().Get(1), 16); err != nil {
					return err
				}
			}
			d, err := ivshmem.Open(c.String("device"), ivshmem.AsObserver())
			if err != nil {
				return err
			}
			defer d.Close()
			for range c.Uint("count") {
				if err := d.Ring(uint32(peer), int(vector)); err != nil {
					return err
				}
			}
			return nil
		},
	})
}

func (p *program) waitCommand() *cli.Command {
	return command(-1, &cli.Command{
		Name: "wait", Usage: "wait for interrupts, and print the vectors they came on", ArgsUsage: "[VECTOR…]",
		Description: `Owns the device meanwhile. Vector 0 also announces changed states. A line per
interrupt: vector and total; several events may arrive as one interrupt.

Example: ivshctl wait 1 2 --state 1 --timeout 10s`,
		Flags: []cli.Flag{deviceFlag, jsonFlag, timeoutFlag,
			&cli.UintFlag{Name: "count", Usage: "end after `N` interrupts (0: never)", Value: 1},
			&cli.StringFlag{Name: "state", Usage: "set the own state to `VALUE` meanwhile, once interrupts are enabled"},
			&cli.BoolFlag{Name: "one-shot", Usage: "use one-shot interrupt mode"}},
		Action: p.wait,
	})
}

func (p *program) wait(c *cli.Context) error {
	var vectors []int
	for _, s := range c.Args().Slice() {
		v, err := parseUint("vector", s, 16)
		if err != nil {
			return err
		}
		vectors = append(vectors, int(v))
	}
	var state uint64
	if s := c.String("state"); s != "" {
		var err error
		if state, err = parseUint("state", s, 32); err != nil {
			return err
		}
	}
	var opts []ivshmem.Option
	if c.Bool("one-shot") {
		opts = append(opts, ivshmem.WithOneShot())
	}
	d, err := ivshmem.Open(c.String("device"), opts...)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.SetState(uint32(state)); err != nil {
		return err
	}
	ctx, cancel := withTimeout(c)
	defer cancel()
	return interrupted(p.printInterrupts(ctx, d, vectors, c.Uint("count"), c.Bool("json")))
}

// printInterrupts prints a line for each vector whose count rose, until limit
// interrupts came.
func (p *program) printInterrupts(ctx context.Context, d *ivshmem.Device, vectors []int, limit uint, asJSON bool) error {
	if vectors == nil {
		for v := range d.Vectors() {
			vectors = append(vectors, v)
		}
	}
	seen := make([]uint64, len(vectors))
	risen := func() bool {
		for i, v := range vectors {
			if d.Interrupts(v) != seen[i] {
				return true
			}
		}
		return false
	}
	for n := uint64(0); limit == 0 || n < uint64(limit); {
		if err := d.Wait(ctx, vectors, risen); err != nil {
			return err
		}
		for i, v := range vectors {
			now := d.Interrupts(v)
			if now == seen[i] {
				continue
			}
			n += now - seen[i]
			seen[i] = now
			if asJSON {
				fmt.Fprintf(p.out, `{"vector":%d,"total":%d}`+"\n", v, now)
			} else {
				fmt.Fprintf(p.out, "vector %d: %d\n", v, now)
			}
		}
	}
	return nil
}
