package main

import (
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"os"
	"os/exec"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/ivshsock"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

func (p *program) ivshmem2ServerCommand() *cli.Command {
	return command(0, &cli.Command{
		Name:  "ivshmem2-server",
		Usage: "serve a link to QEMUs that carry the ivshmem2 device of 2020, with the options of their example server",
		Description: `Takes the command lines of the example server of that QEMU. The R/W section is
what the size leaves beside the State Table (4096 bytes) and the output
sections. Without -M and -m the memory has no name, and nobody can change its
size. "ivshctl serve --ivshmem2-socket" serves such QEMUs and all other peers
on one link.

Example: ivshctl ivshmem2-server -F -l 64K -n 2 -V 3 -P 0x8003`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "F", Usage: "stay in the foreground"},
			&cli.BoolFlag{Name: "v", Usage: "with -F: log arrivals and departures"},
			&cli.StringFlag{Name: "p", Usage: "without -F: `FILE` to write the process ID to", Value: "/var/run/ivshmem-server.pid"},
			&cli.StringFlag{Name: "S", Usage: "`PATH` of the socket", Value: "/tmp/ivshmem_socket"},
			&cli.StringFlag{Name: "M", Usage: "`NAME` of a POSIX shared memory object to use"},
			&cli.StringFlag{Name: "m", Usage: "`DIR` to make the memory in, without a name, such as that of a hugetlbfs"},
			&cli.StringFlag{Name: "l", Usage: "`SIZE` of the memory, rounded up to a power of two", Value: "4M"},
			&cli.StringFlag{Name: "o", Usage: "`SIZE` of each output section", Value: "0"},
			&cli.StringFlag{Name: "n", Usage: "`NUMBER` of peers, 2 to 1024", Value: "2"},
			&cli.StringFlag{Name: "V", Usage: "`NUMBER` of vectors of each peer, 1 to 1024", Value: "1"},
			&cli.StringFlag{Name: "P", Usage: "protocol `TYPE`, 0 to 0xffff; virtio types give peer 0 the back-end", Value: "0"},
		},
		Action: func(c *cli.Context) error {
			s := &service{ivshmem2: c.String("S")}
			dir := c.String("m")
			if c.String("M") != "" && dir != "" {
				return usagef("ivshmem2-server: expected -M or -m, found both")
			}
			var err error
			if s.config, err = ivshmem2Config(c, dir); err != nil {
				return err
			}
			started := os.Getenv(daemonVariable) != ""
			if !c.Bool("F") && !started {
				return daemonize(p.err)
			}
			if s.config.File = memoryFile(c.String("M")); dir != "" {
				f, err := os.CreateTemp(dir, "ivshmem.")
				if err != nil {
					return err
				}
				f.Close()
				defer os.Remove(f.Name()) // in case it does not come so far
				s.config.File = f.Name()
			}
			level := slog.LevelWarn
			if c.Bool("v") {
				level = slog.LevelInfo
			}
			out := newLogWriter(p.err)
			defer out.Close()
			s.log = slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}))
			s.ready = func(*link.Link) error {
				if dir != "" {
					if err := os.Remove(s.config.File); err != nil {
						return err
					}
				}
				if started {
					return background(c.String("p"))
				}
				_, err := fmt.Fprintf(p.out, "ready %s\n", s.ivshmem2)
				return err
			}
			return s.run(c.Context)
		},
	})
}

// ivshmem2Config reads the options that describe the link.
func ivshmem2Config(c *cli.Context, dir string) (config link.Config, err error) {
	number := func(flag string, least, most uint64) uint64 {
		v, e := parseUint("-"+flag, c.String(flag), 32)
		if e == nil && (v < least || v > most) {
			e = usagef("-%s: expected %d to %d, found %d", flag, least, most, v)
		}
		if err == nil {
			err = e
		}
		return v
	}
	config.Peers = uint32(number("n", regs.MinPeers, ivshsock.MaxPeers))
	config.Vectors = uint16(number("V", 1, ivshsock.MaxVectors))
	config.Protocol = regs.Protocol(number("P", 0, 0xffff))
	if err != nil {
		return config, err
	}
	if config.Protocol.IsVirtio() && config.Peers > 2 {
		return config, usagef("-P %#x: expected 2 peers for a virtio protocol, found %d", uint16(config.Protocol), config.Peers)
	}
	if config.Output, err = parseSize("-o", c.String("o")); err != nil {
		return config, err
	}
	if config.Output%shmem.PageSize != 0 {
		return config, usagef("-o %s: expected a multiple of %d", c.String("o"), shmem.PageSize)
	}
	size, err := parseSize("-l", c.String("l"))
	if err != nil {
		return config, err
	}
	if size < 4096 || size > 1<<62 {
		return config, usagef("-l: expected 4K to %d, found %d", uint64(1)<<62, size)
	}
	size = 1 << bits.Len64(size-1)
	// A hugetlbfs has no smaller files than of one of its pages.
	var fs unix.Statfs_t
	if dir != "" && unix.Statfs(dir, &fs) == nil && fs.Type == unix.HUGETLBFS_MAGIC {
		size = max(size, uint64(fs.Bsize))
	}
	least, err := ivshsock.ReadWrite(config.Peers, config.Output, 0)
	if err != nil {
		return config, usageError{err}
	}
	rest := ivshsock.StateTable + uint64(config.Peers)*config.Output
	if rest+least > size {
		return config, usagef("-l %s: expected at least %d bytes, for a State Table of %d, a R/W section and %d output sections of %d, found %d",
			c.String("l"), rest+least, ivshsock.StateTable, config.Peers, config.Output, size)
	}
	config.ReadWrite = size - rest
	if err := ivshsock.Check(config); err != nil {
		return config, usageError{err}
	}
	return config, nil
}

// daemonVariable tells a program that it was started as a daemon: descriptor 3
// is the pipe to say so when it is ready.
const daemonVariable = "IVSHCTL_DAEMON"

// daemonize starts the program again in a session of its own, and returns when
// that one is ready, or has failed and said why.
func daemonize(stderr io.Writer) error {
	ready, say, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), daemonVariable+"=1")
	cmd.Stderr = stderr
	cmd.ExtraFiles = []*os.File{say}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	say.Close()
	if err != nil {
		return err
	}
	if b, _ := io.ReadAll(ready); len(b) > 0 {
		return cmd.Process.Release()
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("the server did not start: %w", err)
	}
	return fmt.Errorf("the server ended at once")
}

// background makes this process the daemon: it writes its ID, lets go of the
// terminal, and says that it is ready.
func background(pidFile string) error {
	if err := os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644); err != nil {
		return fmt.Errorf("process ID: %w: choose another file with -p", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	say := os.NewFile(3, "ready")
	defer say.Close()
	_, err = say.Write([]byte{1})
	return err
}
