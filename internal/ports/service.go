// Package ports makes the ports of a virtio console into files that any program
// can open: a Unix socket, a pseudo-terminal, or a character device for each,
// under its name in one directory.
package ports

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// Console is one side of a console: a *console.Device or *console.Driver.
type Console interface {
	Ports() []*console.Port
	Changes() <-chan struct{}
}

// Maker is the side that has the ports: a *console.Device.
type Maker interface {
	AddPort(console.PortConfig) (*console.Port, error)
	RemovePort(*console.Port) error
	Resize(*console.Port, console.Size) error
}

var (
	// ErrNotHere says that the other side has the ports.
	ErrNotHere = errors.New("this is the driver's side: ports are added, removed and renamed on the device's")
	// ErrNoPort says that there is no port with a name.
	ErrNoPort = fmt.Errorf("no such port: %w", syscall.ENOENT)
)

// Form is what a port is made into.
type Form string

const (
	Socket Form = "socket" // a Unix stream socket
	PTY    Form = "pty"    // a symbolic link to a pseudo-terminal
	Char   Form = "char"   // a symbolic link to a character device
)

// Settings are what this side wants of a port.
type Settings struct {
	Form  Form // empty: Socket
	Cache bool // keeps unread data for the next program
	Limit int  // of unread data in bytes; 0: that of the console
}

// Config is how a service is.
type Config struct {
	Dir string
	// Settings are those of ports by their names, which is port-N for a port N that
	// has none, and Others those of the rest.
	Settings map[string]Settings
	Others   Settings
	// Ready and Gone are told the path of a port that can be opened, and that
	// cannot any more.
	Ready, Gone func(path string)
	// Failed is told what is wrong with a port.
	Failed func(error)
}

// Status is what there is to know of a port.
type Status struct {
	Name      string `json:"name"`
	Number    uint32 `json:"number"`
	Console   bool   `json:"console"`
	OpenHere  bool   `json:"open_here"`
	OpenThere bool   `json:"open_there"`
	Unread    int    `json:"unread"`
	Throttled bool   `json:"throttled"`
	Form      Form   `json:"form"`
	Path      string `json:"path"`
	Error     string `json:"error,omitempty"`
}

// grace is how long a port of the driver's side may take to get its name: it
// comes a moment after the port.
const grace = 200 * time.Millisecond

// Service is a directory of ports.
type Service struct {
	config Config
	dir    *directory
	abs    string        // the directory, from everywhere
	poke   chan struct{} // a program left
	runs   sync.WaitGroup

	mu sync.Mutex
	// Below: with mu held.
	console  Console
	settings map[string]Settings
	entries  map[*console.Port]*entry
	changed  chan struct{} // closed when an entry changes
}

// entry is a port in the directory.
type entry struct {
	port     *console.Port
	settings Settings
	since    time.Time // it is known
	file     string    // empty: not yet
	cancel   context.CancelFunc
	done     chan struct{} // nobody can open it any more
	ready    bool          // it can be opened
	err      error         // why it cannot
}

// New takes a directory. It fails where another service has it.
func New(c Config) (*Service, error) {
	abs, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, err
	}
	dir, err := openDirectory(c.Dir)
	if err != nil {
		return nil, err
	}
	s := &Service{config: c, dir: dir, abs: abs, settings: map[string]Settings{}, poke: make(chan struct{}, 1)}
	for name, set := range c.Settings {
		s.settings[name] = set
	}
	return s, nil
}

// Control is the listener on the directory's ControlFile, for who answers there.
func (s *Service) Control() *net.UnixListener { return s.dir.control }

// Close gives the directory back. Run has ended before.
func (s *Service) Close() { s.dir.close() }

// Use says of which console the ports are, until the end of Run.
func (s *Service) Use(c Console) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.console, s.entries = c, map[*console.Port]*entry{}
}

// Run makes the ports into files until the context ends.
func (s *Service) Run(ctx context.Context) {
	s.mu.Lock()
	c := s.console
	s.mu.Unlock()
	for ctx.Err() == nil {
		changed := c.Changes()
		wait := s.follow(ctx, c.Ports())
		var later <-chan time.Time
		if wait > 0 {
			later = time.After(wait)
		}
		select {
		case <-changed:
		case <-s.poke:
		case <-later:
		case <-ctx.Done():
		}
	}
	s.follow(ctx, nil)
	s.runs.Wait()
	s.mu.Lock()
	s.console = nil
	s.mu.Unlock()
}

// follow brings the directory in line with the ports. It returns when it wants
// to be called again, if nothing happens before.
func (s *Service) follow(ctx context.Context, all []*console.Port) (again time.Duration) {
	var gone []*entry
	s.mu.Lock()
	there := map[*console.Port]bool{}
	for _, p := range all {
		there[p] = true
	}
	for p, e := range s.entries {
		if !there[p] {
			gone = append(gone, e)
			delete(s.entries, p)
		}
	}
	s.mu.Unlock()
	for _, e := range gone {
		if e.settings.Form != Char {
			s.end(e)
		} else if e.done != nil {
			<-e.done // who has it open is told by the device
		}
	}
	for _, p := range all {
		again = max(again, s.show(ctx, p))
	}
	s.change()
	return again
}

// show makes a file of a port, unless it is there, or has to wait.
func (s *Service) show(ctx context.Context, p *console.Port) (wait time.Duration) {
	name := p.Name()
	s.mu.Lock()
	e := s.entries[p]
	if e == nil {
		e = &entry{port: p, since: time.Now()}
		s.entries[p] = e
	}
	_, maker := s.console.(Maker)
	file := s.free(name, e)
	set := s.settingsOf(p)
	s.mu.Unlock()
	switch {
	case e.file == file:
		return 0
	case e.file != "" && p.InUse():
		return 0 // it got a name, but has to wait for who is there
	case e.file != "":
		s.end(e)
	case name == "" && !maker:
		if wait := grace - time.Since(e.since); wait > 0 {
			return wait
		}
	}
	if set.Cache != e.settings.Cache { // else the other side's word holds
		p.SetCache(set.Cache)
	}
	if set.Limit != 0 {
		if err := p.SetLimit(set.Limit); err != nil {
			s.config.Failed(err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	s.mu.Lock()
	e.file, e.settings, e.cancel, e.done = file, set, cancel, make(chan struct{})
	s.mu.Unlock()
	s.runs.Go(func() {
		defer cancel() // nobody else does when it ends by itself
		s.run(ctx, e)
	})
	return 0
}

// settingsOf are the settings of a port. The caller holds mu.
func (s *Service) settingsOf(p *console.Port) Settings {
	name := p.Name()
	if name == "" {
		name = File("", p.ID())
	}
	set, ok := s.settings[name]
	if !ok {
		set = s.config.Others
	}
	if set.Form == "" {
		set.Form = Socket
	}
	return set
}

// free is the name of the file for a port, which no other has. The caller holds
// mu.
func (s *Service) free(name string, e *entry) string {
	file := File(name, e.port.ID())
	for _, other := range s.entries {
		if other != e && other.file == file {
			return fmt.Sprintf("%s#%d", file, e.port.ID())
		}
	}
	return file
}

// path is a port's file, from everywhere.
func (s *Service) path(e *entry) string { return filepath.Join(s.abs, e.file) }

// run serves the programs of a port.
func (s *Service) run(ctx context.Context, e *entry) {
	path, done := s.path(e), e.done
	// gone takes note that nobody can open it any more.
	gone := sync.OnceFunc(func() {
		s.mu.Lock()
		was := e.ready
		e.ready = false
		s.mu.Unlock()
		if was {
			s.config.Gone(path)
		}
		close(done)
		s.change()
	})
	defer gone()
	failed := func(err error) { s.config.Failed(fmt.Errorf("port %s: %w", e.file, err)) }
	d := &Door{
		// A relative path may be the one that is short enough for a socket.
		Port: e.port, Path: filepath.Join(s.config.Dir, e.file), Cache: e.settings.Cache, Failed: failed,
		Ready: func(string) {
			s.mu.Lock()
			first := !e.ready
			e.ready = true
			s.mu.Unlock()
			if first {
				s.config.Ready(path)
				s.change()
			}
		},
		Gone: gone,
		Left: func() {
			select {
			case s.poke <- struct{}{}:
			default:
			}
		},
	}
	s.mu.Lock()
	if m, ok := s.console.(Maker); ok {
		d.Resize = m.Resize
	}
	s.mu.Unlock()
	var err error
	switch e.settings.Form {
	case Socket:
		err = d.Socket(ctx)
	case PTY:
		err = d.PTY(ctx)
	case Char:
		err = d.Char(ctx)
	default:
		err = fmt.Errorf("form %q: expected socket, pty or char", e.settings.Form)
	}
	if ctx.Err() != nil || s.isGone(e.port) {
		return
	}
	s.mu.Lock()
	e.err = err
	s.mu.Unlock()
	failed(err)
}

// isGone reports whether a port was removed.
func (s *Service) isGone(p *console.Port) bool {
	s.mu.Lock()
	c := s.console
	s.mu.Unlock()
	for _, other := range c.Ports() {
		if other == p {
			return false
		}
	}
	return true
}

// end takes a port's file away.
func (s *Service) end(e *entry) {
	if e.cancel == nil {
		return
	}
	e.cancel()
	<-e.done
	s.mu.Lock()
	defer s.mu.Unlock()
	e.file, e.cancel, e.err = "", nil, nil
}

// change wakes who waits for entries.
func (s *Service) change() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// until waits for a condition, which is asked with mu held.
func (s *Service) until(ctx context.Context, f func() bool) error {
	for {
		s.mu.Lock()
		ok := f()
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		changed := s.changed
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
