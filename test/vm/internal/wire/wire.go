// Package wire is what the host and the init program of a test guest say to
// each other over one virtio-serial port.
//
// A session starts with a token in each direction: the guest repeats its own
// until it gets the host's. Both discard everything before the token, so a
// guest that was reset in the middle of a message starts a clean session on
// the same byte stream. After that only frames travel.
//
// A frame is the payload's length (4 bytes), a command's number (4 bytes),
// both little-endian, the type (1 byte) and the payload. At most one data
// frame per stream (stdin, stdout, stderr) of a command is unacknowledged, so
// no reader has to buffer more than that and none can block another command.
package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Port is the name of the virtio-serial port in the guest
// (/sys/class/virtio-ports/*/name).
const Port = "ivshmem.test"

// TokenSize is the size of a session token in bytes.
const TokenSize = 16

// MaxPayload bounds the payload of one frame in bytes.
const MaxPayload = 256 << 10

const headerSize = 9

// Type tells what a frame's payload is.
type Type uint8

// Frame types.
const (
	Ready  Type = iota + 1 // guest to host, once per session: JSON Status, Error says what failed at boot
	Start                  // host to guest: JSON Command
	Stdin                  // host to guest: data; empty at the end of input
	Signal                 // host to guest: one byte, the signal's number, for the command's process group
	Stdout                 // guest to host: data
	Stderr                 // guest to host: data
	Ack                    // either way: one byte, the Type of the data frame that was consumed
	Exit                   // guest to host, the last frame of a command: JSON Status
)

// Command is the payload of Start.
type Command struct {
	Argv  []string
	Env   []string // KEY=value, added to the environment of init
	Dir   string   // "" is /root
	Stdin bool     // false: /dev/null
}

// Status is the payload of Exit and of Ready.
type Status struct {
	Code   int    // exit status, if Signal is 0
	Signal int    // the signal that ended the process, or 0
	Error  string // why the command could not be started, or ""
}

// Boot is what init reads from the initramfs, as JSON in BootFile.
type Boot struct {
	GuestToken, HostToken []byte
	Hostname              string
	Env                   []string
	Modules               []string // files below /lib/modules/RELEASE in load order
	Driver                string   // bound to every ivshmem device; "" for none
}

// BootFile is the path of the Boot structure in the guest.
const BootFile = "/etc/vm.json"

// Frame is one received message.
type Frame struct {
	Type    Type
	ID      uint32
	Payload []byte
}

// ErrClosed is the error of a Send after Close.
var ErrClosed = errors.New("guest session is closed")

// Conn sends and receives the frames of one session. Sending is safe for
// concurrent use.
type Conn struct {
	r      io.Reader
	mu     sync.Mutex
	w      io.Writer
	closed bool
}

// NewConn returns a session on a stream whose tokens have been exchanged.
func NewConn(r io.Reader, w io.Writer) *Conn { return &Conn{r: r, w: w} }

// Close makes later calls of Send fail and waits for one that is under way:
// afterwards nothing of this session can get into the next.
func (c *Conn) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
}

// Send writes one frame.
func (c *Conn) Send(t Type, id uint32, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("frame of %d bytes, at most %d allowed", len(payload), MaxPayload)
	}
	b := make([]byte, headerSize, headerSize+len(payload))
	binary.LittleEndian.PutUint32(b, uint32(len(payload)))
	binary.LittleEndian.PutUint32(b[4:], id)
	b[8] = byte(t)
	b = append(b, payload...)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	_, err := c.w.Write(b)
	return err
}

// SendJSON writes one frame whose payload is v as JSON.
func (c *Conn) SendJSON(t Type, id uint32, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.Send(t, id, b)
}

// Receive reads one frame.
func (c *Conn) Receive() (Frame, error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(c.r, h[:]); err != nil {
		return Frame{}, err
	}
	n := binary.LittleEndian.Uint32(h[:])
	if n > MaxPayload {
		return Frame{}, fmt.Errorf("frame announces %d bytes, at most %d allowed", n, MaxPayload)
	}
	f := Frame{Type: Type(h[8]), ID: binary.LittleEndian.Uint32(h[4:]), Payload: make([]byte, n)}
	_, err := io.ReadFull(c.r, f.Payload)
	return f, err
}

// SkipPast reads r up to and including the first occurrence of token.
func SkipPast(r io.ByteReader, token []byte) error {
	window := make([]byte, 0, len(token))
	for {
		b, err := r.ReadByte()
		if err != nil {
			return err
		}
		if len(window) == len(token) {
			copy(window, window[1:])
			window = window[:len(token)-1]
		}
		window = append(window, b)
		if bytes.Equal(window, token) {
			return nil
		}
	}
}
