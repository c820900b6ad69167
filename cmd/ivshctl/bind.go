package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/sysfs"
)

var (
	forceFlag  = &cli.BoolFlag{Name: "force", Usage: "also if a process uses the device"}
	dryRunFlag = &cli.BoolFlag{Name: "dry-run", Usage: "print the steps, as lines for a shell, and change nothing"}
)

func (p *program) bindCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "bind", Usage: "give a PCI device to a kernel driver", ArgsUsage: "[DEVICE]",
		Description: `Needs root. vfio-pci has an interrupt for each vector and needs an IOMMU;
uio_ivshmem has one for all; igb_uio has vector 0 only; uio_pci_generic can
only be polled. The driver's module is loaded. If the driver does not take the
device, the device goes back to the driver that it had.

Example: ivshctl bind --driver vfio-pci 0000:00:04.0`,
		Flags: []cli.Flag{deviceFlag, forceFlag, dryRunFlag,
			&cli.StringFlag{Name: "driver", Usage: "`NAME` of the driver: vfio-pci, uio_ivshmem, igb_uio, uio_pci_generic or any other", Value: "vfio-pci"},
			&cli.BoolFlag{Name: "persist", Usage: "also at each boot, by a udev rule"}},
		Action: func(c *cli.Context) error {
			b, d, err := toBind(c)
			if err != nil {
				return err
			}
			change, err := b.Bind(d, c.String("driver"), c.Bool("force"), c.Bool("persist"))
			if err != nil {
				return err
			}
			return p.change(c, change)
		},
	})
}

func (p *program) unbindCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "unbind", Usage: "take a PCI device from its kernel driver", ArgsUsage: "[DEVICE]",
		Description: `Needs root. A device that ` + "`ivshctl bind`" + ` took from another driver goes back to
that one. The rule of bind --persist is removed.

Example: ivshctl unbind 0000:00:04.0`,
		Flags: []cli.Flag{deviceFlag, forceFlag, dryRunFlag},
		Action: func(c *cli.Context) error {
			b, d, err := toBind(c)
			if err != nil {
				return err
			}
			change, err := b.Unbind(d, c.Bool("force"))
			if err != nil {
				return err
			}
			return p.change(c, change)
		},
	})
}

// toBind is the device that a command is to bind or unbind.
func toBind(c *cli.Context) (*sysfs.Binder, *sysfs.Device, error) {
	address := c.String("device")
	if c.NArg() > 0 {
		address = c.Args().First()
	}
	if strings.Contains(address, "/") && !strings.HasPrefix(address, "/dev/uio") {
		return nil, nil, usagef("%s: expected a PCI device, found the path %s: a link's socket has no kernel driver", c.Command.Name, address)
	}
	found, err := ivshmem.Find(address)
	if err != nil {
		return nil, nil, err
	}
	d, err := sysfs.Root.Device(found.Address)
	if err != nil {
		return nil, nil, err
	}
	b, err := sysfs.NewBinder()
	return b, d, err
}

// change makes a change, or prints its steps.
func (p *program) change(c *cli.Context, change *sysfs.Change) error {
	if c.Bool("dry-run") {
		for _, s := range change.Steps {
			if s.Shell != "" {
				fmt.Fprintln(p.out, s.Shell)
			}
		}
		return nil
	}
	for _, u := range change.Users {
		fmt.Fprintf(p.err, "ivshctl: %v: taking the device away from it; vfio-pci does not let go before it closes the device\n", u)
	}
	if err := change.Do(); err != nil {
		return err
	}
	driver := "bound to " + change.Driver
	if change.Driver == "" {
		driver = "bound to no driver"
	}
	if was := change.Device.Driver; was != change.Driver {
		driver += ", was " + orNone(was)
	} else {
		driver += ", as it was"
	}
	fmt.Fprintf(p.out, "%s: %s\n", change.Device.Addr, driver)
	switch {
	case change.Rule != "":
		fmt.Fprintf(p.out, "%s:\n%s", change.RulePath, change.Rule)
	case change.RulePath != "":
		fmt.Fprintf(p.out, "removed %s\n", change.RulePath)
	}
	return nil
}

func (p *program) udevCommand() *cli.Command {
	return command(0, &cli.Command{
		Name: "udev", Usage: "print udev rules that let a group use the devices without root",
		Description: `For devices that are bound to vfio-pci or uio_ivshmem.

Example: ivshctl udev --group ivshmem | sudo tee /etc/udev/rules.d/71-ivshmem.rules`,
		Flags: []cli.Flag{&cli.StringFlag{Name: "group", Usage: "`NAME` of the group", Value: "ivshmem"}},
		Action: func(c *cli.Context) error {
			rules, err := sysfs.GroupRules(c.String("group"))
			if err != nil {
				return usageError{err}
			}
			_, err = fmt.Fprint(p.out, rules)
			return err
		},
	})
}
