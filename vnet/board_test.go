package vnet_test

import (
	"testing"

	"github.com/ivshmem-go/ivshmem/internal/boardtest"
)

// The names of boardtest that the tests here are full of.
type (
	board  = boardtest.Board
	wiring = boardtest.Wiring
)

const (
	apart    = boardtest.Apart
	merged   = boardtest.Merged
	oneShots = boardtest.OneShots
	silent   = boardtest.Silent
	vector0  = boardtest.Vector0
)

// newBoard is a link as ivshmem-net's, with output sections of a size.
func newBoard(t testing.TB, output uint64, vectors int) *board {
	t.Helper()
	return boardtest.New(t, boardtest.Config{Vectors: vectors, Protocol: 1, Output: output})
}
