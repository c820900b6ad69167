package ports

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/ivshmemtest"
	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/virtio"
	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// hostile is a device that says what it is told to on its control queue, in the
// bytes of the multiport interface.
type hostile struct {
	mu      sync.Mutex
	session *virtio.Session
	ctx     context.Context
	ready   chan uint32 // PORT_READY of these ports
}

func newHostile(t *testing.T, ports uint32) (*hostile, *console.Driver) {
	t.Helper()
	p := ivshmemtest.Peers(t, link.Config{Peers: 2, Vectors: 2, Protocol: 0x8003, ReadWrite: 8 << 20})
	h := &hostile{ready: make(chan uint32, 1000)}
	started := make(chan struct{})
	d := virtio.Device{ID: 3, Features: 1 << 1, Config: make([]byte, 12)}
	binary.LittleEndian.PutUint32(d.Config[4:], ports) // max_nr_ports
	for range 2 * (ports + 1) {
		d.Queues = append(d.Queues, 4)
	}
	d.Run = func(ctx context.Context, s *virtio.Session) error {
		h.session, h.ctx = s, ctx
		for first := true; ; {
			c, err := s.Queue(3).Next(ctx)
			if err != nil {
				return err
			}
			var b [8]byte
			c.Read(b[:])
			s.Queue(3).Push(c, 0)
			switch event := binary.LittleEndian.Uint16(b[4:]); {
			case event == 0 && first: // DEVICE_READY
				first = false
				close(started)
			case event == 3: // PORT_READY
				h.ready <- binary.LittleEndian.Uint32(b[:])
			}
		}
	}
	back, err := virtio.NewBackEnd(p[0], d)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- back.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-served
	})
	opening, cancelOpening := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancelOpening()
	driver, err := console.Open(opening, p[1], console.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { driver.Close() })
	<-started
	return h, driver
}

// say sends a control message.
func (h *hostile) say(t *testing.T, port uint32, event uint16, payload string) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	c, err := h.session.Queue(2).Next(h.ctx)
	if err != nil {
		t.Fatal(err)
	}
	b := binary.LittleEndian.AppendUint32(nil, port)
	b = binary.LittleEndian.AppendUint16(b, event)
	b = binary.LittleEndian.AppendUint16(b, 1)
	n, _ := c.Write(append(b, payload...))
	if err := h.session.Queue(2).Push(c, n); err != nil {
		t.Fatal(err)
	}
}

// add adds a port with a name.
func (h *hostile) add(t *testing.T, port uint32, name string) {
	t.Helper()
	h.say(t, port, 1, "") // PORT_ADD
	for <-h.ready != port {
	}
	if name != "" {
		h.say(t, port, 7, name) // PORT_NAME
	}
}

// Whatever a device calls its ports, they are files of their own in the
// directory, and nothing else is touched.
func TestHostileNames(t *testing.T) {
	t.Parallel()
	top := tempDir(t)
	dir := filepath.Join(top, "in", "ports")
	h, driver := newHostile(t, 12)
	s := serve(t, driver, Config{Dir: dir})
	names := []string{"..", "../../out", "/etc/x", ".control", strings.Repeat("\xff", 4000), strings.Repeat("../", 1000), "\x1b]0;x\a\n", "", "port-7", "twin", "twin", "twin"}
	for id, name := range names {
		h.add(t, uint32(id), name)
		// Which of the twins comes first is what counts.
		s.wait(fileOf(id, name), there)
	}
	all, err := os.ReadDir(dir)
	if err != nil || len(all) != len(names)+1 {
		t.Errorf("%d files, %v, want %d and %s", len(all), err, len(names), ControlFile)
	}
	for _, st := range s.List() {
		if st.Error != "" || filepath.Dir(st.Path) != dir || st.Name != names[st.Number] {
			t.Errorf("%+v", st)
		}
		s.dial(filepath.Base(st.Path))
	}
	if all, err := os.ReadDir(top); err != nil || len(all) != 1 {
		t.Error(all, err)
	}
	// Ports that come and go all the time, with the same names or others.
	for i := range 50 {
		h.say(t, 11, 2, "") // PORT_REMOVE
		h.add(t, 11, []string{"twin", "other", ".."}[i%3])
	}
	s.wait(fileOf(11, "other"), there)
	h.say(t, 9, 2, "") // the twin that has the name
	s.wait("twin#10", there)
	for {
		if _, err := os.Lstat(filepath.Join(dir, "twin")); errors.Is(err, os.ErrNotExist) {
			break
		}
		time.Sleep(time.Millisecond)
	}
}

func fileOf(id int, name string) string {
	if name == "twin" && id > 9 {
		return "twin#" + map[int]string{10: "10", 11: "11"}[id]
	}
	return File(name, uint32(id))
}

// A name that comes late moves the port, but not under a program.
func TestLateName(t *testing.T) {
	t.Parallel()
	h, driver := newHostile(t, 4)
	s := serve(t, driver, Config{})
	h.add(t, 3, "")
	c := s.dial("port-3")
	s.wait("port-3", hereOpen)
	h.say(t, 3, 7, "late") // PORT_NAME
	s.wait("port-3", func(s Status) bool { return s.Name == "late" })
	h.add(t, 2, "other") // the service has looked since then
	s.wait("other", there)
	s.wait("port-3", hereOpen)
	c.Close()
	s.dial("late")
	if _, err := os.Lstat(s.path("port-3")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// A name that comes with the port is the only one that its file ever had.
func TestNameInTime(t *testing.T) {
	t.Parallel()
	h, driver := newHostile(t, 8)
	s := serve(t, driver, Config{})
	for id := range uint32(8) {
		h.add(t, id, "x"+string(rune('0'+id)))
	}
	s.wait("x7", there)
	for _, path := range s.readied() {
		if strings.Contains(path, "port-") {
			t.Error(path)
		}
	}
}
