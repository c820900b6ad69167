package main

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// portRows are the rows of the table in docs/console.md, in the order in which
// they are checked: the later ones take a side away and put a program in its
// place, which asks for what no file can.
var portRows = []struct {
	feature string
	// check returns in a few words what was found.
	check func(*portPair) string
}{
	{"names, lookup by name", (*portPair).names},
	{"consoles beside plain ports", (*portPair).consoles},
	{"ports added at run time", (*portPair).added},
	{"ports removed at run time", (*portPair).removed},
	{"open and close told", (*portPair).openClose},
	{"end of file after all data", (*portPair).endOfFile},
	{"read waits, EAGAIN", (*portPair).readWaits},
	{"no space when throttled", (*portPair).noSpace},
	{"limit of unread data", (*portPair).limit},
	{"readiness, hang-up", (*portPair).readiness},
	{"unread data kept on close", (*portPair).cache},
	{"size of the window", (*portPair).terminals},
	{"the device goes", (*portPair).deviceGoes},
	{"size of the window", (*portPair).resize},
	{"the device asks the driver to keep it", (*portPair).peerCache},
	{"the device sets the driver's limit", (*portPair).peerLimit},
	{"the driver goes and comes", (*portPair).driverGoes},
	{"emergency write", (*portPair).emergency},
}

// file is a port's file in a guest.
func (p *portPair) file(i int, name string) string {
	if p.wire == single && i == 1 {
		name = "port-0" // names are not carried
	}
	return path.Join(portsDir, name)
}

// port is one of those there are: the only one of the single wire.
func (p *portPair) port(name string) string {
	if p.wire == single {
		return "con0"
	}
	return name
}

// open opens both ends of a port.
func (p *portPair) open(name string) {
	p.dev.calls("open "+p.file(0, name), "open")
	p.drv.until("open "+p.file(1, name), "open")
	p.dev.until("poll", "OUT")
	p.drv.until("poll", "OUT")
}

// closeBoth closes them.
func (p *portPair) closeBoth() {
	for _, k := range []*talker{p.dev, p.drv} {
		k.calls("nonblock off", "nonblock", "close", "close")
	}
}

// hungUp is what poll says while the other side is closed.
func (p *portPair) hungUp() string {
	if p.wire == original {
		return "IN|OUT|HUP" // it goes out all the same
	}
	return "IN|HUP"
}

// Where a program sleeps: the kernel's function of CUSE, or the number of the call.
var (
	inCall = "request_wait_answer"
	inPoll = fmt.Sprintf("^%d ", unix.SYS_PPOLL)
)

// sleeps waits until the program sleeps there.
func (p *portPair) sleeps(k *talker, where string) {
	p.sh(k.guest, `
until for f in $(pidof guestprog); do cat /proc/$f/task/*/wchan; echo; cat /proc/$f/task/*/syscall; done 2>/dev/null | grep -qE '`+where+`'
do sleep 0.02; done`)
	select {
	case line := <-k.out:
		k.failf("the call returned %s at once", line)
	default:
	}
}

// refused runs a command of the device's side that has to fail.
func (p *portPair) refused(command, why string) {
	p.sh(0, "! ivshctl ports "+command+" --dir "+portsDir+" >/tmp/why 2>&1; grep -q '"+why+"' /tmp/why || { cat /tmp/why; exit 1; }")
}

func (p *portPair) names() string {
	here, there := p.list(0), p.list(1)
	p.refused("add "+p.port(plainPort), "expected a new one")
	for _, k := range []*talker{p.dev, p.drv} {
		k.calls("open "+portsDir+"/none", "ENOENT")
	}
	if p.wire == single {
		if s := there["port-0"]; len(there) != 1 || s.Name != "" || here["con0"].Name != "con0" {
			p.failf("ports of the driver: %+v", there)
		}
		return "the driver's port has none"
	}
	for name, s := range here {
		if o, ok := there[name]; !ok || o.Number != s.Number || o.Name != name || s.Name != name {
			p.failf("%+v is there %+v", s, o)
		}
	}
	if want := len(portNames) + 2; len(here) != want || len(there) != want {
		p.failf("%d and %d ports, expected %d", len(here), len(there), want)
	}
	return fmt.Sprintf("%d names, the same on both sides", len(here))
}

func (p *portPair) consoles() string {
	consoles := 0
	for i := range 2 {
		for name, s := range p.list(i) {
			if s.Console != (strings.HasPrefix(name, "con") || p.wire == single) {
				p.failf("guest %d: %+v", i, s)
			}
			if s.Console {
				consoles++
			}
		}
	}
	if p.wire == single {
		p.drv.calls("open "+p.file(1, "con0"), "open", "winsize", "0 rows 0 columns", "close", "close")
		return "the port is one"
	}
	p.drv.calls("open "+p.file(1, "con1"), "open", "winsize", "0 rows 0 columns", "close", "close",
		"open "+p.file(1, plainPort), "open", "winsize", "ENOTTY", "close", "close")
	return fmt.Sprintf("%d consoles, %d plain", consoles/2, len(portNames))
}

// hello carries a few bytes each way on an open port.
func (p *portPair) hello() {
	for _, xy := range p.ends() {
		xy[0].calls("write hello", "5")
		xy[1].calls("read 10", `5 "hello"`)
	}
}

// ends are both directions.
func (p *portPair) ends() [2][2]*talker {
	return [2][2]*talker{{p.dev, p.drv}, {p.drv, p.dev}}
}

func (p *portPair) added() string {
	if p.wire == single {
		p.refused("add late", "no port number is free")
		return "refused"
	}
	for _, name := range []string{"late", "last"} {
		if out := p.sh(0, "ivshctl ports add "+name+",as=char --dir "+portsDir); p.err == nil && out != p.file(0, name) {
			p.failf("ports add: %q", out)
		}
	}
	p.open("late")
	p.hello()
	p.closeBoth()
	p.refused("add more", "no port number is free")
	return fmt.Sprintf("2, up to %d", manyPorts)
}

func (p *portPair) removed() string {
	if p.wire != multiport {
		p.refused("remove "+p.port(plainPort), "cannot carry")
		return "refused"
	}
	p.open("late")
	for _, k := range []*talker{p.dev, p.drv} {
		k.tell("read 10")
		p.sleeps(k, inCall)
	}
	p.sh(0, "ivshctl ports remove late --dir "+portsDir+"; ivshctl ports remove last --dir "+portsDir)
	for _, k := range []*talker{p.dev, p.drv} {
		k.ends("ENODEV")
		k.calls("poll", "HUP", "read 10", "ENODEV", "write x", "ENODEV", "close", "close")
		k.until("open "+p.file(k.guest, "late"), "ENOENT")
	}
	return "while in use: ENODEV on both sides"
}

func (p *portPair) openClose() string {
	name := p.port(plainPort)
	if p.wire == single {
		p.drv.calls("open "+p.file(1, name), "open", "poll", "OUT") // nobody has it open there
		p.dev.calls("open "+p.file(0, name), "open", "poll", "OUT", "close", "close")
		p.drv.calls("poll", "OUT", "close", "close")
		return "both count as open"
	}
	for _, xy := range p.ends() {
		x, y := xy[0], xy[1]
		x.calls("open "+p.file(x.guest, name), "open")
		x.until("poll", p.hungUp())                                                               // it may hear of a closing before
		p.sh(x.guest, "! (exec 3<>"+p.file(x.guest, name)+") 2>/tmp/why; grep -qi busy /tmp/why") // one at a time
		for range 2 {
			y.calls("open "+p.file(y.guest, name), "open")
			x.until("poll", "OUT")
			y.calls("close", "close")
			x.until("poll", p.hungUp())
		}
		x.calls("close", "close")
	}
	return "told, both ways; one at a time: EBUSY"
}

func (p *portPair) endOfFile() string {
	name, data := p.port(plainPort), strings.Repeat("0123456789abcdef", 1000)
	if p.wire == single {
		data = data[:4<<10] // of the limit
	}
	arrived := fmt.Sprintf("%d %q", len(data), data)
	for _, xy := range p.ends() {
		x, y := xy[0], xy[1]
		if p.wire == single && y == p.drv {
			continue // it is not told
		}
		p.open(name)
		x.calls("write "+data, fmt.Sprint(len(data)))
		if p.wire == single {
			y.until("inq", fmt.Sprint(len(data)))
			p.end(1, unix.SIGINT)
			x.calls("close", "close")
			y.until("poll", p.hungUp())
			y.calls("read 32768", arrived, "read 10", `0 ""`, "close", "close")
			p.serve(1)
			return "when the driver went"
		}
		x.calls("close", "close")
		y.until("poll", p.hungUp())
		y.calls("read 32768", arrived, "read 10", `0 ""`, "read 10", `0 ""`, "close", "close")
	}
	return fmt.Sprintf("after %d bytes, both ways", len(data))
}

func (p *portPair) readWaits() string {
	p.open(p.port(plainPort))
	for _, xy := range p.ends() {
		x, y := xy[0], xy[1]
		x.calls("nonblock on", "nonblock", "read 10", "EAGAIN", "nonblock off", "nonblock")
		x.tell("read 10")
		p.sleeps(x, inCall)
		y.calls("write hello", "5")
		x.ends(`5 "hello"`)
	}
	p.closeBoth()
	return "waits; EAGAIN; both ways"
}

// fill writes until the other side takes no more.
func (p *portPair) fill(y *talker) {
	y.calls("nonblock on", "nonblock")
	y.until("fill", "ENOSPC") // from EAGAIN on
}

// drain reads in one guest what was written in the other one, up to a mark.
func (p *portPair) drain(x, y *talker) {
	x.tell("skip")
	y.until("write !", "1")
	x.ends(`"!"`)
	y.calls("nonblock off", "nonblock")
}

func (p *portPair) noSpace() string {
	p.open(p.port(limitedPort))
	for _, xy := range p.ends() {
		x, y := xy[0], xy[1]
		p.fill(y)
		y.calls("poll", "", "write x", "ENOSPC", "nonblock off", "nonblock")
		if p.wire == original {
			y.calls("write x", "ENOSPC") // it was told
			y.calls("nonblock on", "nonblock")
			p.drain(x, y)
			continue
		}
		y.tell("write x")
		p.sleeps(y, inCall)
		x.calls("skip", `"x"`)
		y.ends("1")
		y.until("poll", "OUT")
	}
	p.closeBoth()
	if p.wire == original {
		return "ENOSPC, told; then released"
	}
	return "ENOSPC without waiting; else waits; then released"
}

func (p *portPair) limit() string {
	most := limitedSize
	if p.wire == original {
		most += 256 << 10 // may be under way
	}
	p.open(p.port(limitedPort))
	found := 0
	for _, xy := range p.ends() {
		x, y := xy[0], xy[1]
		p.fill(y)
		n, err := strconv.Atoi(x.call("inq"))
		if p.err == nil && (err != nil || n < limitedSize || n > most) {
			p.failf("%d bytes are unread (%w), expected %d to %d", n, err, limitedSize, most)
		}
		found = max(found, n)
		p.drain(x, y)
	}
	p.closeBoth()
	return fmt.Sprintf("%d unread, of %d", found, limitedSize)
}
