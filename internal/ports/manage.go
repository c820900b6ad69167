package ports

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// List are the ports there are, by number.
func (s *Service) List() []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := []Status{}
	if s.console == nil {
		return all
	}
	for _, p := range s.console.Ports() {
		st := Status{
			Name: p.Name(), Number: p.ID(), Console: p.Console(), OpenHere: p.InUse(), OpenThere: p.PeerOpen(),
			Unread: p.Unread(), Throttled: p.Throttled(),
		}
		if e := s.entries[p]; e != nil && (e.ready || e.err != nil) {
			st.Form, st.Path = e.settings.Form, s.path(e)
			if e.err != nil {
				st.Error = e.err.Error()
			}
		}
		all = append(all, st)
	}
	return all
}

// maker is the side that has the ports, if it is this one.
func (s *Service) maker() (Maker, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m, ok := s.console.(Maker); ok {
		return m, nil
	}
	return nil, ErrNotHere
}

// find is the port with a name, or with a file of that name.
func (s *Service) find(name string) (*console.Port, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.console != nil {
		for _, p := range s.console.Ports() {
			if name != "" && p.Name() == name {
				return p, nil
			}
		}
		for p, e := range s.entries {
			if e.file != "" && e.file == name {
				return p, nil
			}
		}
	}
	return nil, fmt.Errorf("%q: %w", name, ErrNoPort)
}

// Add adds a port with settings of its own, unless they are nil, and returns the
// path when it can be opened.
func (s *Service) Add(ctx context.Context, c console.PortConfig, set *Settings) (path string, err error) {
	m, err := s.maker()
	if err != nil {
		return "", err
	}
	return s.add(ctx, m, c, set)
}

func (s *Service) add(ctx context.Context, m Maker, c console.PortConfig, set *Settings) (path string, err error) {
	s.mu.Lock()
	old, had := s.settings[c.Name]
	s.set(c.Name, set) // before it is seen
	s.mu.Unlock()
	p, err := m.AddPort(c)
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.set(c.Name, nil)
		if had {
			s.set(c.Name, &old)
		}
		return "", err
	}
	e := s.until(ctx, func() bool {
		e := s.entries[p]
		if e == nil || !e.ready && e.err == nil {
			return false
		}
		path, err = s.path(e), e.err
		return true
	})
	return path, errors.Join(err, e)
}

// set sets or forgets the settings of a port. The caller holds mu.
func (s *Service) set(name string, set *Settings) {
	if set == nil {
		delete(s.settings, name)
	} else {
		s.settings[name] = *set
	}
}

// Remove removes a port, and whoever has it open loses it.
func (s *Service) Remove(ctx context.Context, name string) error {
	m, err := s.maker()
	if err != nil {
		return err
	}
	p, err := s.find(name)
	if err != nil {
		return err
	}
	return s.remove(ctx, m, p)
}

func (s *Service) remove(ctx context.Context, m Maker, p *console.Port) error {
	if err := m.RemovePort(p); err != nil {
		return err
	}
	s.mu.Lock()
	s.set(p.Name(), nil)
	s.mu.Unlock()
	return s.until(ctx, func() bool { return s.entries[p] == nil })
}

// Rename gives a port another name: since Linux takes no second name for a port,
// it is removed and added again, and unread data is dropped. It must not be open
// on this side.
func (s *Service) Rename(ctx context.Context, name, to string) (path string, err error) {
	m, err := s.maker()
	if err != nil {
		return "", err
	}
	p, err := s.find(name)
	if err != nil {
		return "", err
	}
	if _, err := s.find(to); err == nil || to == "" {
		return "", fmt.Errorf("%q: expected the name of no port: %w", to, syscall.EEXIST)
	}
	if p.InUse() {
		return "", console.ErrBusy
	}
	s.mu.Lock()
	set := s.settingsOf(p)
	s.mu.Unlock()
	c := console.PortConfig{Name: p.Name(), Console: p.Console()}
	if err := s.remove(ctx, m, p); err != nil {
		return "", err
	}
	old := c.Name
	c.Name = to
	path, err = s.add(ctx, m, c, &set)
	if err != nil {
		c.Name = old
		if _, again := s.add(ctx, m, c, &set); again != nil {
			err = errors.Join(err, again)
		}
	}
	return path, err
}

// Resize tells the other side the size of a console's window.
func (s *Service) Resize(name string, size console.Size) error {
	m, err := s.maker()
	if err != nil {
		return err
	}
	p, err := s.find(name)
	if err != nil {
		return err
	}
	return m.Resize(p, size)
}
