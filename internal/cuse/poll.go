package cuse

import (
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/virtio/console"
)

// poll is what is known of those who poll the file.
type poll struct {
	handle uint64
	wanted console.Ready // what they wait for; 0: nobody waits
	told   console.Ready // what they know and what has not ended since
}

// The callers of all that follow hold mu.

func (d *device) handlePoll(m message) error {
	d.poll.told = d.port.Ready()
	if native.Uint32(m.body[pollFlags:])&pollSchedule != 0 {
		d.poll.handle = native.Uint64(m.body[pollHandle:])
		d.poll.wanted |= console.HangUp // whatever is asked for
		events := native.Uint32(m.body[pollMask:])
		if events&(unix.POLLIN|pollReadNormal) != 0 {
			d.poll.wanted |= console.In
		}
		if events&(unix.POLLOUT|pollWriteNormal) != 0 {
			d.poll.wanted |= console.Out
		}
	}
	var events uint32
	if d.poll.told&console.In != 0 {
		events |= unix.POLLIN | pollReadNormal
	}
	if d.poll.told&console.Out != 0 {
		events |= unix.POLLOUT | pollWriteNormal
	}
	if d.poll.told&console.HangUp != 0 {
		events |= unix.POLLHUP
	}
	b := make([]byte, 8)
	native.PutUint32(b, events)
	return d.reply(m.unique, b)
}

// notify makes those who poll ask again when there is something new for them.
// They are told once; their next question is for the next time. What was ready
// when a request took or gave data is new if it still is: who waits for edges
// (EPOLLET) does so after a read that got less than it asked for.
func (d *device) notify() error {
	ready := d.port.Ready()
	d.poll.told &= ready
	if d.poll.wanted&ready&^d.poll.told == 0 {
		return nil
	}
	d.poll.wanted = 0
	b := native.AppendUint64(make([]byte, outHeaderSize), d.poll.handle)
	put(b, 0, 0)
	native.PutUint32(b[4:], notifyPoll) // in the place of an error
	return d.write(b)
}

// handleIoctl answers the two calls that there are. Their numbers do not tell
// the kernel what they return: it asks a second time with room for that, when
// it was told where that is to go.
func (d *device) handleIoctl(m message) error {
	var result []byte
	switch native.Uint32(m.body[ioctlCommand:]) {
	case unix.TIOCINQ: // also called FIONREAD
		result = native.AppendUint32(nil, uint32(d.port.Unread()))
	case unix.TIOCGWINSZ:
		if d.port.Console() {
			size := d.port.Size()
			result = native.AppendUint16(native.AppendUint16(nil, size.Rows), size.Cols)
			result = append(result, 0, 0, 0, 0) // in pixels
		}
	}
	if result == nil {
		return d.refuse(m.unique, unix.ENOTTY)
	}
	if native.Uint32(m.body[ioctlOutSize:]) == uint32(len(result)) {
		return d.reply(m.unique, append(ioctlAnswer(0, 0), result...))
	}
	b := native.AppendUint64(ioctlAnswer(ioctlRetry, 1), native.Uint64(m.body[ioctlArgument:]))
	return d.reply(m.unique, native.AppendUint64(b, uint64(len(result))))
}
