package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ivshctl": main, "ivshmem2-client": ivshmem2Client, "nbd": nbdClient, "read-entropy": readEntropy, "unix-echo": unixEcho, "unix-talk": unixTalk})
}

// ivshmem2Client connects to an ivshmem2-server socket and prints what it is
// told: `ivshmem2-client PATH`.
func ivshmem2Client() {
	c, err := ivshmemtest.DialIvshmem2(os.Args[1])
	if err == nil {
		err = c.Setup()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("ID %d of %d, %d vectors, protocol %#x, output %d, %d bytes\n", c.ID, c.MaxPeers, c.Vectors, c.Protocol, c.Output, len(c.Memory))
}

// TestScripts runs whole sessions of the real program.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			// The work folder's path may be too long for a socket.
			dir, err := os.MkdirTemp("", "ivshctl")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(dir) })
			e.Setenv("SOCKET", filepath.Join(dir, "link"))
			// The race detector would make each program's end take a second.
			e.Setenv("GORACE", "atexit_sleep_ms=0")
			e.Setenv("UID", strconv.Itoa(os.Getuid()))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"await": awaitFile},
	})
}

// awaitFile waits until a path exists, and if it is a Unix socket, until
// somebody listens: `await FILE`.
func awaitFile(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 || neg {
		ts.Fatalf("usage: await FILE")
	}
	path := ts.MkAbs(args[0])
	for {
		info, err := os.Stat(path)
		if err == nil && (info.Mode().Type() != os.ModeSocket || listening(ts, path)) {
			return
		}
	}
}

// listening reports whether a socket bound to an absolute path takes
// connections, without connecting: the program would take it for a client.
func listening(ts *testscript.TestScript, path string) bool {
	b, err := os.ReadFile("/proc/net/unix")
	ts.Check(err)
	for line := range strings.Lines(string(b)) {
		// Address, references, protocol, flags, type, state, inode, path. The
		// flag is __SO_ACCEPTCON.
		f := strings.Fields(line)
		if len(f) == 8 && f[7] == path && f[3] == "00010000" {
			return true
		}
	}
	return false
}

func TestPermute(t *testing.T) {
	app := (&program{}).app()
	for _, c := range []struct{ in, want []string }{
		{[]string{"ivshctl"}, []string{"ivshctl"}},
		{[]string{"ivshctl", "info", "00:04.0", "--json"}, []string{"ivshctl", "info", "--json", "--", "00:04.0"}},
		{[]string{"ivshctl", "read", "0x10", "-d", "a", "8", "--section=rw"}, []string{"ivshctl", "read", "-d", "a", "--section=rw", "--", "0x10", "8"}},
		{[]string{"ivshctl", "state", "set", "7", "--hold"}, []string{"ivshctl", "state", "set", "--hold", "--", "7"}},
		{[]string{"ivshctl", "ring", "-1"}, []string{"ivshctl", "ring", "--", "-1"}},
		{[]string{"ivshctl", "ring", "--", "--json"}, []string{"ivshctl", "ring", "--", "--json"}},
		{[]string{"ivshctl", "state", "--help"}, []string{"ivshctl", "state", "--help"}},
	} {
		if got := permute(app, c.in); !slices.Equal(got, c.want) {
			t.Errorf("permute(%q): got %q, want %q", c.in, got, c.want)
		}
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]uint64{
		"0": 0, "4096": 4096, "0x1000": 4096, "64K": 65536, "64KiB": 65536, "1m": 1 << 20, "2GB": 2 << 30, "1T": 1 << 40,
	} {
		if got, err := parseSize("size", s); err != nil || got != want {
			t.Errorf("%q: got %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "K", "1X", "1KX", "-1", "1.5M", "16777216T", "99999999999999999999"} {
		if got, err := parseSize("size", s); err == nil {
			t.Errorf("%q: got %d, want an error", s, got)
		}
	}
}
