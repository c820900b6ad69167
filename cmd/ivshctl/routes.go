package main

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/ivshmem-go/ivshmem/internal/relay"
)

// dialFunc makes a connection.
type dialFunc = func(context.Context) (net.Conn, error)

// checkPairs checks the arguments FROM TO [FROM TO…].
func checkPairs(name string, args []string) error {
	if len(args) == 0 || len(args)%2 != 0 {
		return usagef("%s: expected pairs of FROM and TO, found %d arguments", name, len(args))
	}
	return nil
}

// relay joins connections that come in at each FROM with ones to its TO, until
// the context ends.
func (p *program) relay(ctx context.Context, name string, args []string, listen func(string) (net.Listener, error), dialer func(string) (dialFunc, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var routes []*relay.Route
	for i := 0; i < len(args); i += 2 {
		l, err := listen(args[i])
		if err != nil {
			return err
		}
		defer l.Close()
		dial, err := dialer(args[i+1])
		if err != nil {
			return err
		}
		routes = append(routes, &relay.Route{Listener: l, Dial: dial, Failed: func(err error) {
			fmt.Fprintf(p.err, "ivshctl: %s: %v\n", name, err)
		}})
	}
	ended := make(chan error, len(routes))
	for _, r := range routes {
		fmt.Fprintf(p.out, "ready %v\n", r.Listener.Addr())
		go func() { ended <- r.Run(ctx) }()
	}
	var err error
	for range routes {
		err = errors.Join(err, <-ended)
		cancel()
	}
	return err
}
