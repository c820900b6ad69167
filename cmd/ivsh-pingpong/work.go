package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/internal/compare"
	"github.com/ivshmem-go/ivshmem/internal/pingpong"
)

// jobVariable is set for the processes that the embedded run starts, two for
// each measurement: to a workOrder.
const jobVariable = "IVSH_PINGPONG_JOB"

// workOrder is what one of the two processes has to do.
type workOrder struct {
	Name    string // of the measurement
	Mode    string
	Task    pingpong.Task
	Profile string // directory, or none

	// On a link: its socket, and the lower of both peers' IDs.
	Socket  string
	First   uint32
	Poller  bool
	Silence time.Duration

	// Over a contestant: its name, which end, and whether both share a CPU.
	// Descriptor 3 is for control, those of the contestant follow.
	Contestant string
	Side       int
	Files      int
	Yield      bool
}

// work plays one side of one measurement. The leading process prints what it
// found.
func work(text string) error {
	var o workOrder
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return fmt.Errorf("%s: %w", jobVariable, err)
	}
	play := o.contestant
	if o.Contestant == "" {
		play = o.link
	}
	r, err := play()
	if r == nil {
		return err
	}
	return errors.Join(err, encodeRecord(os.Stdout, r))
}

// link is one peer of a link. Which of both processes gets the lower ID does
// not matter: the one that has it leads.
func (o *workOrder) link() (*record, error) {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	dev, err := openDevice(o.Socket, o.Poller)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	peer := 2*o.First + 1 - dev.ID()
	leads := dev.ID() < peer
	stopProfile, err := o.startProfile(leads)
	if err != nil {
		return nil, err
	}
	defer stopProfile()
	if o.Task.Over == pingpong.Section {
		r, err := playSection(ctx, dev, peer, o.Mode, o.Task, sectionRun{silence: o.Silence, blind: true})
		if !leads {
			r = nil
		}
		return r, err
	}
	if !leads {
		return nil, followStreams(ctx, dev, peer, o.Mode, o.Task.Conns)
	}
	ep, err := endpoint(dev, o.Mode, o.Task.Conns)
	if err != nil {
		return nil, err
	}
	defer ep.Close()
	return leadStream(ctx, dev, ep, peer, o.Mode, o.Task)
}

// contestant is one end of a contestant; the first leads. It waits in ways
// that know nothing of contexts, so that a signal simply ends the process.
func (o *workOrder) contestant() (*record, error) {
	c, err := compare.Find(o.Contestant)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(3, "control")
	control, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	f.Close()
	defer control.Close()
	side := compare.Side{Index: o.Side, Size: o.Task.Size, Yield: o.Yield}
	for i := range o.Files {
		unix.CloseOnExec(4 + i)
		side.Files = append(side.Files, 4+i)
	}
	end, err := c.Attach(side)
	if err != nil {
		return nil, err
	}
	defer end.Close()
	if c.Mode != compare.Poller {
		keepThread()
	}
	stopProfile, err := o.startProfile(o.Side == 0)
	if err != nil {
		return nil, err
	}
	defer stopProfile()
	link := pingpong.Link{Data: end, Control: pingpong.NewControl(control)}
	if o.Side == 1 {
		return nil, pingpong.FollowTask(link, o.Task)
	}
	res, err := pingpong.LeadTask(link, o.Task)
	if err != nil {
		return nil, err
	}
	return taskRecord(res, o.Contestant, c.Mode), nil
}

func (o *workOrder) startProfile(leads bool) (func(), error) {
	role := "answers"
	if leads {
		role = "leads"
	}
	return startProfile(o.Profile, o.Name+"-"+role)
}
