package vnet

import "context"

// A kernel's interface that moves several frames in a call needs room for
// several, and gives several back.

// UnsafeReserveAll is UnsafeReserve for up to len(frames) frames: it fills in as
// many as there is room for now, and waits for room for one. They are sent by
// UnsafeCommitAll, in their order.
func (l *Link) UnsafeReserveAll(ctx context.Context, frames [][]byte) (n int, err error) {
	p, err := l.UnsafeReserve(ctx)
	if err != nil || len(frames) == 0 {
		return 0, err
	}
	t := &l.tx
	t.mu.Lock()
	defer t.mu.Unlock()
	frames[0] = p
	if !t.reserved { // reset just now: committing will tell
		return 1, nil
	}
	tail := t.tail
	if t.outstanding() == 0 {
		tail = t.position
	}
	for n = 1; n < len(frames) && int(t.outstanding())+n <= int(t.mask); n++ {
		at := t.more[n-1] + align(t.most)
		if at > tail && t.size-min(at, t.size) < t.most {
			at = 0
			if tail < t.most {
				break
			}
		}
		if at <= tail && tail-at < t.most {
			break
		}
		if frames[n], err = t.own.UnsafeBytes(t.header+at, t.most); err != nil {
			return n, nil // all that there is
		}
		t.more = append(t.more, at)
	}
	return n, nil
}

// UnsafeCommitAll sends the first frames that UnsafeReserveAll returned: those
// whose lengths are given. It fails as UnsafeCommit does, and then sends none.
func (l *Link) UnsafeCommitAll(lengths []int) error {
	t := &l.tx
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.err != nil:
		return t.err
	case !t.reserved || !t.carrier || len(lengths) > len(t.more):
		t.stats.Reset += uint64(len(lengths))
		return ErrReset
	}
	for _, n := range lengths {
		if err := t.check(n); err != nil {
			return err
		}
	}
	for i, n := range lengths {
		t.position = t.more[i]
		t.commit(n)
	}
	return nil
}

// UnsafePeekAll is UnsafePeek for up to len(frames) frames: it fills in those
// that are there, and waits for one. They are returned by UnsafeReleaseAll.
func (l *Link) UnsafePeekAll(ctx context.Context, frames [][]byte) (n int, err error) {
	p, err := l.UnsafePeek(ctx)
	if err != nil || len(frames) == 0 {
		return 0, err
	}
	r := &l.rx
	r.mu.Lock()
	defer r.mu.Unlock()
	frames[0] = p
	r.ahead = r.ahead[:0]
	if !r.held || r.waiting != r.session {
		return 1, nil
	}
	next := r.next
	defer func() { r.next = next }()
	for n = 1; n < len(frames); n++ {
		r.next++
		if r.next == r.limit {
			break
		}
		f, cause := r.read()
		if cause != nil { // it is dropped when its turn comes
			break
		}
		if frames[n], err = r.peer.UnsafeBytes(f.at, f.length); err != nil {
			return n, nil
		}
		r.ahead = append(r.ahead, f)
	}
	return n, nil
}

// UnsafeReleaseAll returns the first n frames that UnsafePeekAll gave. [ErrReset]
// says that their bytes may have been anything.
func (l *Link) UnsafeReleaseAll(n int) error {
	r := &l.rx
	r.mu.Lock()
	defer r.mu.Unlock()
	held := r.held && r.running && r.waiting == r.session
	r.held = false
	switch {
	case r.err != nil:
		return r.err
	case !held || n > 1+len(r.ahead):
		r.stats.Reset += uint64(n)
		return ErrReset
	}
	for i := range n {
		if i > 0 {
			r.frame = r.ahead[i-1]
		}
		r.count()
		r.finish(r.frame)
	}
	return nil
}
