package main

import (
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
)

func (p *program) doctorCommand() *cli.Command {
	return command(1, &cli.Command{
		Name:      "doctor",
		Usage:     "check everything that a device needs, and say what to do",
		ArgsUsage: "[DEVICE]",
		Description: `Checks in the order in which things fail: mend the first failure first. It owns
the device for a moment and rings its own doorbell. Exit code 0 only if the
device is usable with interrupts.

Example: ivshctl doctor --json`,
		Flags: []cli.Flag{deviceFlag, jsonFlag},
		Action: func(c *cli.Context) error {
			address := c.String("device")
			if c.NArg() > 0 {
				address = c.Args().First()
			}
			d := ivshmem.Diagnose(c.Context, address)
			if c.Bool("json") {
				if err := p.printJSON(d); err != nil {
					return err
				}
			} else {
				p.printDiagnosis(d)
			}
			if !d.Usable {
				return errors.New("the device is not usable with interrupts: mend what failed first")
			}
			return nil
		},
	})
}

func (p *program) printDiagnosis(d *ivshmem.Diagnosis) {
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
	for _, c := range d.Checks {
		fmt.Fprintf(w, "%s\t%s\t%s\n", c.Status, c.Name, c.Found)
		if c.Remedy != "" {
			fmt.Fprintf(w, "\t\t-> %s\n", c.Remedy)
		}
	}
	w.Flush()
}
