package shmem

// Pause tells the CPU that a loop waits for memory to change. Between two
// looks at a word, it keeps the reader from taking the cache line away from a
// writer that is not done with it, and leaves the core to its other thread.
//
//go:noescape
func Pause()
