package vnet

import (
	"fmt"
	"strings"
	"testing"
)

func TestStates(t *testing.T) {
	const unknown, most = 4, 1<<32 - 1
	for _, c := range []struct {
		own, peer State
		up, notUp State
	}{
		{0, 0, 1, 1}, {0, 1, 1, 1}, {0, 2, 0, 0}, {0, 3, 0, 0}, {0, unknown, 0, 0}, {0, most, 0, 0},
		{1, 0, 1, 1}, {1, 1, 2, 2}, {1, 2, 2, 2}, {1, 3, 2, 2}, {1, unknown, 2, 2}, {1, most, 2, 2},
		{2, 0, 0, 0}, {2, 1, 2, 2}, {2, 2, 3, 2}, {2, 3, 3, 2}, {2, unknown, 2, 2}, {2, most, 2, 2},
		{3, 0, 0, 0}, {3, 1, 3, 3}, {3, 2, 3, 3}, {3, 3, 3, 3}, {3, unknown, 3, 3}, {3, most, 3, 3},
	} {
		if got := c.own.next(c.peer, true); got != c.up {
			t.Errorf("%v, up, peer %v: %v, want %v", c.own, c.peer, got, c.up)
		}
		if got := c.own.next(c.peer, false); got != c.notUp {
			t.Errorf("%v, down, peer %v: %v, want %v", c.own, c.peer, got, c.notUp)
		}
	}
	for s, want := range map[State]string{0: "RESET", 1: "INIT", 2: "READY", 3: "RUN", 4: "4"} {
		if b, err := s.MarshalText(); string(b) != want || err != nil {
			t.Errorf("%s, %v, want %s", b, err, want)
		}
	}
}

// machine is what a peer keeps.
type machine struct {
	state State
	up    bool
	seen  uint64 // the other's state when it was last looked at, or unseen
}

// unseen is no state.
const unseen = 1 << 32

// A kind of peer is how it sees the other's state, is brought up, and taken
// down. It reports whether it looks once more.
type kind struct {
	name string
	see  func(m *machine, peer State) (again bool)
	up   func(*machine)
	down func(*machine)
	// slow says that it goes down only after both have seen each other's last
	// state.
	slow bool
}

var own = kind{
	name: "own",
	see: func(m *machine, peer State) bool {
		before := m.state
		m.state = before.next(peer, m.up)
		return m.state != before
	},
	up:   func(m *machine) { m.up = true },
	down: func(m *machine) { m.up, m.state = false, 0 },
}

// linux is the machine of the Linux driver: it remembers what it saw across its
// own way down.
var linux = kind{
	name: "Linux",
	see: func(m *machine, peer State) bool {
		if m.seen == uint64(peer) {
			return false
		}
		m.seen = uint64(peer)
		switch {
		case m.state == 0 && peer < 2:
			m.state = 1
		case m.state == 1 && peer > 0:
			m.state = 2
		case m.state >= 2 && peer == 0:
			m.state = 0
		case m.state == 2 && peer >= 2 && m.up:
			m.state = 3
		}
		return false
	},
	up: func(m *machine) {
		m.up = true
		if m.state == 2 && (m.seen == 2 || m.seen == 3) {
			m.state = 3
		}
	},
	down: func(m *machine) { m.up, m.state = false, 0 },
}

// zephyr looks at the state at every wake-up, whether it changed or not.
var zephyr = kind{
	name: "Zephyr",
	see: func(m *machine, peer State) bool {
		switch {
		case m.state == 0 && peer < 2:
			m.state = 1
		case m.state == 1 && peer != 0:
			m.state = 2
		case m.state >= 2 && peer == 0:
			m.state = 0
		case m.state == 2 && (peer == 2 || peer == 3) && m.up:
			m.state = 3
		case m.state == 3 && (peer == 2 || peer == 3) && !m.up:
			m.state = 0
		}
		return false
	},
	up:   func(m *machine) { m.up = true },
	down: func(m *machine) { m.up = false },
}

// side is one peer of the exploration.
type side struct {
	machine
	table   State // what the State Table says
	pending bool  // an interrupt, or a reason of its own to look
	loading bool  // it has loaded a state, and not acted upon it
	loaded  State
	ops     int  // how often it may yet go down, up, or die
	running bool // reads the other's section
	read    bool // has done so since that was cleared
	written bool // has run since its section was cleared
}

type sides [2]side

// explore walks all that two peers can do in any order, and returns the shortest
// ways to what must not be.
func explore(kinds [2]kind) (visited int, faults map[string]string) {
	faults = map[string]string{}
	type step struct {
		from sides
		who  int
		what string
	}
	var start sides
	for i := range start {
		start[i] = side{machine: machine{up: true, seen: unseen}, pending: true, ops: 2}
	}
	seen := map[sides]step{start: {}}
	queue := []sides{start}
	tell := func(s step, to State) string {
		return fmt.Sprintf(", %s %d %s: %v", kinds[s.who].name, s.who, s.what, to)
	}
	way := func(s sides) (how string) {
		for s != start {
			from := seen[s]
			how = tell(from, s[from.who].state) + how
			s = from.from
		}
		return how
	}
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		fault := func(what string, last ...string) {
			if faults[what] == "" {
				faults[what] = way(n) + strings.Join(last, "")
			}
		}
		try := func(i int, what string, f func(me, other *side)) {
			next := n
			me, other := &next[i], &next[1-i]
			f(me, other)
			if me.state != me.table {
				if me.state == StateReady { // it has cleared its section
					if other.running && me.written {
						fault("cleared while it is read", tell(step{n, i, what}, me.state))
					}
					other.read, me.written = false, false
				}
				if me.state == StateRun {
					if me.read && other.written {
						fault("read once more from the start", tell(step{n, i, what}, me.state))
					}
					me.running, me.read, me.written = true, true, true
				}
				if me.state < StateReady {
					me.running = false
				}
				me.table, other.pending = me.state, true
			}
			if _, known := seen[next]; !known {
				seen[next] = step{n, i, what}
				queue = append(queue, next)
			}
		}
		settled := !n[0].pending && !n[0].loading && !n[1].pending && !n[1].loading
		for i, s := range n {
			if s.loading { // it holds its lock
				try(i, "acts", func(me, _ *side) {
					me.pending = kinds[i].see(&me.machine, me.loaded) || me.pending
					me.loading, me.loaded = false, 0
				})
				continue
			}
			if s.pending {
				try(i, "loads", func(me, other *side) { me.pending, me.loading, me.loaded = false, true, other.table })
			}
			if s.ops > 0 && !(kinds[i].slow && !settled) {
				try(i, "goes down", func(me, _ *side) { me.ops--; kinds[i].down(&me.machine); me.pending = true })
			}
			if s.ops > 0 {
				try(i, "goes up", func(me, _ *side) { me.ops--; kinds[i].up(&me.machine); me.pending = true })
				try(i, "dies", func(me, _ *side) {
					me.ops--
					me.machine = machine{up: true, seen: unseen}
					me.running, me.pending = false, true
				})
			}
		}
		switch a, b := n[0], n[1]; {
		case !settled:
		case a.state < StateReady || b.state < StateReady:
			fault("both wait for ever")
		case a.up && b.up && (a.state != StateRun || b.state != StateRun):
			fault("both are up, and do not run")
		}
	}
	return len(seen), faults
}

// TestExploreStates explores all orders in which two peers can see each other's
// states, go down, up, and die.
func TestExploreStates(t *testing.T) {
	// Linux waits for ever if it goes down while one of the two has not seen that
	// the other went on, whatever the other does then.
	slowLinux := linux
	slowLinux.slow = true
	for _, peer := range []kind{own, slowLinux, zephyr} {
		n, faults := explore([2]kind{own, peer})
		t.Logf("with %s: %d states", peer.name, n)
		for what, how := range faults {
			t.Errorf("with %s: %s%s", peer.name, what, how)
		}
	}
	// Two Linux peers may wait for each other for ever: the exploration finds
	// what it looks for.
	_, faults := explore([2]kind{linux, linux})
	t.Logf("Linux with Linux%s", faults["both wait for ever"])
	if faults["both wait for ever"] == "" {
		t.Error("Linux with Linux: nothing found")
	}
}
