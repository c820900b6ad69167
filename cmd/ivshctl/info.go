package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
)

func (p *program) listCommand() *cli.Command {
	return command(0, &cli.Command{
		Name:  "list",
		Usage: "list the devices on this machine's PCI bus",
		Description: `Needs no privileges. With --watch it goes on and prints a line for each
device that appears or disappears, and each driver that is bound or unbound.

Example: ivshctl list --watch`,
		Flags: []cli.Flag{jsonFlag,
			&cli.BoolFlag{Name: "watch", Usage: "follow what happens"}},
		Action: func(c *cli.Context) error {
			if c.Bool("watch") {
				list := func() error { return p.list(c.Bool("json")) }
				return interrupted(ivshmem.Watch(c.Context, list, func(e ivshmem.Event) error { return p.printEvent(c.Bool("json"), e) }))
			}
			return p.list(c.Bool("json"))
		},
	})
}

func (p *program) printEvent(asJSON bool, e ivshmem.Event) error {
	if asJSON {
		return json.NewEncoder(p.out).Encode(e)
	}
	_, err := fmt.Fprintf(p.out, "%s %s %s\n", e.Address, e.Action, e.Driver)
	return err
}

func (p *program) list(asJSON bool) error {
	found, err := ivshmem.Discover()
	if asJSON {
		type entry struct {
			Address      string `json:"address"`
			Protocol     uint16 `json:"protocol"`
			ProtocolName string `json:"protocol_name"`
			Driver       string `json:"driver"`
		}
		list := make([]entry, 0, len(found))
		for _, f := range found {
			list = append(list, entry{f.Address, uint16(f.Protocol), f.Protocol.String(), f.Driver})
		}
		return errors.Join(p.printJSON(list), err)
	}
	if len(found) == 0 && err == nil {
		fmt.Fprintln(p.err, "no ivshmem v2 device (110a:4106) on this machine's PCI bus")
		return nil
	}
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ADDRESS\tPROTOCOL\tDRIVER")
	for _, f := range found {
		fmt.Fprintf(w, "%s\t%04Xh %v\t%s\n", f.Address, uint16(f.Protocol), f.Protocol, orNone(f.Driver))
	}
	return errors.Join(w.Flush(), err)
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func (p *program) printJSON(v any) error {
	e := json.NewEncoder(p.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (p *program) infoCommand() *cli.Command {
	return command(1, &cli.Command{
		Name:      "info",
		Usage:     "print everything about a device",
		ArgsUsage: "[DEVICE]",
		Description: `Looks at the device beside its owner and changes nothing. What cannot be seen,
for want of privileges or because another process holds it, is listed with
the reason. On a link's socket it joins as a peer for a moment.

Example: ivshctl info --json 0000:00:04.0`,
		Flags: []cli.Flag{deviceFlag, jsonFlag},
		Action: func(c *cli.Context) error {
			address := c.String("device")
			if c.NArg() > 0 {
				address = c.Args().First()
			}
			i, err := ivshmem.Inspect(address)
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return p.printJSON(i)
			}
			return p.printInfo(i)
		},
	})
}

func (p *program) printInfo(i *ivshmem.Info) error {
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	row("device", "%s", i.Address)
	row("identity", "%s", i.Identity)
	row("protocol", "%04Xh %s", uint16(i.Protocol), i.ProtocolName)
	if i.ID != nil {
		row("peer", "ID %d of %d", *i.ID, *i.MaxPeers)
	}
	if i.Vectors != nil {
		row("vectors", "%d", *i.Vectors)
	}
	if i.OneShot != nil {
		row("one-shot", "%s", onOff(*i.OneShot))
	}
	if i.InterruptControl != nil {
		row("interrupts", "%s", onOff(*i.InterruptControl))
	}
	if i.InputsTrap {
		row("mode", "strict: others' output sections by messages")
	}
	row("driver", "%s", orNone(i.Driver))
	row("seen through", "%s", orNone(i.BackEnd))
	if i.Owner != nil {
		row("owner", "%v", i.Owner)
	} else {
		row("owner", "none")
	}
	w.Flush()
	if len(i.Sections) > 0 {
		fmt.Fprintln(p.out)
		fmt.Fprintln(w, "SECTION\tOFFSET\tSIZE\tACCESS")
		for _, s := range i.Sections {
			access := "read-only"
			if s.Writable {
				access = "read/write"
			}
			fmt.Fprintf(w, "%s\t%#x\t%s\t%s\n", s.Title, s.Offset, formatSize(s.Size), access)
		}
		w.Flush()
	}
	if len(i.States) > 0 {
		fmt.Fprintln(p.out)
		fmt.Fprintln(w, "PEER\tSTATE")
		for peer, v := range i.States {
			own := ""
			if i.ID != nil && uint32(peer) == *i.ID {
				own = " (own)"
			}
			fmt.Fprintf(w, "%d%s\t%d\n", peer, own, v)
		}
		w.Flush()
	}
	if len(i.Missing) > 0 {
		fmt.Fprintln(p.out, "\nnot seen:")
		for _, m := range i.Missing {
			fmt.Fprintf(p.out, "  %s\n", m)
		}
	}
	return nil
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}
