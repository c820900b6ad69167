package main

import (
	"context"
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/stream"
)

func (p *program) sendCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "send", Usage: "send standard input to a peer that runs recv", ArgsUsage: "PEER:PORT",
		Description: `Waits for the peer, and for it to listen. Ends when the peer has read
everything.

Example: tar c . | ivshctl send 1:7`,
		Flags: []cli.Flag{deviceFlag, timeoutFlag},
		Action: func(c *cli.Context) error {
			to, err := streamAddr("send", c.Args().First())
			if err != nil {
				return err
			}
			return p.withConn(c, func(ctx context.Context, ep *stream.Endpoint) (*stream.Conn, error) {
				return dialStream(ctx, ep, to)
			}, func(conn *stream.Conn) error {
				if _, err := io.Copy(conn, p.in); err != nil {
					return err
				}
				if err := conn.CloseWrite(); err != nil {
					return err
				}
				// The peer closes when it has read everything.
				_, err := io.Copy(io.Discard, conn)
				return err
			})
		},
	})
}

func (p *program) recvCommand() *cli.Command {
	return command(1, &cli.Command{
		Name: "recv", Usage: "write what a peer sends to standard output", ArgsUsage: "PORT",
		Description: `Takes one connection, and ends when the peer has ended.

Example: ivshctl recv 7 | tar x`,
		Flags: []cli.Flag{deviceFlag, timeoutFlag},
		Action: func(c *cli.Context) error {
			port, err := parseUint("port", c.Args().First(), 32)
			if err != nil {
				return err
			}
			return p.withConn(c, func(ctx context.Context, ep *stream.Endpoint) (*stream.Conn, error) {
				return acceptStream(ctx, ep, uint32(port))
			}, func(conn *stream.Conn) error {
				_, err := io.Copy(p.out, conn)
				return err
			})
		},
	})
}

// withEndpoint runs f with an endpoint of the device that is given.
func (p *program) withEndpoint(c *cli.Context, f func(context.Context, *stream.Endpoint) error) error {
	d, err := ivshmem.Open(c.String("device"))
	if err != nil {
		return err
	}
	defer d.Close()
	ep, err := stream.New(d, stream.Config{})
	if err != nil {
		return err
	}
	defer ep.Close()
	ctx, cancel := withTimeout(c)
	defer cancel()
	return interrupted(f(ctx, ep))
}

// withConn is withEndpoint for one connection, which ends with the context.
func (p *program) withConn(c *cli.Context, connect func(context.Context, *stream.Endpoint) (*stream.Conn, error), use func(*stream.Conn) error) error {
	return p.withEndpoint(c, func(ctx context.Context, ep *stream.Endpoint) error {
		conn, err := connect(ctx, ep)
		if err != nil {
			return err
		}
		return untilDone(ctx, conn, use)
	})
}

// untilDone uses a connection, which ends with the context, and closes it.
func untilDone(ctx context.Context, conn *stream.Conn, use func(*stream.Conn) error) error {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err := use(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// streamAddr reads PEER:PORT.
func streamAddr(command, s string) (stream.Addr, error) {
	a, err := stream.ParseAddr(s)
	if err != nil {
		return a, usagef("%s: %v", command, err)
	}
	return a, nil
}

// dialStream dials until there is a peer that listens. When the time is up the
// error says, too, why there was none.
func dialStream(ctx context.Context, ep *stream.Endpoint, to stream.Addr) (*stream.Conn, error) {
	var last error
	for {
		conn, err := ep.Dial(ctx, to.Peer, to.Port)
		switch {
		case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ECONNRESET):
			last = err
		case err != nil && ctx.Err() != nil && last != nil: // in the middle of another try
			return nil, errors.Join(context.Cause(ctx), last)
		default:
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// acceptStream takes one connection.
func acceptStream(ctx context.Context, ep *stream.Endpoint, port uint32) (*stream.Conn, error) {
	l, err := ep.Listen(port)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	conn, err := l.AcceptStream()
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return conn, err
}
