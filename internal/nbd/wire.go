// Package nbd is the server half of NBD, the protocol of network block devices:
// for clients that connect to a socket, and for the kernel of this machine,
// which shows a disk as /dev/nbdX.
package nbd

import (
	"encoding/binary"
	"fmt"
	"io"
)

// All numbers are in network byte order (NBD protocol, "Values").
const (
	magicServer  = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption  = 0x49484156454f5054 // "IHAVEOPT"
	magicAnswer  = 0x0003e889045565a9 // to an option
	magicRequest = 0x25609513
	magicReply   = 0x67446698
)

// What a client asks for before it transmits.
const (
	handshakeFixed    = 1 << 0 // flag of both sides
	handshakeNoZeroes = 1 << 1

	optionExportName = 1
	optionAbort      = 2
	optionList       = 3
	optionInfo       = 6
	optionGo         = 7

	answerAck     = 1
	answerServer  = 2
	answerInfo    = 3
	answerUnknown = 1<<31 + 1 // the option is not
	answerInvalid = 1<<31 + 3
	answerNoSuch  = 1<<31 + 6 // export

	infoExport    = 0
	infoBlockSize = 3
)

// Transmission flags.
const (
	flagHasFlags    = 1 << 0
	flagReadOnly    = 1 << 1
	flagFlush       = 1 << 2
	flagFUA         = 1 << 3
	flagTrim        = 1 << 5
	flagWriteZeroes = 1 << 6
	flagMultiConn   = 1 << 8
)

// Requests.
const (
	commandRead        = 0
	commandWrite       = 1
	commandDisconnect  = 2
	commandFlush       = 3
	commandTrim        = 4
	commandWriteZeroes = 6

	commandFUA    = 1 << 0 // flags
	commandNoHole = 1 << 1
)

// errno is an error of the protocol, which uses Linux's numbers.
type errno uint32

const (
	errPermission   errno = 1
	errIO           errno = 5
	errInvalid      errno = 22
	errNoSpace      errno = 28
	errNotSupported errno = 95
)

// maxPayload is the most bytes of data of a request, which is what clients
// expect that were told of no limit.
const maxPayload = 32 << 20

// request is {magic 4, flags 2, type 2, cookie 8, offset 8, length 4}; the data
// of a write follows.
type request struct {
	flags, kind    uint16
	cookie, offset uint64
	length         uint32
}

const (
	requestSize = 28
	// replySize is the size of {magic 4, error 4, cookie 8}; the data of a read
	// follows.
	replySize = 16
)

// ProtocolError says that the client does not speak NBD, or speaks it wrongly.
type ProtocolError struct {
	Field string
	Value uint64
	Bound string // what was expected
}

func (e *ProtocolError) Error() string {
	return fmt.Sprintf("the NBD client violates the protocol: %s: expected %s, found %#x", e.Field, e.Bound, e.Value)
}

// readRequest reads a request without its data. It fails with io.EOF between
// two requests.
func readRequest(r io.Reader) (request, error) {
	var p [requestSize]byte
	if _, err := io.ReadFull(r, p[:]); err != nil {
		return request{}, err
	}
	be := binary.BigEndian
	if m := be.Uint32(p[:]); m != magicRequest {
		return request{}, &ProtocolError{"magic of a request", uint64(m), fmt.Sprintf("%#x", magicRequest)}
	}
	q := request{be.Uint16(p[4:]), be.Uint16(p[6:]), be.Uint64(p[8:]), be.Uint64(p[16:]), be.Uint32(p[24:])}
	if q.payload() > maxPayload {
		return q, &ProtocolError{"length of a write", uint64(q.length), fmt.Sprintf("at most %d", maxPayload)}
	}
	return q, nil
}

// payload is how many bytes of data follow the request.
func (q *request) payload() uint32 {
	if q.kind == commandWrite {
		return q.length
	}
	return 0
}

// answer is how many bytes of data follow the reply, if it is not an error.
func (q *request) answer() uint32 {
	if q.kind == commandRead {
		return q.length
	}
	return 0
}

// check says what is wrong with a request to a disk, 0 for nothing.
func (q *request) check(d Disk) errno {
	allowed := uint16(commandFUA)
	if q.kind == commandWriteZeroes {
		allowed |= commandNoHole
	}
	size := uint64(d.Size())
	whole := q.offset%sector == 0 && q.length%sector == 0
	outside := q.offset > size || uint64(q.length) > size-q.offset
	switch q.kind {
	case commandFlush:
		outside = false
	case commandRead:
		if q.length > maxPayload {
			return errInvalid
		}
	case commandWrite, commandTrim, commandWriteZeroes:
		switch {
		case d.ReadOnly():
			return errPermission
		case outside && q.kind != commandTrim:
			return errNoSpace
		case !whole && q.kind != commandWrite:
			return errInvalid
		}
	default:
		return errInvalid
	}
	if outside || q.flags&^allowed != 0 {
		return errInvalid
	}
	return 0
}

// putReply writes a reply to the first replySize bytes of p.
func putReply(p []byte, cookie uint64, e errno) {
	be := binary.BigEndian
	be.PutUint32(p, magicReply)
	be.PutUint32(p[4:], uint32(e))
	be.PutUint64(p[8:], cookie)
}
