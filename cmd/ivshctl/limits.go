package main

import (
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// checkDescriptors refuses a link whose eventfds would exceed the limit of the
// process: a QEMU whose vectors do not fit loses its device. Go raises the soft
// limit to the hard one when a program starts.
func checkDescriptors(s *service) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	peers, vectors := uint64(s.config.Peers), uint64(s.config.Vectors)
	// Some for the process itself, and for clients that are on their way in; for
	// each peer a socket.
	const spare = 64 + 64
	need := spare + peers
	if s.socket != "" {
		need += peers * vectors // the clients' own eventfds
	}
	// Doorbells, where they are handed out: to host processes as many as fit
	// into a message, to ivshmem2 clients all.
	if s.ivshmem2 == "" {
		need += min(peers*vectors, 253)
	} else {
		need += peers * vectors
	}
	if s.perPeer {
		need += peers * (1 + 2) // each listens, and has two clients on their way in
		if s.ivshmem2 != "" {
			need += peers
		}
	}
	if need > limit.Cur {
		return usagef("%d peers of %d vectors need up to %d file descriptors, the limit is %d: raise it (ulimit -n), or serve fewer peers or vectors",
			peers, vectors, need, limit.Cur)
	}
	return nil
}

// checkThreads refuses a link whose vfio-user connections, which have a thread
// each, would exceed what the process may have: Go's runtime ends a program
// that gets no thread.
func checkThreads(s *service) error {
	if s.socket == "" {
		return nil
	}
	const spare = 64 + 64
	need := uint64(s.config.Peers) + spare
	if s.perPeer {
		need += 2 * uint64(s.config.Peers) // clients on their way in
	}
	if limit, what := threadLimit(); need > limit {
		return usagef("%d peers need up to %d threads, the limit is %d (%s): raise it, or serve fewer peers", s.config.Peers, need, limit, what)
	}
	debug.SetMaxThreads(max(10000, int(need)+1000))
	return nil
}

// threadLimit is the lowest of the limits that the kernel has for the number of
// threads, and its name.
func threadLimit() (limit uint64, what string) {
	limit, what = math.MaxUint64, "none"
	lower := func(n uint64, name string) {
		if n < limit {
			limit, what = n, name
		}
	}
	var nproc unix.Rlimit
	if os.Geteuid() != 0 && unix.Getrlimit(unix.RLIMIT_NPROC, &nproc) == nil {
		lower(nproc.Cur, "ulimit -u")
	}
	files := []string{"/proc/sys/kernel/threads-max"}
	if group, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		for line := range strings.Lines(string(group)) {
			// Version 2 is "0::/path"; in version 1 the controller has a name.
			f := strings.SplitN(strings.TrimSpace(line), ":", 3)
			switch {
			case len(f) != 3:
			case f[1] == "":
				files = append(files, filepath.Join("/sys/fs/cgroup", f[2], "pids.max"))
			case f[1] == "pids":
				files = append(files, filepath.Join("/sys/fs/cgroup/pids", f[2], "pids.max"))
			}
		}
	}
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil {
			if n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil {
				lower(n, name)
			}
		}
	}
	return limit, what
}
