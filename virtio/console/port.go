package console

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// outMost is how many bytes a port holds for the other side.
const outMost = 64 << 10

// Ready is what a port is ready for, as poll tells.
type Ready uint8

const (
	// In: reading does not wait. It gives data, or the end of file.
	In Ready = 1 << iota
	// Out: writing does not wait.
	Out
	// HangUp: the other side is closed, or the port was removed.
	HangUp
)

// Port carries bytes between the two sides. Each side opens and closes its own
// end, and hears of the other's. It is safe for concurrent use.
type Port struct {
	id    uint32
	wire  Wire
	owner bool // this is the device side

	mu sync.Mutex
	// Below: with mu held.
	name    string
	console bool
	removed error // why it is there no more
	hooks   hooks
	changed chan struct{} // closed at the next change; nil: nobody waits

	turns   uint64 // of the own end; it is open when odd
	claimed bool   // somebody called Open
	// announced is what the other side was told of turns.
	announced uint64
	// tail says that what was written before the last Close is not all sent. It
	// goes before the other side is told, and before anything new.
	tail bool

	peerOpen bool
	leaving  bool   // it closed, and what it wrote before is on the way
	reopened bool   // and opened it again
	hangups  uint64 // how often it closed
	eager    bool   // what is written goes out while the other side is closed

	unread    fifo
	limit     int
	cache     bool
	stuck     bool   // who reads has taken nothing for long: what arrives is dropped
	dropped   uint64 // bytes
	out       fifo
	sending   bool // between out and the queue
	throttled bool // the other side said so
	starved   bool // the other side leaves no room in the queue

	size    Size
	resizes uint64
	asks    asks
}

// Size is that of a console's window in characters.
type Size struct{ Cols, Rows uint16 }

// asks is what the device asks the driver's end for.
type asks struct {
	cache    bool
	limit    uint16 // MiB
	cacheSet bool
	limitSet bool
}

// hooks wake those who work for the port.
type hooks struct {
	send *waker // there is something to send
	room *waker // there is room for more unread data
	tell *waker // there is something to tell
	// busy reports whether the other side has yet to take what was sent. It may be
	// nil.
	busy func() bool
}

// ID is the port's number.
func (p *Port) ID() uint32 { return p.id }

// Name is the port's name, empty if it has none, or none has arrived yet. It is
// what the device said: any bytes but 0, up to 4088.
func (p *Port) Name() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.name
}

// Console reports whether the port is a console.
func (p *Port) Console() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.console
}

// change wakes who waits for the port. The caller holds mu.
func (p *Port) change() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// Changes returns a channel that is closed at the next change of the port,
// whatever it is.
func (p *Port) Changes() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changes()
}

// changes is Changes for those who hold mu.
func (p *Port) changes() <-chan struct{} {
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	return p.changed
}

func (p *Port) isOpen() bool { return p.turns&1 == 1 }

// mayUse says why the own end cannot be used. The caller holds mu.
func (p *Port) mayUse() error {
	switch {
	case p.removed != nil:
		return p.removed
	case !p.isOpen():
		return os.ErrClosed
	}
	return nil
}

// Open opens the own end and tells the other side. One at a time has it open:
// others get [ErrBusy].
func (p *Port) Open() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.removed != nil:
		return p.removed
	case p.claimed:
		return ErrBusy
	}
	p.claimed = true
	p.turnOpen()
	return nil
}

// turnOpen opens the own end if it is not. The caller holds mu.
func (p *Port) turnOpen() {
	if !p.isOpen() {
		p.turns++
		p.hooks.tell.wake()
		p.change()
	}
}

// Close closes the own end. Unread data is dropped unless it is kept
// ([Port.SetCache]). What was written goes out before the other side is told.
func (p *Port) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.isOpen() {
		return os.ErrClosed
	}
	p.turns++
	p.claimed = false
	if !p.cache {
		p.forget()
	}
	if !p.mayGoOut() {
		p.out.Reset()
	}
	p.tail = p.sending || p.out.Len() > 0
	p.eased()
	p.change()
	return nil
}

// Flush waits until the other side has taken what was written, or does not want
// it any more. What it has taken may still be unread there.
func (p *Port) Flush(ctx context.Context) error {
	for {
		p.mu.Lock()
		unsent := p.removed == nil && (p.sending || p.mayGoOut() && p.out.Len() > 0)
		busy, changed := p.hooks.busy, p.changes()
		p.mu.Unlock()
		if unsent {
			if err := await(ctx, changed); err != nil {
				return err
			}
			continue
		}
		if busy == nil || !busy() {
			return nil
		}
		// Nobody is told of that.
		select {
		case <-time.After(firstPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// forget drops unread data. The caller holds mu.
func (p *Port) forget() {
	p.dropped += uint64(p.unread.Len())
	p.unread = fifo{}
}

// InUse reports whether somebody has the own end open by [Port.Open].
func (p *Port) InUse() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.claimed
}

// PeerOpen reports whether the other side has the port open.
func (p *Port) PeerOpen() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peerOpen
}

// WaitOpen waits until the other side has the port open.
func (p *Port) WaitOpen(ctx context.Context) error {
	for {
		p.mu.Lock()
		open, err, changed := p.peerOpen, p.removed, p.changes()
		p.mu.Unlock()
		if open || err != nil {
			return err
		}
		if err := await(ctx, changed); err != nil {
			return err
		}
	}
}

// Read reads what is there, and waits for it. It fails with [io.EOF] when the
// other side is closed and all is read, with [os.ErrClosed] when the own end
// is, and with [ErrRemoved], or the reason why the driver ended. The other side
// may open the port again after an end of file.
func (p *Port) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for turns, hangups := p.turns, p.hangups; ; {
		n, err := p.read(b, hangups)
		if err != ErrWouldBlock {
			return n, err
		}
		changed := p.changes()
		p.mu.Unlock()
		<-changed
		p.mu.Lock()
		if p.turns != turns && p.removed == nil { // closed, and perhaps opened again
			return 0, os.ErrClosed
		}
	}
}

// TryRead is Read without waiting: it fails with [ErrWouldBlock].
func (p *Port) TryRead(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.read(b, p.hangups)
}

// read reads what is there. The caller holds mu.
func (p *Port) read(b []byte, hangups uint64) (int, error) {
	if err := p.mayUse(); err != nil && (p.unread.Len() == 0 || !p.isOpen()) {
		return 0, err
	}
	if len(b) == 0 {
		return 0, nil
	}
	if p.unread.Len() == 0 {
		if !p.peerOpen || p.hangups != hangups {
			return 0, io.EOF
		}
		return 0, ErrWouldBlock
	}
	full := p.unread.Len() >= p.limit
	n := p.unread.Read(b)
	if p.unread.Len() == 0 {
		p.unread.Reset()
	}
	if full {
		p.eased()
	}
	return n, nil
}

// eased is what follows when there may be room for unread data that there was
// not before. The caller holds mu.
func (p *Port) eased() {
	p.stuck = false
	p.hooks.room.wake()
	p.hooks.tell.wake()
}

// Write writes all of b, and waits for room. A port that the other side has
// throttled by a message refuses with [ErrThrottled] and says how many bytes
// were taken before. Where the wire has no such message, or the other side is
// closed, Write waits. It fails as Read does otherwise.
func (p *Port) Write(b []byte) (int, error) {
	return p.writeAll(context.Background(), b, false)
}

// WriteAll is Write that waits while the port is throttled, too, until the
// context ends.
func (p *Port) WriteAll(ctx context.Context, b []byte) (int, error) {
	return p.writeAll(ctx, b, true)
}

func (p *Port) writeAll(ctx context.Context, b []byte, patient bool) (n int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for turns := p.turns; ; {
		m, err := p.write(b[n:])
		n += m
		switch {
		case err == nil && n == len(b):
			return n, nil
		case err == nil || err == ErrWouldBlock:
		case err == ErrStalled, err == ErrThrottled && patient:
		default:
			return n, err
		}
		if err == nil {
			continue
		}
		changed := p.changes()
		p.mu.Unlock()
		err = await(ctx, changed)
		p.mu.Lock()
		if err != nil {
			return n, err
		}
		if p.turns != turns && p.removed == nil {
			return n, os.ErrClosed
		}
	}
}

// TryWrite writes as much of b as there is room for. Without any room it fails
// with [ErrThrottled] where the other side said so, with [ErrStalled] where it
// does not take what it was sent, and with [ErrWouldBlock] otherwise.
func (p *Port) TryWrite(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.write(b)
}

// write takes as much as there is room for. The caller holds mu.
func (p *Port) write(b []byte) (int, error) {
	if err := p.mayUse(); err != nil {
		return 0, err
	}
	room := outMost - p.out.Len()
	switch {
	case len(b) == 0:
		return 0, nil
	case p.throttled:
		return 0, ErrThrottled
	case room <= 0 && p.starved:
		return 0, ErrStalled
	case !p.mayGoOut(), p.tail, room <= 0:
		return 0, ErrWouldBlock
	}
	if p.out.Len() == 0 {
		p.hooks.send.wake()
	}
	n := min(len(b), room)
	p.out.Write(b[:n])
	return n, nil
}

// Throttled reports whether the other side has throttled the port, or leaves
// what it was sent where it is.
func (p *Port) Throttled() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.throttled || p.starved
}

// mayGoOut reports whether the wire takes data now, throttling aside. The caller
// holds mu.
func (p *Port) mayGoOut() bool { return p.peerOpen || p.eager }

// Ready says what the port is ready for.
func (p *Port) Ready() Ready {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ready()
}

func (p *Port) ready() Ready {
	if p.removed != nil {
		return HangUp
	}
	var r Ready
	if p.unread.Len() > 0 || !p.peerOpen {
		r |= In
	}
	if p.mayGoOut() && !p.tail && !p.throttled && p.out.Len() < outMost {
		r |= Out
	}
	if !p.peerOpen {
		r |= HangUp
	}
	return r
}

// Wait waits until the port is ready for something of want, or was removed, and
// says what it is ready for.
func (p *Port) Wait(ctx context.Context, want Ready) (Ready, error) {
	for {
		p.mu.Lock()
		r, gone, changed := p.ready(), p.removed != nil, p.changes()
		p.mu.Unlock()
		if r&want != 0 || gone {
			return r, nil
		}
		if err := await(ctx, changed); err != nil {
			return 0, err
		}
	}
}

// Unread is the number of bytes that have arrived and were not read.
func (p *Port) Unread() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.unread.Len()
}

// Dropped is the number of bytes that arrived and that nobody could read any
// more, as the own end was closed.
func (p *Port) Dropped() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dropped
}

// SetCache says whether unread data is kept when the own end closes, and what
// arrives while it is closed, too, for who opens it next. At first it is
// dropped.
func (p *Port) SetCache(keep bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cache = keep; !keep && !p.isOpen() {
		p.forget()
	}
	p.eased()
}

// SetLimit sets how many bytes of unread data there may be, from 1 to 64 MiB:
// from there on the other side is throttled, and below it released.
func (p *Port) SetLimit(n int) error {
	if n < 1 || n > maxLimit {
		return fmt.Errorf("limit of %d bytes: expected 1 to %d", n, maxLimit)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit = n
	p.eased()
	return nil
}

// SetPeerCache asks the driver's end to keep unread data when it closes, or to
// drop it. Only the device on the original wire can ask; others fail with
// [ErrNotCarried].
func (p *Port) SetPeerCache(keep bool) error {
	return p.ask(func(a *asks) { a.cache, a.cacheSet = keep, true })
}

// SetPeerLimit sets how much unread data the driver's end may have, in MiB up
// to 65535; 0 is as much as it likes. Only the device on the original wire can
// ask; others fail with [ErrNotCarried].
func (p *Port) SetPeerLimit(mib uint16) error {
	return p.ask(func(a *asks) { a.limit, a.limitSet = mib, true })
}

func (p *Port) ask(f func(*asks)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.removed != nil {
		return p.removed
	}
	if !p.owner || p.wire != Original {
		return ErrNotCarried
	}
	f(&p.asks)
	p.hooks.tell.wake()
	return nil
}

// Size is the size of the console's window; 0 is unknown.
func (p *Port) Size() Size {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.size
}

func await(ctx context.Context, changed <-chan struct{}) error {
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
