package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// talker is a program in a guest that is told what to do, a line for each, and
// says what became of it, likewise.
type talker struct {
	*vm.Process
	pair   *portPair
	guest  int
	name   string
	in     io.WriteCloser
	out    chan string
	told   string // last
	stderr lockedBuffer
}

// talk starts a program.
func (p *portPair) talk(guest int, argv ...string) *talker {
	in, stdin := io.Pipe()
	stdout, out := io.Pipe()
	k := &talker{pair: p, guest: guest, name: fmt.Sprintf("guest %d: %s", guest, strings.Join(argv, " ")), in: stdin, out: make(chan string, 1<<10)}
	go func() {
		defer close(k.out)
		for lines := bufio.NewReader(stdout); ; {
			line, err := lines.ReadString('\n')
			if err != nil {
				return
			}
			k.out <- line[:len(line)-1]
		}
	}()
	var err error
	k.Process, err = p.guests[guest].Exec(vm.Command{Argv: argv, Stdin: in, Stdout: out, Stderr: &k.stderr})
	if err != nil {
		p.fail(err)
		out.Close()
		return k
	}
	go func() {
		<-k.Done()
		in.Close()
		out.Close()
	}()
	return k
}

func (k *talker) failf(format string, args ...any) {
	k.pair.fail(fmt.Errorf("%s: %.60s: %w\n%s", k.name, k.told, fmt.Errorf(format, args...), k.stderr.text()))
}

// line waits for the next line.
func (k *talker) line() string {
	return k.lineWithin(k.pair.patience())
}

func (k *talker) lineWithin(limit time.Duration) string {
	if k.pair.err != nil {
		return ""
	}
	select {
	case line, ok := <-k.out:
		if !ok {
			k.failf("it has ended")
		}
		return line
	case <-k.pair.ctx.Done():
		k.pair.fail(k.pair.ctx.Err())
	case <-time.After(limit):
		k.failf("no answer")
	}
	return ""
}

// running says whether the program has not ended.
func (k *talker) running() bool {
	select {
	case <-k.Done():
		return false
	default:
		return true
	}
}

// tell says what to do.
func (k *talker) tell(what string) {
	if k.pair.err != nil {
		return
	}
	k.told = what
	if _, err := io.WriteString(k.in, what+"\n"); err != nil {
		k.failf("%w", err)
	}
}

// call says what to do, and returns what became of it.
func (k *talker) call(what string) string {
	k.tell(what)
	return k.line()
}

// ends waits for the end of what was begun with tell.
func (k *talker) ends(want string) {
	if got := k.line(); k.pair.err == nil && got != want {
		k.failf("%.100s, expected %.100s", got, want)
	}
}

// calls makes calls: what, and what they return.
func (k *talker) calls(list ...string) {
	for i := 0; i < len(list); i += 2 {
		k.tell(list[i])
		k.ends(list[i+1])
	}
}

// until repeats a call until it returns something.
func (k *talker) until(what, want string) {
	ctx, cancel := k.pair.wait()
	defer cancel()
	for got := ""; got != want && k.pair.err == nil; {
		if got = k.call(what); ctx.Err() != nil {
			k.failf("still %s, expected %s", got, want)
		}
		time.Sleep(5 * time.Millisecond) // the other side needs the processor
	}
}

// end waits for the end.
func (k *talker) end(want int) {
	if k.pair.err != nil {
		return
	}
	ctx, cancel := k.pair.wait()
	defer cancel()
	st, err := k.Wait(ctx)
	if err == nil && st.ExitCode() != want {
		err = fmt.Errorf("%v, expected exit status %d", st, want)
	}
	if err != nil {
		k.failf("%w", err)
	}
}

// quit ends a program by the end of its input.
func (k *talker) quit() {
	k.in.Close()
	k.end(0)
}
