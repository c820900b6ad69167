package vnet

import "sync/atomic"

// Frame is what an observer sees of a frame.
type Frame struct {
	Sent bool // else received
	// Data is the frame, a copy that is valid during the call. It is nil where
	// there is none: a descriptor that leads nowhere. The peer may have changed
	// a frame that it sent since it was delivered.
	Data []byte
	// Dropped says why the frame went no further; "" is one that did.
	Dropped string
}

// Observe has see told of each frame from now on, in the goroutine that sends or
// receives it: it must be quick, may be called by both at a time, and must not
// call the link. Nil ends that, after the frames that are on their way.
func (l *Link) Observe(see func(Frame)) {
	var p *func(Frame)
	if see != nil {
		p = &see
	}
	l.tx.observer.see.Store(p)
	l.rx.observer.see.Store(p)
}

// observer copies frames for who wants to see them. Whoever calls it holds the
// lock of its queue.
type observer struct {
	see     atomic.Pointer[func(Frame)]
	scratch []byte
}

// section is where a frame is.
type section interface {
	ReadAt(p []byte, offset int64) (int, error)
}

func (o *observer) frame(s section, at, length uint64, f Frame) {
	see := o.see.Load()
	if see == nil {
		return
	}
	if o.scratch == nil {
		o.scratch = make([]byte, MaxFrame)
	}
	f.Data = o.scratch[:min(length, MaxFrame)]
	if _, err := s.ReadAt(f.Data, int64(at)); err != nil {
		f.Data = nil
	}
	(*see)(f)
}

func (o *observer) dropped(sent bool, data []byte, why string) {
	if see := o.see.Load(); see != nil {
		(*see)(Frame{Sent: sent, Data: data, Dropped: why})
	}
}

// reason is what a counter counts.
func (s *ReceiveStats) reason(cause *uint64) string {
	switch cause {
	case &s.Index:
		return "number of the descriptor"
	case &s.Flags:
		return "flags of the descriptor"
	case &s.Address:
		return "address in the descriptor"
	case &s.Length:
		return "length in the descriptor"
	}
	return "shorter than a header"
}
