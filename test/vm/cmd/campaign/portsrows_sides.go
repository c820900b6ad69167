package main

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func (p *portPair) readiness() string {
	name := p.port(plainPort)
	p.open(name)
	for _, xy := range p.ends() {
		x, y := xy[0], xy[1]
		x.calls("poll", "OUT")
		x.tell("poll in")
		p.sleeps(x, inPoll)
		y.calls("write abc", "3")
		x.ends("IN")
		x.calls("poll", "IN|OUT", "read 10", `3 "abc"`, "poll", "OUT")
		if p.wire == single {
			continue
		}
		x.tell("poll hup")
		p.sleeps(x, inPoll)
		y.calls("close", "close")
		x.ends("HUP")
		x.calls("poll", p.hungUp())
		y.calls("open "+p.file(y.guest, name), "open")
		x.until("poll", "OUT")
	}
	p.closeBoth()
	if p.wire == single {
		return "wakes who waits; hang-up: when the driver goes"
	}
	return "wakes who waits; " + strings.ReplaceAll(p.hungUp(), "|", ", ") + " when the other side closes"
}

func (p *portPair) cache() string {
	kept := p.port(cachedPort)
	p.open(kept)
	for _, xy := range p.ends() {
		x, y := xy[0], xy[1]
		y.calls("write unread", "6")
		x.until("inq", "6")
		x.calls("close", "close")
		if s := p.list(x.guest)[path.Base(p.file(x.guest, kept))]; p.err == nil && s.Unread != 6 {
			p.failf("%+v, expected 6 bytes", s)
		}
		x.calls("open "+p.file(x.guest, kept), "open", "inq", "6", "read 10", `6 "unread"`)
		x.until("poll", "OUT")
		y.until("poll", "OUT")
	}
	p.closeBoth()
	if p.wire == single {
		return "kept"
	}
	p.open(plainPort)
	for _, xy := range p.ends() {
		x, y := xy[0], xy[1]
		y.calls("write unread", "6")
		x.until("inq", "6")
		x.calls("close", "close", "open "+p.file(x.guest, plainPort), "open", "inq", "0")
		x.until("poll", "OUT")
		y.until("poll", "OUT")
	}
	p.closeBoth()
	return "kept, or dropped, per port"
}

// deviceGoes kills the device's service; a program takes its place.
func (p *portPair) deviceGoes() string {
	name := p.port(plainPort)
	p.open(name)
	p.drv.tell("read 10")
	p.sleeps(p.drv, inCall)
	p.dev.tell("read 10")
	p.sleeps(p.dev, inCall)
	p.end(0, unix.SIGKILL)
	// The other side's end comes a moment before that of the port.
	if got := p.drv.line(); p.err == nil && got != "ENODEV" && got != `0 ""` {
		p.drv.failf("%s, expected ENODEV or the end of file", got)
	}
	p.dev.ends("ECONNABORTED")
	for _, k := range []*talker{p.dev, p.drv} {
		k.until("read 10", "ENOTCONN")
		k.calls("close", "close")
		k.until("open "+p.file(k.guest, name), "ENOENT")
	}
	program := p.program(0)
	program.calls("open "+name, "open")
	p.drv.until("open "+p.file(1, name), "open")
	p.drv.until("poll", "OUT")
	program.calls("write "+name, "wrote")
	p.drv.until("inq", "6")
	p.drv.calls("read 10", `6 "unread"`, "close", "close")
	return "killed: the file ends; another one came"
}

// terminals has a program that is told of a size by a signal, since that of a
// terminal in the other guest was set.
func (p *portPair) terminals() string {
	if p.wire == single {
		return "" // no terminals
	}
	terminal, window := p.talk(1, "guestprog", "port-terminal", p.file(1, "con0")), p.talk(0, "guestprog", "port-terminal", p.file(0, "con0"))
	p.lines(window, "0 rows 0 columns")
	p.lines(terminal, "0 rows 0 columns")
	for _, s := range [][2]int{{25, 80}, {43, 132}} {
		text := fmt.Sprintf("%d rows %d columns", s[0], s[1])
		window.tell(fmt.Sprintf("%d %d", s[0], s[1]))
		p.lines(window, text)
		p.lines(terminal, text)
	}
	window.quit()
	terminal.quit()
	return "SIGWINCH of a program, "
}

// resize tells a size with the device's program.
func (p *portPair) resize() string {
	const size = "43 rows 132 columns"
	program, name := p.sides[0], "con1"
	switch p.wire {
	case single:
		name = "con0"
	case original:
		program.calls("resize con1", "ENOTSUP", "resize con0", "told")
		return "port 0; others refused"
	default:
		program.calls("resize "+plainPort, "ENOTSUP")
	}
	program.calls("resize "+name, "told")
	p.drv.until("open "+p.file(1, name), "open")
	p.drv.until("winsize", size)
	p.drv.calls("close", "close")
	return "TIOCGWINSZ"
}

// lines waits for a line: the same size may be told several times before.
func (p *portPair) lines(k *talker, want string) {
	for got := ""; got != want && p.err == nil; {
		got = k.line()
	}
}

// deviceAgain puts the device's service in the place of the program, and waits for
// the driver's side to find it.
func (p *portPair) deviceAgain() {
	_, names := p.options(1)
	files := strings.Join(names, " ")
	p.sides[0].quit()
	p.sh(1, "cd "+portsDir+"; for f in "+files+"; do while [ -e $f ]; do sleep 0.02; done; done")
	p.serve(0)
	p.sh(1, "cd "+portsDir+"; for f in "+files+"; do until [ -e $f ]; do sleep 0.02; done; done")
}

func (p *portPair) peerCache() string {
	program, name := p.sides[0], p.port(plainPort)
	if p.wire != original {
		program.calls("cached "+name, "ENOTSUP")
		return "refused"
	}
	// The program has it open, and the driver's service has set what it wants before.
	p.drv.until("open "+p.file(1, name), "open")
	program.calls("cached "+name, "asked")
	program.calls("write "+name, "wrote")
	p.drv.until("inq", "6")
	p.drv.calls("close", "close", "open "+p.file(1, name), "open", "inq", "6", "read 10", `6 "unread"`, "close", "close")
	return "kept, where the driver's side did not ask for it"
}

func (p *portPair) peerLimit() string {
	program, name := p.sides[0], p.port(limitedPort)
	if p.wire != original {
		program.calls("limit-1-mib "+name, "ENOTSUP")
		return "refused"
	}
	program.calls("open "+name, "open")
	p.drv.until("open "+p.file(1, name), "open") // its service has set what it wants before
	program.calls("limit-1-mib "+name, "asked")
	program.calls("fill "+name, "throttled")
	n, err := strconv.Atoi(p.drv.call("inq"))
	if p.err == nil && (err != nil || n < 1<<20) {
		p.failf("throttled at %d bytes (%w), expected 1 MiB", n, err)
	}
	p.drv.calls("close", "close")
	return fmt.Sprintf("throttled at %d bytes", n)
}

// driverGoes ends the driver's service; a program takes its place.
func (p *portPair) driverGoes() string {
	name := p.port(plainPort)
	p.deviceAgain()
	p.open(name)
	p.hello()
	p.dev.tell("poll hup")
	p.sleeps(p.dev, inPoll)
	p.end(1, unix.SIGINT)
	p.dev.ends("HUP")
	p.dev.until("poll", p.hungUp())
	p.dev.calls("read 10", `0 ""`)
	p.drv.calls("read 10", "ENOTCONN", "close", "close")
	program := p.program(1)
	program.calls("open "+name, "open")
	p.dev.until("poll", "OUT")
	program.calls("write "+name, "wrote")
	p.dev.until("inq", "6")
	p.dev.calls("read 10", `6 "unread"`, "close", "close")
	return "HUP and end of file; another one came"
}

func (p *portPair) emergency() string {
	program := p.sides[1]
	if p.wire == original {
		program.calls("emergency x", "ENOTSUP")
		return "refused"
	}
	name := "con1" // the first open console
	if p.wire == single {
		name = "con0"
	}
	// A terminal must not become that of the one that goes on.
	reader := p.talk(0, "sh", "-c", "head -c 1 "+p.file(0, name)+"; echo")
	for p.err == nil && !p.list(0)[name].OpenHere {
	}
	program.calls("emergency x", "sent")
	reader.ends("x")
	reader.end(0)
	return "arrived"
}
