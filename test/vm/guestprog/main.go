// Command guestprog is what campaigns run inside guests where the project's
// own commands cannot show what is to be counted. Its first argument says
// what to do; it prints one JSON object.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
)

var programs = map[string]func(ctx context.Context, args []string) (any, error){
	"bar2":          bar2,
	"bench":         benchOther,
	"char-drive":    charDrive,
	"char-serve":    charServe,
	"churn":         churn,
	"copies":        copies,
	"cost":          cost,
	"crash":         crash,
	"crowd":         crowd,
	"mixed":         mixed,
	"oneshot":       oneShot,
	"port-bench":    portBench,
	"port-load":     portLoad,
	"port-records":  portRecords,
	"port-side":     portSide,
	"port-terminal": portTerminal,
	"ring":          ring,
	"survive":       survive,
	"uio-hold":      hold,
	"uio-rules":     rules,
	"uio-wait":      wait,
	"uio-words":     words,
}

func main() {
	// As in ivshctl.
	runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0)))
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guestprog:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 || programs[args[0]] == nil {
		return errors.New("expected the name of a program")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Hour)
	defer cancel()
	result, err := programs[args[0]](ctx, args[1:])
	if result != nil {
		if jerr := json.NewEncoder(os.Stdout).Encode(result); jerr != nil {
			return jerr
		}
	}
	return err
}
