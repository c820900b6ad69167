package mem

import (
	"errors"
	"runtime/debug"
)

// ErrCutShort says that there was nothing behind a mapping: the file became
// shorter, or there is no memory left for it.
var ErrCutShort = errors.New("shared memory: the file was cut short, or there is no memory left for it")

// Guard runs f, which accesses a mapping of a file that others can change the
// size of. Where nothing is behind the mapping any more, the access ends f with
// ErrCutShort instead of the process.
func Guard(f func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch r := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }: // a fault, and no other mistake
			err = ErrCutShort
		default:
			panic(r)
		}
	}()
	f()
	return nil
}
