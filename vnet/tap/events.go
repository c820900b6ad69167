package tap

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// events tells that something about an interface changed.
type events struct {
	updates chan netlink.LinkUpdate
	done    chan struct{}
	changed chan struct{} // of capacity 1
}

// subscribe begins to watch. What happened before is not told.
func subscribe(index int) (*events, error) {
	e := &events{changed: make(chan struct{}, 1), done: make(chan struct{})}
	if err := e.listen(); err != nil {
		return nil, err
	}
	go e.run(index)
	return e, nil
}

func (e *events) listen() error {
	e.updates = make(chan netlink.LinkUpdate)
	if err := netlink.LinkSubscribe(e.updates, e.done); err != nil {
		return fmt.Errorf("watch interfaces: %w", err)
	}
	return nil
}

func (e *events) run(index int) {
	for {
		for u := range e.updates {
			if int(u.Index) == index {
				e.tell()
			}
		}
		// More happened than the kernel keeps, or it is over.
		select {
		case <-e.done:
			return
		default:
		}
		if e.listen() != nil {
			return
		}
		e.tell()
	}
}

func (e *events) tell() {
	select {
	case e.changed <- struct{}{}:
	default:
	}
}

func (e *events) close() { close(e.done) }
