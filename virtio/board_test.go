package virtio_test

import (
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/internal/boardtest"
	"github.com/ivshmem-go/ivshmem/regs"
)

// The names of boardtest that the tests here are full of.
type (
	board     = boardtest.Board
	boardPeer = boardtest.Peer
	wiring    = boardtest.Wiring
)

const (
	apart    = boardtest.Apart
	merged   = boardtest.Merged
	oneShots = boardtest.OneShots
	silent   = boardtest.Silent
	vector0  = boardtest.Vector0
)

// newBoard is a link with an R/W section of a size.
func newBoard(t testing.TB, protocol regs.Protocol, rw uint64, vectors int) *board {
	t.Helper()
	return boardtest.New(t, boardtest.Config{Vectors: vectors, Protocol: protocol, ReadWrite: rw})
}

// until waits for a condition.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !f(); time.Sleep(20 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: ", what)
		}
	}
}
