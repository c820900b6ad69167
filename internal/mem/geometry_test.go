package mem_test

import (
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ivshmem-go/ivshmem/internal/mem"
	"github.com/ivshmem-go/ivshmem/regs"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// config is a configuration space whose vendor capability, at 40h, has the
// sizes given as little-endian hexadecimal digits.
func config(stateTable, readWrite, output string) []byte {
	b := make([]byte, 256)
	copy(b, []byte{0x0a, 0x11, 0x06, 0x41, 0, 0, 0x10, 0, 0, 0, 0, 0xff})
	b[0x34] = 0x40
	capability, err := hex.DecodeString("09001800" + stateTable + readWrite + output)
	if err != nil {
		panic(err)
	}
	copy(b[0x40:], capability)
	return b
}

func TestGeometry(t *testing.T) {
	good := config("00100000", "0090000000000000", "0020000000000000")
	const ones = 0xffffffff
	failed := errors.New("bus error")
	for _, c := range []struct {
		name      string
		config    []byte
		id, peers uint32
		err       error  // the register ID fails with
		is        error  // class of the error wanted
		say       string // what it has to say
	}{
		{name: "first", config: good, id: 0, peers: 3},
		{name: "last", config: good, id: 2, peers: 3},
		{name: "ID above all peers", config: good, id: 3, peers: 3, say: "register ID"},
		{name: "ID far above", config: good, id: 1 << 31, peers: 3, say: "register ID"},
		{name: "gone", config: good, id: ones, peers: ones, is: regs.ErrGone},
		{name: "gone in between", config: good, id: 0, peers: ones, is: regs.ErrGone},
		{name: "back in between", config: good, id: ones, peers: 3, is: regs.ErrGone},
		{name: "no peers", config: good, id: 0, peers: 0, say: "Maximum Peers"},
		{name: "one peer", config: good, id: 0, peers: 1, say: "Maximum Peers"},
		{name: "too many peers", config: good, id: 0, peers: 65537, say: "Maximum Peers"},
		{name: "more peers than states", config: good, id: 0, peers: 1025, say: "State Table size"},
		{name: "register cannot be read", config: good, peers: 3, err: failed, is: failed},
		{name: "closed", config: good, peers: 3, err: os.ErrClosed, is: os.ErrClosed},
		{name: "sizes of all ones", config: config("ffffffff", strings.Repeat("ff", 8), strings.Repeat("ff", 8)), peers: 3, say: "State Table size"},
		{name: "R/W section of 2^64 - 4096", config: config("00100000", "00f0ffffffffffff", "0020000000000000"), peers: 3, say: "R/W section size"},
		{name: "output sections overflow", config: config("00100000", "0000000000000000", "0000000000000080"), peers: 2, say: "output section size"},
		{name: "misaligned", config: config("00100000", "0190000000000000", "0020000000000000"), peers: 3, say: "R/W section size"},
		{name: "State Table 0", config: config("00000000", "0090000000000000", "0020000000000000"), peers: 3, say: "State Table size"},
		{name: "unprivileged", config: good[:64], peers: 3, is: regs.ErrConfigShort},
		{name: "no configuration space", config: nil, peers: 3, is: regs.ErrConfigShort},
		{name: "no capability", config: append(make([]byte, 64), good[64:]...), peers: 3, is: regs.ErrNoCapability},
		{name: "configuration space gone", config: []byte(strings.Repeat("\xff", 256)), id: ones, peers: ones, is: regs.ErrGone},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, own, err := mem.Geometry(c.config, func(r regs.Register) (uint32, error) {
				switch r {
				case regs.ID:
					return c.id, c.err
				case regs.MaxPeers:
					return c.peers, nil
				}
				t.Errorf("register %v was read", r)
				return 0, nil
			})
			if c.is == nil && c.say == "" {
				want := shmem.Layout{StateTable: 0x1000, ReadWrite: 0x9000, Output: 0x2000, Peers: 3}
				if d := cmp.Diff(want, l); d != "" || err != nil || own != c.id {
					t.Errorf("own %d, %v\n%s", own, err, d)
				}
				return
			}
			if err == nil || !errors.Is(err, c.is) && c.is != nil || !strings.Contains(err.Error(), c.say) {
				t.Errorf("%+v, %d, %v, want %v %q", l, own, err, c.is, c.say)
			}
		})
	}
}
