package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/internal/filecopy"
	"github.com/ivshmem-go/ivshmem/stream"
)

// copyPort is where cp listens unless told otherwise.
const copyPort = 22

func (p *program) cpCommand() *cli.Command {
	return command(-1, &cli.Command{
		Name: "cp", Usage: "copy files and directories to a peer", ArgsUsage: "FILE… PEER | --into DIR",
		Description: `The peer runs it with --into. Each file appears in its place when it is whole
and its checksum is right. When a side is restarted, run its command again: the
other waits for it, and what has arrived is not sent again.

Example: ivshctl cp --into /srv
         ivshctl cp image.raw logs/ 0`,
		Flags: []cli.Flag{deviceFlag, timeoutFlag,
			&cli.StringFlag{Name: "into", Usage: "receive into `DIR`"},
			&cli.UintFlag{Name: "port", Usage: "the receiver's `PORT`", Value: copyPort},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "show no progress"}},
		Action: func(c *cli.Context) error {
			if dir := c.String("into"); dir != "" {
				if c.NArg() > 0 {
					return usagef("cp: expected no arguments beside --into, found %q", c.Args().First())
				}
				return p.receiveFiles(c, dir)
			}
			args := c.Args().Slice()
			if len(args) < 2 {
				return usagef("cp: expected FILE… and PEER, or --into DIR")
			}
			peer, err := parseUint("peer", args[len(args)-1], 16)
			if err != nil {
				return err
			}
			return p.sendFiles(c, args[:len(args)-1], stream.Addr{Peer: uint32(peer), Port: uint32(c.Uint("port"))})
		},
	})
}

func (p *program) receiveFiles(c *cli.Context, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return p.withEndpoint(c, func(ctx context.Context, ep *stream.Endpoint) error {
		r := &filecopy.Receiver{Root: root, Progress: p.progress(c)}
		for {
			conn, err := acceptStream(ctx, ep, uint32(c.Uint("port")))
			if err != nil {
				return err
			}
			err = untilDone(ctx, conn, func(c *stream.Conn) error { return r.Receive(c) })
			if ctx.Err() != nil || !filecopy.Broken(err) {
				p.total(c, "received", r.Count, r.Bytes)
				return err
			}
			fmt.Fprintf(p.err, "ivshctl: cp: %v: waiting for the sender\n", err)
		}
	})
}

func (p *program) sendFiles(c *cli.Context, paths []string, to stream.Addr) error {
	return p.withEndpoint(c, func(ctx context.Context, ep *stream.Endpoint) error {
		s := &filecopy.Sender{Paths: paths, Progress: p.progress(c)}
		for {
			conn, err := dialStream(ctx, ep, to)
			if err != nil {
				return err
			}
			err = untilDone(ctx, conn, func(c *stream.Conn) error { return s.Send(c) })
			if ctx.Err() != nil || !filecopy.Broken(err) || errors.Is(err, ivshmem.ErrGone) {
				p.total(c, "sent", s.Count, s.Bytes)
				return err
			}
			fmt.Fprintf(p.err, "ivshctl: cp: %v: waiting for the receiver\n", err)
		}
	})
}

// progress shows how far a file is, a few times a second, on a terminal.
func (p *program) progress(c *cli.Context) filecopy.Progress {
	f, ok := p.err.(*os.File)
	if !ok || c.Bool("quiet") {
		return nil
	}
	if info, err := f.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return nil
	}
	var last time.Time
	return func(path string, done, size int64) {
		if now := time.Now(); done == size || now.Sub(last) > 200*time.Millisecond {
			last = now
			end := "\r"
			if done == size {
				end = "\n"
			}
			fmt.Fprintf(f, "\x1b[K%s: %3d %% of %s%s", path, percent(done, size), formatSize(uint64(size)), end)
		}
	}
}

func percent(done, size int64) int64 {
	if size == 0 {
		return 100
	}
	return int64(float64(done) / float64(size) * 100)
}

func (p *program) total(c *cli.Context, what string, count int, bytes int64) {
	if !c.Bool("quiet") {
		fmt.Fprintf(p.out, "%s %d files, %d bytes\n", what, count, bytes)
	}
}
