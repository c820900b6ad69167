package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/stream"
	"github.com/ivshmem-go/ivshmem/test/vm"
)

// A transfer is a sequence of records: number, length and content follow from
// the number. The receiver keeps each of them (here: how many it has) before it
// acknowledges; a new connection goes on behind the last one that was kept.
const (
	streamsRecord = 40 << 10 // the most bytes of a record
	streamsHeader = 8        // its number
	// What the receiver forgets at most when it is sabotaged: it acknowledges
	// before it keeps.
	streamsForgets = 1000
	streamsSide    = "streams-side"
)

// streams kills two host processes at random moments while one sends to the
// other over streams, and starts them again.
func streams(ctx context.Context, r *Report) error {
	service, err := vm.Serve(ctx, nil, "--socket-per-peer", "--protocol", "0x5354", "--vectors", "2", "--rw", "0", "--output", "2M", "--quiet")
	if err != nil {
		return err
	}
	defer service.Close()
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	t := &transfer{report: r, socket: service.Socket, dir: dir}
	defer t.stop()
	for id := range t.sides {
		if err := t.start(id); err != nil {
			return err
		}
	}
	if err := t.run(ctx); err != nil {
		return err
	}
	t.stop()
	kept, acked := t.kept(), t.acked()
	total := uint64(0)
	for n := range kept.records {
		total += uint64(recordSize(n))
	}
	if total != kept.bytes {
		r.Failures = append(r.Failures, fmt.Sprintf("%d records were kept, with %d bytes, expected %d", kept.records, kept.bytes, total))
	}
	if acked.records > kept.records {
		r.Failures = append(r.Failures, fmt.Sprintf("%d records were acknowledged, and %d kept", acked.records, kept.records))
	}
	enough := 10.0
	if !r.Quick {
		enough = r.Duration.Seconds()
	}
	r.atLeast("kills", float64(t.kills), enough)
	r.atLeast("records", float64(kept.records), 1)
	r.atLeast("bytes", float64(kept.bytes), 1)
	r.info("MB/s", float64(kept.bytes)/1e6/t.took.Seconds())
	r.atLeast("connections", float64(acked.connections), 2)
	r.atLeast("resumptions", float64(acked.resumptions), 1)
	r.info("longest time from a kill to the next record, ms", float64(t.slowest.Microseconds())/1e3)
	return nil
}

// transfer is both sides as the campaign sees them.
type transfer struct {
	report      *Report
	socket, dir string
	sides       [2]*vm.Child // the sender, the receiver
	log         lockedBuffer
	kills       int
	slowest     time.Duration
	took        time.Duration
}

type lockedBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *lockedBuffer) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.String()
}

func (t *transfer) start(id int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, streamsSide, strconv.Itoa(id), t.socket+"."+strconv.Itoa(id), t.dir,
		strconv.FormatUint(t.report.rand.Uint64(), 10), strconv.FormatBool(t.report.Sabotage))
	cmd.Stderr = &t.log
	t.sides[id], err = vm.StartChild(cmd)
	return err
}

func (t *transfer) stop() {
	for i, c := range t.sides {
		if c != nil {
			c.Kill()
			t.sides[i] = nil
		}
	}
}

func (t *transfer) kept() progress  { return readProgress(filepath.Join(t.dir, "kept")) }
func (t *transfer) acked() progress { return readProgress(filepath.Join(t.dir, "acked")) }

// run kills until the time is up; what comes last is a transfer that goes on.
func (t *transfer) run(ctx context.Context) error {
	begin := time.Now()
	defer func() { t.took = time.Since(begin) }()
	for {
		if err := t.advance(ctx); err != nil {
			return err
		}
		if time.Since(begin) >= t.report.Duration {
			return nil
		}
		select {
		case <-time.After(time.Duration(t.report.rand.IntN(150)) * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		which := 1 + t.report.rand.IntN(3) // one, the other, both
		for id, c := range t.sides {
			if which&(1<<id) != 0 {
				c.Kill()
				t.kills++
			}
		}
		for id := range t.sides {
			if which&(1<<id) != 0 {
				if err := t.start(id); err != nil {
					return err
				}
			}
		}
	}
}

// advance waits for some more records.
func (t *transfer) advance(ctx context.Context) error {
	from, begin := t.kept().records, time.Now()
	for t.kept().records < from+10 {
		for id, c := range t.sides {
			select {
			case <-c.Done():
				return fmt.Errorf("side %d ended by itself: %s", id, t.log.text())
			default:
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if time.Since(begin) > patience {
			for _, c := range t.sides {
				c.Signal(syscall.SIGQUIT)
				<-c.Done()
			}
			return fmt.Errorf("the transfer stands still at record %d: %s", from, t.log.text())
		}
		time.Sleep(time.Millisecond)
	}
	t.slowest = max(t.slowest, time.Since(begin))
	return nil
}

// progress is what a side keeps in a file, by one write: it survives the
// process.
type progress struct{ records, bytes, connections, resumptions uint64 }

func readProgress(path string) progress {
	var n [4]uint64
	b, _ := os.ReadFile(path) // nothing yet
	binary.Decode(b, binary.LittleEndian, &n)
	return progress{n[0], n[1], n[2], n[3]}
}

// side is one side of the transfer, in a process of its own.
type side struct {
	id       int
	ep       *stream.Endpoint
	rand     *rand.Rand
	sabotage bool
	block    []byte // what records are made of

	file *os.File
	progress
	forgot int
}

// A side is this program, started again.
func init() {
	if len(os.Args) < 7 || os.Args[1] != streamsSide {
		return
	}
	if err := runSide(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(1)
}

func runSide(args []string) error {
	id, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	seed, err := strconv.ParseUint(args[3], 10, 64)
	if err != nil {
		return err
	}
	s := &side{id: id, rand: rand.New(rand.NewPCG(seed, 1)), sabotage: args[4] == "true", block: make([]byte, 1<<20+streamsRecord)}
	rand.NewChaCha8([32]byte{}).Read(s.block)
	path := filepath.Join(args[2], []string{"acked", "kept"}[id])
	s.progress = readProgress(path)
	if s.file, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	// The service may not have noticed yet that the former process is dead.
	var dev *ivshmem.Device
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if dev, err = ivshmem.Open(args[1]); err == nil {
			break
		}
		if time.Now().After(end) {
			return err
		}
	}
	modes := []stream.Mode{stream.Adaptive, stream.Sleep}
	rings := []uint64{0, 512, 4096, 64 << 10}
	s.ep, err = stream.New(dev, stream.Config{Mode: modes[s.rand.IntN(len(modes))], Ring: rings[s.rand.IntN(len(rings))]})
	if err != nil {
		return err
	}
	if id == 0 {
		return s.send()
	}
	return s.receive()
}

// keep writes what was reached, unless that is what is sabotaged.
func (s *side) keep() error {
	if s.sabotage && s.id == 1 {
		if s.forgot++; s.forgot%streamsForgets != 0 {
			return nil
		}
	}
	b, err := binary.Append(nil, binary.LittleEndian, [4]uint64{s.records, s.bytes, s.connections, s.resumptions})
	if err == nil {
		_, err = s.file.WriteAt(b, 0)
	}
	return err
}

func mix(n uint64) uint64 {
	n = (n ^ n>>30) * 0xbf58476d1ce4e5b9
	n = (n ^ n>>27) * 0x94d049bb133111eb
	return n ^ n>>31
}

// recordSize is the size of a record: most are small.
func recordSize(n uint64) int {
	x := mix(n)
	return streamsHeader + int(x>>8%(streamsRecord-streamsHeader))>>(x%8)
}

func (s *side) record(n uint64, p []byte) []byte {
	p = binary.LittleEndian.AppendUint64(p[:0], n)
	return append(p, s.block[mix(n+1)%(1<<20):][:recordSize(n)-streamsHeader]...)
}

// The ports are two ways to carry records: as messages, or as bytes.
const portMessages, portBytes = 1, 2

// pipe carries records, and numbers the other way.
type pipe struct {
	c        *stream.Conn
	messages bool
}

func (p pipe) write(b []byte) (err error) {
	if p.messages {
		return p.c.Send(b)
	}
	_, err = p.c.Write(b)
	return err
}

// read reads what has n bytes.
func (p pipe) read(b []byte) error {
	if !p.messages {
		_, err := io.ReadFull(p.c, b)
		return err
	}
	n, err := p.c.Receive(b)
	if err == nil && n != len(b) {
		return fmt.Errorf("torn: a message of %d bytes, expected %d", n, len(b))
	}
	return err
}

// severed reports whether an error is what the death of a peer looks like.
func severed(err error) bool {
	for _, e := range []error{syscall.ECONNRESET, syscall.EPIPE, syscall.EHOSTUNREACH, syscall.ECONNREFUSED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (s *side) send() error {
	for resuming := true; ; {
		port := uint32(portMessages + s.rand.IntN(2))
		// Whoever is there answers, if only by dying.
		ctx, cancel := context.WithTimeout(context.Background(), patience/2)
		c, err := s.ep.Dial(ctx, 1, port)
		cancel()
		if err == nil {
			s.connections++
			if resuming {
				s.resumptions++
			}
			err = s.sendOver(pipe{c, port == portMessages})
			c.Close()
		}
		resuming = err != nil
		switch {
		case severed(err):
			time.Sleep(time.Millisecond)
		case err != nil:
			return fmt.Errorf("sender: %w", err)
		}
	}
}

// sendOver sends some records over one connection.
func (s *side) sendOver(p pipe) error {
	var number [8]byte
	if err := p.read(number[:]); err != nil {
		return err
	}
	first := binary.LittleEndian.Uint64(number[:])
	if first < s.records {
		return fmt.Errorf("lost: the receiver has %d records, and acknowledged %d", first, s.records)
	}
	last := first + s.rand.Uint64N(20000)
	next := first
	var sent atomic.Uint64
	acks := make(chan error, 1)
	go func() { // until it has sent its error, the progress is its own
		for {
			var number [8]byte
			if err := p.read(number[:]); err != nil {
				acks <- err
				return
			}
			n := binary.LittleEndian.Uint64(number[:])
			if next++; n != next || n > sent.Load() {
				acks <- fmt.Errorf("%d records are acknowledged, expected %d, and %d were sent", n, next, sent.Load())
				go p.c.Close()
				return
			}
			s.records = n
			if err := s.keep(); err != nil {
				acks <- err
				return
			}
		}
	}()
	b := make([]byte, 0, streamsRecord)
	var err error
	for n := first; n < last && err == nil; n++ {
		sent.Store(n + 1)
		err = p.write(s.record(n, b))
	}
	if err == nil {
		err = p.c.CloseWrite()
	}
	if err != nil {
		p.c.Close()
		if e := <-acks; !severed(e) && !errors.Is(e, net.ErrClosed) && e != io.EOF {
			return e
		}
		return err
	}
	if err := <-acks; err != io.EOF {
		return err
	}
	if next != last {
		return fmt.Errorf("lost: the receiver closed at record %d, expected %d", next, last)
	}
	return nil
}

func (s *side) receive() error {
	conns := make(chan pipe)
	errs := make(chan error, 2)
	for _, port := range []uint32{portMessages, portBytes} {
		l, err := s.ep.Listen(port)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.AcceptStream()
				if err != nil {
					errs <- err
					return
				}
				conns <- pipe{c, port == portMessages}
			}
		}()
	}
	for {
		select {
		case err := <-errs:
			return err
		case p := <-conns:
			err := s.receiveOver(p)
			p.c.Close()
			if err != nil && !severed(err) {
				return fmt.Errorf("receiver: %w", err)
			}
		}
	}
}

func (s *side) receiveOver(p pipe) error {
	b, want := make([]byte, streamsRecord), make([]byte, 0, streamsRecord)
	for {
		if err := p.write(binary.LittleEndian.AppendUint64(nil, s.records)); err != nil {
			return err
		}
		n := recordSize(s.records)
		err := p.read(b[:n])
		if err == io.EOF {
			return nil
		}
		if err == io.ErrUnexpectedEOF {
			return fmt.Errorf("torn: record %d ends early", s.records)
		}
		if err != nil {
			return err
		}
		if want = s.record(s.records, want); !bytes.Equal(b[:n], want) {
			return fmt.Errorf("torn, lost or twice: record %d is not what was sent; it says that it is %d", s.records, binary.LittleEndian.Uint64(b))
		}
		s.records++
		s.bytes += uint64(n)
		if err := s.keep(); err != nil {
			return err
		}
	}
}
