package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

const (
	// handshakePatience is how long a client may take before it transmits.
	handshakePatience = 10 * time.Second
	// maxOption is the most bytes of data of an option: more than the name of an
	// export may have.
	maxOption = 64 << 10
	// preferred is what clients are told to align to, in bytes.
	preferred = 4096
	sector    = 512
)

// Serve serves a disk to a client that has connected: handshake (fixed
// newstyle; the disk is the default export, "") and requests, until it goes,
// which is no error, or the context ends. It closes the connection.
func Serve(ctx context.Context, conn net.Conn, d Disk) error {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(handshakePatience))
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err := shake(conn, d)
	if !stop() {
		return ctx.Err()
	}
	if err != nil {
		if gone(err) {
			return nil
		}
		return err
	}
	conn.SetDeadline(time.Time{})
	return serve(ctx, conn, d)
}

// shake agrees with a client on what is to be transmitted.
func shake(rw io.ReadWriter, d Disk) error {
	be := binary.BigEndian
	hello := be.AppendUint64(be.AppendUint64(nil, magicServer), magicOption)
	if _, err := rw.Write(be.AppendUint16(hello, handshakeFixed|handshakeNoZeroes)); err != nil {
		return err
	}
	var p [4]byte
	if _, err := io.ReadFull(rw, p[:]); err != nil {
		return err
	}
	client := be.Uint32(p[:])
	if client&^(handshakeFixed|handshakeNoZeroes) != 0 {
		return &ProtocolError{"flags of the client", uint64(client), "FIXED_NEWSTYLE and NO_ZEROES"}
	}
	for {
		option, data, err := readOption(rw)
		if err != nil {
			return err
		}
		if option == optionExportName {
			if len(data) > 0 {
				return fmt.Errorf("the NBD client wants export %q: expected \"\", the only one", data)
			}
			export := be.AppendUint16(be.AppendUint64(nil, uint64(d.Size())), flags(d))
			if client&handshakeNoZeroes == 0 {
				export = append(export, make([]byte, 124)...)
			}
			_, err := rw.Write(export)
			return err
		}
		out, done := answerOption(option, data, d)
		if _, err := rw.Write(out); err != nil || done == errTransmit {
			return err
		}
		if done != nil {
			return done
		}
	}
}

// readOption reads {magic 8, option 4, length 4} and the data.
func readOption(r io.Reader) (option uint32, data []byte, err error) {
	var p [16]byte
	if _, err := io.ReadFull(r, p[:]); err != nil {
		return 0, nil, err
	}
	be := binary.BigEndian
	if m := be.Uint64(p[:]); m != magicOption {
		return 0, nil, &ProtocolError{"magic of an option", m, fmt.Sprintf("%#x", uint64(magicOption))}
	}
	n := be.Uint32(p[12:])
	if n > maxOption {
		return 0, nil, &ProtocolError{"length of an option", uint64(n), fmt.Sprintf("at most %d", maxOption)}
	}
	data = make([]byte, n)
	_, err = io.ReadFull(r, data)
	return be.Uint32(p[8:]), data, err
}

// errTransmit says that the client goes on to transmit.
var errTransmit = errors.New("transmit")

// answerOption answers an option, and says whether the handshake is over.
func answerOption(option uint32, data []byte, d Disk) (out []byte, done error) {
	be := binary.BigEndian
	answer := func(kind uint32, data []byte) {
		out = be.AppendUint32(be.AppendUint32(be.AppendUint64(out, magicAnswer), option), kind)
		out = append(be.AppendUint32(out, uint32(len(data))), data...)
	}
	switch option {
	case optionAbort:
		answer(answerAck, nil)
		return out, errDisconnected
	case optionList:
		if len(data) > 0 {
			answer(answerInvalid, nil)
			return out, nil
		}
		answer(answerServer, make([]byte, 4)) // the length of a name
		answer(answerAck, nil)
	case optionInfo, optionGo:
		name, ok := exportOf(data)
		switch {
		case !ok:
			answer(answerInvalid, nil)
			return out, nil
		case name != "":
			answer(answerNoSuch, []byte(`expected export "", the only one`))
			return out, nil
		}
		info := be.AppendUint64(be.AppendUint16(nil, infoExport), uint64(d.Size()))
		answer(answerInfo, be.AppendUint16(info, flags(d)))
		info = be.AppendUint16(nil, infoBlockSize)
		for _, n := range []uint32{sector, preferred, maxPayload} {
			info = be.AppendUint32(info, n)
		}
		answer(answerInfo, info)
		answer(answerAck, nil)
		if option == optionGo {
			return out, errTransmit
		}
	default:
		answer(answerUnknown, nil)
	}
	return out, nil
}

// exportOf reads {length 4, name, number 2, {information 2} …}.
func exportOf(data []byte) (name string, ok bool) {
	be := binary.BigEndian
	if len(data) < 6 {
		return "", false
	}
	n := uint64(be.Uint32(data))
	if n > uint64(len(data)-6) {
		return "", false
	}
	rest := data[4+n:]
	return string(data[4 : 4+n]), len(rest) == 2+2*int(be.Uint16(rest))
}
