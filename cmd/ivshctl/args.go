package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
)

// permute moves options in front of the arguments of the command they are
// given to: the library stops looking for options at the first argument, and
// would take `read 0x10 --json` for three arguments. What follows "--" stays.
func permute(app *cli.App, args []string) []string {
	if len(args) == 0 {
		return args
	}
	out := args[:1:1]
	flags, commands := app.Flags, app.Commands
	var options, rest []string
	for i := 1; i < len(args); i++ {
		a := args[i]
		if a == "--" {
			rest = append(rest, args[i:]...)
			break
		}
		if !strings.HasPrefix(a, "-") || a == "-" || isNumber(a) {
			if c := findCommand(commands, a); c != nil && len(rest) == 0 {
				out = append(append(out, options...), a)
				options, flags, commands = nil, c.Flags, c.Subcommands
				continue
			}
			rest = append(rest, a)
			continue
		}
		options = append(options, a)
		if takesValue(flags, a) && i+1 < len(args) {
			i++
			options = append(options, args[i])
		}
	}
	if len(rest) > 0 && rest[0] != "--" {
		// A negative number must not be taken for an option.
		rest = append([]string{"--"}, slices.DeleteFunc(rest, func(s string) bool { return s == "--" })...)
	}
	return append(append(out, options...), rest...)
}

func isNumber(s string) bool {
	_, err := strconv.ParseInt(s, 0, 64)
	return err == nil
}

func findCommand(commands []*cli.Command, name string) *cli.Command {
	for _, c := range commands {
		if c.HasName(name) {
			return c
		}
	}
	return nil
}

// takesValue reports whether an option is followed by a value of its own.
func takesValue(flags []cli.Flag, option string) bool {
	name := strings.TrimLeft(option, "-")
	if strings.Contains(name, "=") {
		return false
	}
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			_, isBool := f.(*cli.BoolFlag)
			return !isBool
		}
	}
	return false
}

// parseUint reads a number of at most bits bits.
func parseUint(what, s string, bits int) (uint64, error) {
	v, err := strconv.ParseUint(s, 0, bits)
	if err != nil {
		return 0, usagef("%s %q: expected a number of at most %d bits", what, s, bits)
	}
	return v, nil
}

// parseSize reads a number of bytes with an optional unit.
func parseSize(what, s string) (uint64, error) {
	digits, shift := s, 0
	if i := strings.IndexAny(s, "KMGTkmgt"); i >= 0 {
		shift = 10 * (1 + strings.IndexByte("KMGT", strings.ToUpper(s)[i]))
		digits = s[:i]
		if unit := strings.ToUpper(s[i+1:]); unit != "" && unit != "B" && unit != "IB" {
			digits = ""
		}
	}
	v, err := strconv.ParseUint(digits, 0, 64)
	if err != nil || v<<shift>>shift != v {
		return 0, usagef("%s %q: expected a size such as 4096, 64K or 1G", what, s)
	}
	return v << shift, nil
}

// formatSize is the inverse of parseSize, for display.
func formatSize(n uint64) string {
	for _, u := range []struct {
		shift int
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if n>>u.shift > 0 && n&(1<<u.shift-1) == 0 {
			return fmt.Sprintf("%d %s", n>>u.shift, u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
