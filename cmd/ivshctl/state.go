package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
)

var timeoutFlag = &cli.DurationFlag{Name: "timeout", Usage: "give up after this `TIME`, with exit code 5"}

func (p *program) stateCommand() *cli.Command {
	return &cli.Command{
		Name:         "state",
		Usage:        "read, write or watch the states of the peers",
		OnUsageError: onUsageError,
		Action:       unknownCommand,
		Subcommands: []*cli.Command{
			command(1, &cli.Command{
				Name: "get", Usage: "print the state of a peer, or of all", ArgsUsage: "[PEER]",
				Description: "Example: ivshctl state get 1",
				Flags:       []cli.Flag{deviceFlag, jsonFlag},
				Action:      p.stateGet,
			}),
			command(1, &cli.Command{
				Name: "set", Usage: "set the own state and stay until interrupted; then it is 0 again", ArgsUsage: "VALUE",
				Description: `With --hold the command ends at once and leaves the state behind. That works
for PCI devices whose driver does not reset them on close; on a link's socket,
and behind uio_ivshmem, the state ends with the command.

Example: ivshctl state set 1 --hold`,
				Flags: []cli.Flag{deviceFlag, timeoutFlag,
					&cli.BoolFlag{Name: "hold", Usage: "leave the state behind"}},
				Action: p.stateSet,
			}),
			command(0, &cli.Command{
				Name: "watch", Usage: "print states as they change",
				Description: `Prints all states that are not 0 first, then a line per change. By interrupts
where the device has them and nobody else owns it; otherwise it looks every 10 ms.

Example: ivshctl state watch --count 1 --timeout 10s`,
				Flags: []cli.Flag{deviceFlag, jsonFlag, timeoutFlag,
					&cli.UintFlag{Name: "count", Usage: "end after `N` lines (0: never)"}},
				Action: p.stateWatch,
			}),
		},
	}
}

func (p *program) stateGet(c *cli.Context) error {
	d, err := ivshmem.Open(c.String("device"), ivshmem.AsObserver())
	if err != nil {
		return err
	}
	defer d.Close()
	if c.NArg() == 1 {
		peer, err := parseUint("peer", c.Args().First(), 32)
		if err != nil {
			return err
		}
		v, err := d.State(uint32(peer))
		if err != nil {
			return err
		}
		return p.printStates(c.Bool("json"), []peerState{{uint32(peer), v}}, true)
	}
	states, err := readStates(d)
	if err != nil {
		return err
	}
	list := make([]peerState, len(states))
	for i, v := range states {
		list[i] = peerState{uint32(i), v}
	}
	return p.printStates(c.Bool("json"), list, false)
}

type peerState struct {
	Peer  uint32 `json:"peer"`
	State uint32 `json:"state"`
}

func (p *program) printStates(asJSON bool, list []peerState, bare bool) error {
	if asJSON {
		return p.printJSON(list)
	}
	for _, s := range list {
		if bare {
			fmt.Fprintln(p.out, s.State)
		} else {
			fmt.Fprintf(p.out, "%d %d\n", s.Peer, s.State)
		}
	}
	return nil
}

func readStates(d *ivshmem.Device) ([]uint32, error) {
	states := make([]uint32, d.MaxPeers())
	for i := range states {
		var err error
		if states[i], err = d.State(uint32(i)); err != nil {
			return nil, err
		}
	}
	return states, nil
}

func (p *program) stateSet(c *cli.Context) error {
	if c.NArg() != 1 {
		return usagef("state set: expected a value")
	}
	v, err := parseUint("state", c.Args().First(), 32)
	if err != nil {
		return err
	}
	hold := c.Bool("hold")
	d, err := ivshmem.Open(c.String("device"))
	if err != nil {
		return err
	}
	defer d.Close()
	if hold {
		if err := d.HoldState(); err != nil {
			return fmt.Errorf("%w: leave --hold out, and the command running", err)
		}
	}
	if err := d.SetState(uint32(v)); err != nil {
		return err
	}
	if hold {
		return d.Close()
	}
	ctx, cancel := withTimeout(c)
	defer cancel()
	<-ctx.Done()
	return d.Close()
}

// withTimeout is the context of a command with --timeout.
func withTimeout(c *cli.Context) (context.Context, context.CancelFunc) {
	if t := c.Duration("timeout"); t > 0 {
		return context.WithTimeout(c.Context, t)
	}
	return context.WithCancel(c.Context)
}

// interrupted makes an interrupt by the user a normal end.
func interrupted(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// openToWait opens a device as its owner, or beside the owner where there is
// one. Waiting is by interrupts only if the handle has them.
func openToWait(address string) (*ivshmem.Device, error) {
	d, err := ivshmem.Open(address)
	if errors.Is(err, ivshmem.ErrBusy) && !strings.Contains(address, "/") {
		return ivshmem.Open(address, ivshmem.AsObserver())
	}
	return d, err
}

// await waits until ready reports true: by interrupts of any vector, or by
// looking again and again where the handle has none.
func await(ctx context.Context, d *ivshmem.Device, ready func() bool) error {
	if d.HasInterrupts() {
		return d.Wait(ctx, nil, ready)
	}
	for !ready() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

func (p *program) stateWatch(c *cli.Context) error {
	d, err := openToWait(c.String("device"))
	if err != nil {
		return err
	}
	defer d.Close()
	if !d.HasInterrupts() {
		fmt.Fprintln(p.err, "ivshctl: no interrupts as the device is held here: looking every 10 ms")
	}
	ctx, cancel := withTimeout(c)
	defer cancel()
	known := make([]uint32, d.MaxPeers())
	limit := c.Uint("count")
	for n := uint(0); ; {
		changed, err := p.printChanges(c.Bool("json"), d, known)
		if err != nil {
			return err
		}
		if n += changed; limit > 0 && n >= limit {
			return nil
		}
		var looked error
		err = await(ctx, d, func() bool {
			var differ bool
			differ, looked = statesDiffer(d, known)
			return differ || looked != nil
		})
		if err = errors.Join(err, looked); err != nil {
			return interrupted(err)
		}
	}
}

func statesDiffer(d *ivshmem.Device, known []uint32) (bool, error) {
	for i, old := range known {
		v, err := d.State(uint32(i))
		if err != nil {
			return false, err
		}
		if v != old {
			return true, nil
		}
	}
	return false, nil
}

// printChanges prints the states that are not the known ones, and learns them.
func (p *program) printChanges(asJSON bool, d *ivshmem.Device, known []uint32) (n uint, err error) {
	now, err := readStates(d)
	if err != nil {
		return 0, err
	}
	for i, v := range now {
		if v == known[i] {
			continue
		}
		n++
		if asJSON {
			fmt.Fprintf(p.out, `{"peer":%d,"state":%d,"was":%d}`+"\n", i, v, known[i])
		} else {
			fmt.Fprintf(p.out, "peer %d: state %d, was %d\n", i, v, known[i])
		}
	}
	copy(known, now)
	return n, nil
}
